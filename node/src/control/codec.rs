//! Requests and answers on a stream: a length (u32, little-endian), then a message of `protocol::wire`.

use std::io;

use futures::prelude::*;
use libp2p::StreamProtocol;
use libp2p::request_response;
use polder_protocol::wire::{self, Message, Reply, Request};

/// The name of the protocol; its number changes only when the framing does.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/polder/control/1");

/// Reads and writes one message, and takes no more memory than has arrived.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Codec;

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = Request;
    type Response = Reply;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Request>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Reply>
    where
        T: AsyncRead + Unpin + Send,
    {
        read(io).await
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, request: Request) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &request).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, reply: Reply) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        write(io, &reply).await
    }
}

async fn read<M: Message>(io: &mut (impl AsyncRead + Unpin + Send)) -> io::Result<M> {
    let mut len = [0; 4];
    io.read_exact(&mut len).await?;
    let len = u64::from(u32::from_le_bytes(len));
    let limit = u64::try_from(M::BYTES_MAX).unwrap_or(u64::MAX);
    if len > limit {
        let error = wire::DecodeError::TooLong {
            len_bytes: len,
            limit_bytes: limit,
        };
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    let mut bytes = Vec::new();
    io.take(len).read_to_end(&mut bytes).await?;
    wire::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

async fn write<M: Message>(io: &mut (impl AsyncWrite + Unpin + Send), message: &M) -> io::Result<()> {
    let bytes = wire::encode(message);
    let len = u32::try_from(bytes.len()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    io.write_all(&len.to_le_bytes()).await?;
    io.write_all(&bytes).await?;
    io.close().await
}

/// A request, then an answer, as they come on streams; as fuzz targets see them.
pub(super) fn untrusted(bytes: &[u8]) {
    let mut stream = futures::io::Cursor::new(bytes);
    if let Ok(request) = futures::executor::block_on(read::<Request>(&mut stream)) {
        again(&request);
    }
    stream.set_position(0);
    if let Ok(reply) = futures::executor::block_on(read::<Reply>(&mut stream)) {
        again(&reply);
    }
}

/// What was read is written and read alike.
fn again<M: Message + PartialEq>(message: &M) {
    let mut stream = futures::io::Cursor::new(Vec::new());
    futures::executor::block_on(write(&mut stream, message)).expect("memory takes it");
    stream.set_position(0);
    let read = futures::executor::block_on(read::<M>(&mut stream));
    assert!(read.is_ok_and(|read| read == *message));
}

/// Where its fuzzing begins.
pub(super) fn honest() -> Vec<Vec<u8>> {
    let request = Request {
        service: wire::Service::Directory,
        body: vec![3; 20],
    };
    let framed = |message: Vec<u8>| {
        let length = u32::try_from(message.len()).unwrap_or_default().to_le_bytes();
        [length.as_slice(), message.as_slice()].concat()
    };
    vec![
        framed(wire::encode(&request)),
        framed(wire::encode(&Reply::Done(vec![9; 9]))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use futures::io::Cursor;
    use polder_protocol::wire::Service;

    #[test]
    fn a_request_survives_the_stream() {
        let request = Request {
            service: Service::Run,
            body: vec![3; 1000],
        };
        let mut stream = Cursor::new(Vec::new());
        block_on(write(&mut stream, &request)).expect("written");
        stream.set_position(0);
        assert_eq!(block_on(read::<Request>(&mut stream)).expect("read"), request);
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_is_read() {
        let mut stream = Cursor::new(vec![0xff; 64]);
        let error = block_on(read::<Request>(&mut stream)).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(stream.position(), 4);
    }
}
