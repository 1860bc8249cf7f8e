//! How orders and replies cross a pipe: a length (u32, little-endian), postcard bytes, a payload length (u64,
//! little-endian), a raw payload. Both lengths are checked against a limit before anyone takes memory for them.

use alloc::vec::Vec;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// The longest head: an order without its payload. The largest are held-out texts and the tokens of a micro-batch,
/// a few MiB each.
pub const HEAD_BYTES_MAX: usize = 64 << 20;

/// The longest payload: the logits of 4,096 positions over a vocabulary of 128 Ki, in f32.
pub const PAYLOAD_BYTES_MAX: u64 = 2 << 30;

/// Why bytes on a pipe are not a frame.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum FrameError {
    /// A head over the limit.
    #[error("the head of a frame is {bytes} bytes long, over the limit of {HEAD_BYTES_MAX}")]
    HeadTooLong {
        /// Its length.
        bytes: u64,
    },
    /// A payload over the limit.
    #[error("the payload of a frame is {bytes} bytes long, over the limit of {PAYLOAD_BYTES_MAX}")]
    PayloadTooLong {
        /// Its length.
        bytes: u64,
    },
    /// A head that is not what was expected, or has bytes after it.
    #[error("the head of a frame is malformed")]
    Malformed,
}

/// Everything of a frame that comes before its payload of `payload_bytes`.
///
/// # Errors
///
/// [`FrameError`] for a head or a payload over its limit.
pub fn frame_start<T: Serialize>(head: &T, payload_bytes: usize) -> Result<Vec<u8>, FrameError> {
    let payload_bytes = u64::try_from(payload_bytes).unwrap_or(u64::MAX);
    if payload_bytes > PAYLOAD_BYTES_MAX {
        return Err(FrameError::PayloadTooLong { bytes: payload_bytes });
    }
    let head = postcard::to_allocvec(head).map_err(|_| FrameError::Malformed)?;
    let too_long = FrameError::HeadTooLong {
        bytes: u64::try_from(head.len()).unwrap_or(u64::MAX),
    };
    if head.len() > HEAD_BYTES_MAX {
        return Err(too_long);
    }
    let length = u32::try_from(head.len()).map_err(|_| too_long)?;
    let mut bytes = Vec::with_capacity(head.len() + 12);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(&payload_bytes.to_le_bytes());
    Ok(bytes)
}

/// The length of the head that follows these four bytes.
///
/// # Errors
///
/// [`FrameError::HeadTooLong`].
pub fn head_bytes(prefix: [u8; 4]) -> Result<usize, FrameError> {
    let bytes = u32::from_le_bytes(prefix);
    match usize::try_from(bytes) {
        Ok(length) if length <= HEAD_BYTES_MAX => Ok(length),
        _ => Err(FrameError::HeadTooLong { bytes: bytes.into() }),
    }
}

/// The length of the payload that follows these eight bytes.
///
/// # Errors
///
/// [`FrameError::PayloadTooLong`].
pub fn payload_bytes(prefix: [u8; 8]) -> Result<usize, FrameError> {
    let bytes = u64::from_le_bytes(prefix);
    match usize::try_from(bytes) {
        Ok(length) if bytes <= PAYLOAD_BYTES_MAX => Ok(length),
        _ => Err(FrameError::PayloadTooLong { bytes }),
    }
}

/// Reads a head: an [`Order`](super::Order) or a [`Reply`](super::Reply).
///
/// # Errors
///
/// [`FrameError::Malformed`], also for bytes left over.
pub fn decode_head<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(bytes) {
        Ok((head, [])) => Ok(head),
        Ok(_) | Err(_) => Err(FrameError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::super::{Order, Task};
    use super::*;

    #[test]
    fn an_order_survives_its_frame() {
        let order = Order {
            id: 7,
            task: Task::Hello,
        };
        let frame = frame_start(&order, 3).unwrap();
        let (prefix, rest) = frame.split_first_chunk::<4>().unwrap();
        let (head, payload_length) = rest.split_at(head_bytes(*prefix).unwrap());
        assert_eq!(decode_head::<Order>(head), Ok(order));
        assert_eq!(payload_bytes(payload_length.try_into().unwrap()), Ok(3));
    }

    #[test]
    fn lengths_over_the_limit_are_refused_before_memory_is_taken() {
        assert!(head_bytes(u32::MAX.to_le_bytes()).is_err());
        let error = payload_bytes(u64::MAX.to_le_bytes()).unwrap_err();
        assert!(error.to_string().contains("over the limit"));
    }

    #[test]
    fn bytes_after_a_head_are_refused() {
        let mut bytes = postcard::to_allocvec(&Order {
            id: 7,
            task: Task::Hello,
        })
        .unwrap();
        bytes.push(0);
        assert_eq!(decode_head::<Order>(&bytes), Err(FrameError::Malformed));
    }
}
