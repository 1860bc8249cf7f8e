//! Frames on a stream: 16 bytes that say how much comes, a small header, a raw payload.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use polder_protocol::hash::NodeId;
use polder_protocol::wire::{FRAME_BYTES, FRAME_HEADER_BYTES_MAX, FrameHeader};
use quinn::{RecvStream, SendStream};
use tokio::time::{Instant, timeout};

use super::error::{DataError, StreamEnd, unreadable, unwritable};
use super::settings::{FRAME_BYTES_PER_SECOND_MIN, PAYLOAD_BYTES_MAX, Service};
use super::traffic::Counter;

/// The greeting: credentials, both ways, once for each connection.
pub(super) const KIND_GREETING: u8 = 1;
/// The first frame of every other stream: which service, and what for.
pub(super) const KIND_OPENING: u8 = 2;
/// Everything after it.
pub(super) const KIND_DATA: u8 = 3;

/// One frame as it came.
pub(super) type Frame = (Vec<u8>, Bytes);

/// The sending half of a stream.
///
/// Dropping it between two frames ends the stream as [`FrameSender::finish`] does; dropping it in the middle of a
/// [`FrameSender::send`] breaks it off, and the receiver sees [`DataError::BrokenOff`].
#[derive(Debug)]
pub struct FrameSender {
    stream: SendStream,
    peer: NodeId,
    counter: Arc<Counter>,
    // True from the first byte of a frame to its last.
    halfway: bool,
}

impl FrameSender {
    pub(super) fn new(stream: SendStream, peer: NodeId, counter: Arc<Counter>) -> Self {
        Self {
            stream,
            peer,
            counter,
            halfway: false,
        }
    }

    /// The peer at the other end.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    /// Sends one frame: a header of at most 65,535 bytes and a payload of at most 64 MiB, which is not copied.
    ///
    /// It returns when the connection has taken the frame over, and waits while the peer is slow to read. Not safe to
    /// drop halfway: the stream then is of no more use, and later calls say so.
    ///
    /// # Errors
    ///
    /// [`DataError`] when the frame is too long, the peer broke off the stream, or the connection ended.
    pub async fn send(&mut self, header: &[u8], payload: Bytes) -> Result<(), DataError> {
        self.send_kind(KIND_DATA, header, payload).await
    }

    /// Says that no more frames come. What was sent still arrives.
    pub fn finish(&mut self) {
        // It fails only where the stream has ended in another way already.
        self.stream.finish().ok();
    }

    /// Waits until the peer has all that was sent before [`FrameSender::finish`]. Safe to drop.
    ///
    /// # Errors
    ///
    /// [`DataError`] when the peer broke off the stream or the connection ended.
    pub async fn delivered(&mut self) -> Result<(), DataError> {
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(DataError::BrokenOff {
                peer: self.peer,
                reason: StreamEnd::from_code(code),
            }),
            Err(error) => Err(DataError::Lost {
                peer: self.peer,
                reason: error.to_string(),
            }),
        }
    }

    /// Streams of a higher priority go first on the same connection; 0 is the default.
    pub fn set_priority(&self, priority: i32) {
        self.stream.set_priority(priority).ok();
    }

    /// The stream itself, for tests that break the rules.
    #[cfg(test)]
    pub(super) fn raw(&mut self) -> &mut SendStream {
        &mut self.stream
    }

    pub(super) fn break_off(&mut self, reason: StreamEnd) {
        self.stream.reset(reason.code()).ok();
    }

    pub(super) async fn send_kind(&mut self, kind: u8, header: &[u8], payload: Bytes) -> Result<(), DataError> {
        let front = self.front(kind, header, payload.len())?;
        let total = front.len() + payload.len();
        self.halfway = true;
        let sent = self.stream.write_all_chunks(&mut [front, payload]).await;
        sent.map_err(|error| unwritable(self.peer, error))?;
        self.halfway = false;
        self.counter.add_sent(total);
        Ok(())
    }

    /// Sends the beginning of a frame, whose payload follows piece by piece with [`FrameSender::go_on`].
    pub(super) async fn begin(&mut self, header: &[u8], payload_bytes: usize) -> Result<(), DataError> {
        let front = self.front(KIND_DATA, header, payload_bytes)?;
        self.halfway = true;
        self.go_on(front).await
    }

    /// Sends a piece of the frame that was begun.
    pub(super) async fn go_on(&mut self, piece: Bytes) -> Result<(), DataError> {
        let bytes = piece.len();
        let sent = self.stream.write_chunk(piece).await;
        sent.map_err(|error| unwritable(self.peer, error))?;
        self.counter.add_sent(bytes);
        Ok(())
    }

    /// The frame that was begun has gone out whole.
    pub(super) fn end(&mut self) {
        self.halfway = false;
    }

    fn front(&self, kind: u8, header: &[u8], payload_bytes: usize) -> Result<Bytes, DataError> {
        if self.halfway {
            return Err(DataError::DroppedHalfway { peer: self.peer });
        }
        let bytes = payload_bytes as u64;
        if bytes > PAYLOAD_BYTES_MAX {
            return Err(DataError::TooLong {
                what: "a payload",
                bytes,
                limit_bytes: PAYLOAD_BYTES_MAX,
            });
        }
        let frame = FrameHeader::new(kind, 0, header.len(), bytes).map_err(|_| DataError::TooLong {
            what: "a header",
            bytes: header.len() as u64,
            limit_bytes: FRAME_HEADER_BYTES_MAX as u64,
        })?;
        let mut front = BytesMut::with_capacity(FRAME_BYTES + header.len());
        front.extend_from_slice(&frame.to_bytes());
        front.extend_from_slice(header);
        Ok(front.freeze())
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        if self.halfway {
            self.break_off(StreamEnd::DroppedHalfway);
        }
    }
}

