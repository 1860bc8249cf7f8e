//! The 16 bytes before everything on the data plane: what comes, and how much of it.

use super::DecodeError;

/// The length of an encoded [`FrameHeader`].
pub const FRAME_BYTES: usize = 16;

/// The longest postcard header: all that its 16-bit length can say.
pub const FRAME_HEADER_BYTES_MAX: usize = 0xffff;

/// The longest raw payload of one frame. Activations of a long prefill are the largest thing sent whole (32,768 tokens
/// of 8,192 f32); blobs travel in chunks of 1 MiB.
pub const FRAME_PAYLOAD_BYTES_MAX: u64 = 1 << 30;

/// `P` for Polder and a byte that is no text, so that nobody's HTTP request passes for a frame.
const MAGIC: [u8; 2] = [b'P', 0xd1];

/// The version of the frame itself; what it carries has versions of its own.
const FRAME_VERSION: u8 = 1;

/// The header of one frame: 16 bytes, then `header_bytes` of postcard, then `payload_bytes` of raw little-endian data.
///
/// ```text
/// magic [u8; 2] | version u8 | kind u8 | flags u16 | header_bytes u16 | payload_bytes u64      little-endian
/// ```
///
/// A decoded header is within its limits, so a reader may trust its lengths, though not take memory for the whole
/// payload before it has agreed to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the frame is; the data plane numbers its kinds.
    pub kind: u8,
    /// Bits that the kind defines. Unknown bits are ignored.
    pub flags: u16,
    header_bytes: u16,
    payload_bytes: u64,
}

impl FrameHeader {
    /// A header for so many bytes.
    ///
    /// # Errors
    ///
    /// [`DecodeError::TooLong`] where a length is over its limit.
    pub fn new(kind: u8, flags: u16, header_bytes: usize, payload_bytes: u64) -> Result<Self, DecodeError> {
        super::within(header_bytes, FRAME_HEADER_BYTES_MAX)?;
        if payload_bytes > FRAME_PAYLOAD_BYTES_MAX {
            return Err(DecodeError::TooLong {
                len_bytes: payload_bytes,
                limit_bytes: FRAME_PAYLOAD_BYTES_MAX,
            });
        }
        let header_bytes = u16::try_from(header_bytes).unwrap_or(u16::MAX);
        Ok(Self {
            kind,
            flags,
            header_bytes,
            payload_bytes,
        })
    }

    /// Bytes of the postcard header that follows.
    pub fn header_bytes(&self) -> usize {
        usize::from(self.header_bytes)
    }

    /// Bytes of the raw payload after it, at most [`FRAME_PAYLOAD_BYTES_MAX`].
    pub const fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// The 16 bytes.
    pub fn to_bytes(&self) -> [u8; FRAME_BYTES] {
        let [f0, f1] = self.flags.to_le_bytes();
        let [h0, h1] = self.header_bytes.to_le_bytes();
        let [p0, p1, p2, p3, p4, p5, p6, p7] = self.payload_bytes.to_le_bytes();
        let [m0, m1] = MAGIC;
        [
            m0,
            m1,
            FRAME_VERSION,
            self.kind,
            f0,
            f1,
            h0,
            h1,
            p0,
            p1,
            p2,
            p3,
            p4,
            p5,
            p6,
            p7,
        ]
    }

    /// Reads 16 bytes.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] for other first bytes, another version, or a payload over the limit.
    pub fn from_bytes(bytes: &[u8; FRAME_BYTES]) -> Result<Self, DecodeError> {
        let [m0, m1, version, kind, f0, f1, h0, h1, p0, p1, p2, p3, p4, p5, p6, p7] = *bytes;
        if [m0, m1] != MAGIC {
            return Err(DecodeError::Magic { theirs: [m0, m1] });
        }
        if version != FRAME_VERSION {
            let ours = u16::from(FRAME_VERSION);
            return Err(DecodeError::Version {
                theirs: u16::from(version),
                ours: ours..=ours,
            });
        }
        let header_bytes = usize::from(u16::from_le_bytes([h0, h1]));
        let payload_bytes = u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7]);
        Self::new(kind, u16::from_le_bytes([f0, f1]), header_bytes, payload_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_has_these_bytes_for_ever() {
        let header = FrameHeader::new(7, 0x0201, 300, 1 << 20).expect("within limits");
        let bytes = [b'P', 0xd1, 1, 7, 1, 2, 0x2c, 1, 0, 0, 16, 0, 0, 0, 0, 0];
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(FrameHeader::from_bytes(&bytes), Ok(header));
    }

    #[test]
    fn a_payload_over_the_limit_is_refused_by_its_length_alone() {
        let mut bytes = FrameHeader::new(0, 0, 0, 0).expect("within limits").to_bytes();
        bytes[15] = 0xff;
        assert!(matches!(
            FrameHeader::from_bytes(&bytes),
            Err(DecodeError::TooLong { .. })
        ));
    }

    #[test]
    fn a_web_browser_is_refused_by_its_first_bytes() {
        let refused = FrameHeader::from_bytes(b"GET / HTTP/1.1\r\n");
        assert_eq!(refused, Err(DecodeError::Magic { theirs: *b"GE" }));
    }

    proptest! {
        #[test]
        fn any_16_bytes_are_a_header_that_writes_them_again_or_an_error(bytes: [u8; 16], real: bool) {
            let mut bytes = bytes;
            if real {
                bytes[..3].copy_from_slice(&[b'P', 0xd1, 1]);
                bytes[12..].fill(0);
            }
            if let Ok(header) = FrameHeader::from_bytes(&bytes) {
                prop_assert_eq!(header.to_bytes(), bytes);
            }
        }
    }
}
