//! Streams of a session: over the data plane to others, over a channel to a stage on this very node.

use bytes::Bytes;
use polder_protocol::hash::NodeId;
use polder_protocol::session::{Opening, encode};
use tokio::sync::mpsc;

use crate::data::{Class, DataPlane, FrameReceiver, FrameSender, Service};

/// Frames under way on a stream within this node.
const FRAMES_HERE_MAX: usize = 64;

/// Streams within this node that wait to be accepted.
const INCOMING_HERE_MAX: usize = 64;

pub(super) type Frame = (Vec<u8>, Bytes);

#[derive(Debug)]
pub(super) enum Sender {
    Wire(FrameSender),
    Here(mpsc::Sender<Frame>),
}

#[derive(Debug)]
pub(super) enum Receiver {
    Wire(Box<FrameReceiver>),
    Here(mpsc::Receiver<Frame>),
}

/// A stream that somebody opened.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) peer: NodeId,
    pub(super) header: Vec<u8>,
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
}

/// Opens streams, wherever the other end is.
#[derive(Debug)]
pub(super) struct Streams {
    data: DataPlane,
    here: mpsc::Sender<Incoming>,
}

impl Streams {
    pub(super) fn new(data: DataPlane) -> (Self, mpsc::Receiver<Incoming>) {
        let (here, incoming) = mpsc::channel(INCOMING_HERE_MAX);
        (Self { data, here }, incoming)
    }

    /// Opens a stream. The error is for people.
    pub(super) async fn open(&self, peer: NodeId, opening: &Opening) -> Result<(Sender, Receiver), String> {
        let header = encode(opening);
        if peer != self.data.node() {
            let opened = self.data.open(peer, Class::Act, Service::Session, header).await;
            let (sender, receiver) = opened.map_err(|error| error.to_string())?;
            return Ok((Sender::Wire(sender), Receiver::Wire(Box::new(receiver))));
        }
        let (sender, there_receives) = mpsc::channel(FRAMES_HERE_MAX);
        let (there_sends, receiver) = mpsc::channel(FRAMES_HERE_MAX);
        let incoming = Incoming {
            peer,
            header,
            sender: Sender::Here(there_sends),
            receiver: Receiver::Here(there_receives),
        };
        let sent = self.here.send(incoming).await;
        sent.map_err(|_| "this node serves no longer".to_owned())?;
        Ok((Sender::Here(sender), Receiver::Here(receiver)))
    }
}

impl Sender {
    /// Sends one frame. Not to be dropped halfway. The error is for people.
    pub(super) async fn send(&mut self, header: Vec<u8>, payload: Bytes) -> Result<(), String> {
        match self {
            Self::Wire(sender) => sender.send(&header, payload).await.map_err(|error| error.to_string()),
            Self::Here(sender) => sender
                .send((header, payload))
                .await
                .map_err(|_| "the stream ended".to_owned()),
        }
    }
}

impl Receiver {
    /// The next frame; `None` after the last. Safe to drop. The error is for people.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, String> {
        match self {
            Self::Wire(receiver) => receiver.next().await.map_err(|error| error.to_string()),
            Self::Here(receiver) => Ok(receiver.recv().await),
        }
    }
}