/// The receiving half of a stream. Dropping it tells the sender to stop.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: RecvStream,
    peer: NodeId,
    counter: Arc<Counter>,
    service: Option<Service>,
    stall_max: Duration,
    // The frame that is being received, kept here so that `next` may be dropped at any time.
    front: Vec<u8>,
    frame: Option<FrameHeader>,
    header: Vec<u8>,
    payload: BytesMut,
    waited: Duration,
}

impl FrameReceiver {
    pub(super) fn new(stream: RecvStream, peer: NodeId, counter: Arc<Counter>, stall_max: Duration) -> Self {
        Self {
            stream,
            peer,
            counter,
            service: None,
            stall_max,
            front: Vec::new(),
            frame: None,
            header: Vec::new(),
            payload: BytesMut::new(),
            waited: Duration::ZERO,
        }
    }

    /// The peer at the other end.
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    /// The next frame, header and payload; `None` after the last.
    ///
    /// Between frames it waits for as long as the connection stands. Within a frame the peer must keep up a least
    /// rate. Safe to drop at any time: the next call goes on where this one was.
    ///
    /// # Errors
    ///
    /// [`DataError`] for a malformed or too long frame, a peer that is too slow or breaks off, or a connection that
    /// ended. The stream is of no use after that.
    pub async fn next(&mut self) -> Result<Option<(Vec<u8>, Bytes)>, DataError> {
        self.next_kind(KIND_DATA, PAYLOAD_BYTES_MAX).await
    }

    /// Names the service in the error of a peer that does not offer it.
    pub(super) fn asked_for(mut self, service: Service) -> Self {
        self.service = Some(service);
        self
    }

    pub(super) fn stop(&mut self, reason: StreamEnd) {
        self.stream.stop(reason.code()).ok();
    }

    pub(super) async fn next_within(&mut self, payload_max: u64) -> Result<Option<Frame>, DataError> {
        self.next_kind(KIND_DATA, payload_max).await
    }

    pub(super) async fn next_kind(&mut self, kind: u8, payload_max: u64) -> Result<Option<Frame>, DataError> {
        let Some(frame) = self.next_front(kind, payload_max).await? else {
            return Ok(None);
        };
        // It is within `payload_max`, and memory is taken only as bytes arrive.
        let payload_bytes = usize::try_from(frame.payload_bytes()).unwrap_or(usize::MAX);
        while self.payload.len() < payload_bytes {
            let bytes = self.read(payload_bytes - self.payload.len()).await?;
            if self.payload.is_empty() {
                self.payload.reserve(payload_bytes.min(1 << 20));
            }
            self.payload.extend_from_slice(&bytes);
        }
        Ok(Some((self.take_header(), std::mem::take(&mut self.payload).freeze())))
    }

    /// The first frame of a stream, whose payload is put together as it comes, in any order. Not to be called after
    /// [`FrameReceiver::next`]; not safe to drop. `progress` hears how many bytes came.
    pub(super) async fn only(
        &mut self,
        payload_max: u64,
        mut progress: impl FnMut(usize),
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>, DataError> {
        let Some(frame) = self.next_front(KIND_DATA, payload_max).await? else {
            return Ok(None);
        };
        let payload_bytes = usize::try_from(frame.payload_bytes()).unwrap_or(usize::MAX);
        let base = (FRAME_BYTES + frame.header_bytes()) as u64;
        let mut payload = vec![0; payload_bytes];
        let mut filled = 0;
        while filled < payload_bytes {
            let started = Instant::now();
            let patience = self.patience();
            let read = self.stream.read_chunk(payload_bytes - filled, false);
            let chunk = match timeout(patience, read).await {
                Ok(chunk) => chunk.map_err(|error| unreadable(self.peer, error))?,
                Err(_) => return Err(self.stalled()),
            };
            self.waited += started.elapsed();
            let Some(chunk) = chunk else {
                return Err(self.malformed("half a frame"));
            };
            let start = chunk
                .offset
                .checked_sub(base)
                .and_then(|start| usize::try_from(start).ok());
            let place = start.and_then(|start| payload.get_mut(start..start.checked_add(chunk.bytes.len())?));
            let Some(place) = place else {
                return Err(self.malformed("more than its frame announced"));
            };
            place.copy_from_slice(&chunk.bytes);
            filled += chunk.bytes.len();
            self.counter.add_received(chunk.bytes.len());
            progress(chunk.bytes.len());
        }
        Ok(Some((self.take_header(), payload)))
    }

    /// Reads up to the end of the header.
    async fn next_front(&mut self, kind: u8, payload_max: u64) -> Result<Option<FrameHeader>, DataError> {
        while self.front.len() < FRAME_BYTES {
            if self.front.is_empty() {
                // Nothing is owed between frames, so there is no deadline.
                match self.stream.read_chunk(FRAME_BYTES, true).await {
                    Ok(Some(chunk)) => {
                        self.counter.add_received(chunk.bytes.len());
                        self.front.extend_from_slice(&chunk.bytes);
                    }
                    Ok(None) => return Ok(None),
                    Err(error) => return Err(self.refused_or(unreadable(self.peer, error))),
                }
            } else {
                let bytes = self.read(FRAME_BYTES - self.front.len()).await?;
                self.front.extend_from_slice(&bytes);
            }
        }
        let frame = match self.frame {
            Some(frame) => frame,
            None => {
                let frame = self.parse_front(kind, payload_max)?;
                self.frame = Some(frame);
                frame
            }
        };
        while self.header.len() < frame.header_bytes() {
            let bytes = self.read(frame.header_bytes() - self.header.len()).await?;
            self.header.extend_from_slice(&bytes);
        }
        Ok(Some(frame))
    }

    fn parse_front(&self, kind: u8, payload_max: u64) -> Result<FrameHeader, DataError> {
        let Ok(front) = <&[u8; FRAME_BYTES]>::try_from(self.front.as_slice()) else {
            return Err(self.malformed("half a frame"));
        };
        let frame = FrameHeader::from_bytes(front).map_err(|error| self.malformed(&error.to_string()))?;
        if frame.kind != kind {
            return Err(self.malformed(&format!("a frame of kind {} where {kind} belongs", frame.kind)));
        }
        if frame.payload_bytes() > payload_max {
            let bytes = frame.payload_bytes();
            return Err(self.malformed(&format!(
                "a payload of {bytes} bytes, at most {payload_max} are allowed"
            )));
        }
        Ok(frame)
    }

    /// At least one and at most `bytes_max` bytes in the middle of a frame. Safe to drop.
    async fn read(&mut self, bytes_max: usize) -> Result<Bytes, DataError> {
        let started = Instant::now();
        let read = timeout(self.patience(), self.stream.read_chunk(bytes_max, true)).await;
        self.waited += started.elapsed();
        match read {
            Ok(Ok(Some(chunk))) => {
                self.counter.add_received(chunk.bytes.len());
                Ok(chunk.bytes)
            }
            Ok(Ok(None)) => Err(self.malformed("half a frame")),
            Ok(Err(error)) => Err(unreadable(self.peer, error)),
            Err(_) => Err(self.stalled()),
        }
    }

    /// How much longer this frame may be waited for.
    fn patience(&self) -> Duration {
        let bytes = self.frame.map_or(0, |frame| frame.payload_bytes());
        let allowed = self.stall_max + Duration::from_secs(bytes / FRAME_BYTES_PER_SECOND_MIN);
        allowed.saturating_sub(self.waited)
    }

    fn take_header(&mut self) -> Vec<u8> {
        self.front.clear();
        self.frame = None;
        self.waited = Duration::ZERO;
        std::mem::take(&mut self.header)
    }

    fn stalled(&mut self) -> DataError {
        self.stop(StreamEnd::Stalled);
        DataError::Stalled {
            peer: self.peer,
            what: "to send one frame",
            after: self.stall_max,
        }
    }

    fn malformed(&self, what: &str) -> DataError {
        DataError::Malformed {
            peer: self.peer,
            what: what.to_owned(),
        }
    }

    /// Names the service where the peer says that it does not offer it.
    fn refused_or(&self, error: DataError) -> DataError {
        match (error, self.service) {
            (
                DataError::BrokenOff {
                    peer,
                    reason: StreamEnd::NotServed,
                },
                Some(service),
            ) => DataError::NotServed { peer, service },
            (error, _) => error,
        }
    }
}
