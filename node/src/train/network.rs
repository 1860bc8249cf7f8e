//! The two planes, as training uses them: messages over the control plane, streams between stages over the data plane.

use futures::FutureExt;
use futures::future::BoxFuture;
use polder_protocol::hash::NodeId;
use polder_protocol::round::RunMessage;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::TrainHandle;
use super::real::Stream;
use super::world::{Link, Network};
use crate::control::{ControlError, ControlHandle, PeerEvent, Service as ControlService};
use crate::data::{Class, DataPlane, Service};

/// The topic of messages about runs. One for all runs of a federation: that is how nodes hear of new ones.
pub const TOPIC: &str = "polder/runs";

/// Peers that are told one by one when gossip cannot carry a message. The others hear of it at the next head.
const TOLD_MAX: usize = 64;

/// Both planes.
#[derive(Debug, Clone)]
pub struct Planes {
    control: ControlHandle,
    data: DataPlane,
}

impl Planes {
    /// Speaks over these.
    pub fn new(control: ControlHandle, data: DataPlane) -> Self {
        Self { control, data }
    }

    /// Hands what comes over the planes to `train`, until `stop`.
    pub fn listen(&self, train: TrainHandle, stop: CancellationToken) -> JoinHandle<()> {
        let mut requests = self.control.register(ControlService::Run);
        let mut gossip = self.control.subscribe(TOPIC);
        let mut events = self.control.events();
        let mut streams = self.data.serve(Service::Replica);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    Some(request) = requests.recv() => {
                        if let Some(from) = &request.admitted {
                            train.heard(from, &request.body);
                        }
                        // Taken; what comes of it is a message of its own.
                        let _ = request.reply.send(Vec::new());
                    }
                    Some(message) = gossip.recv() => train.heard(&message.admitted, &message.bytes),
                    Some(opened) = streams.recv() => {
                        let link = Stream { sender: opened.sender, receiver: opened.receiver };
                        train.stream_opened(opened.peer.node, &opened.header, Box::new(link));
                    }
                    event = events.recv() => match event {
                        Ok(PeerEvent::Joined(peer)) => train.peer_found(peer.node),
                        Ok(PeerEvent::Left { node, .. }) => train.peer_lost(node),
                        Ok(_) => {}
                        // A lost peer that is not noticed here is noticed when its lease ends.
                        Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                        Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                    },
                    else => return,
                }
            }
        })
    }
}

impl Network for Planes {
    fn send(&self, to: NodeId, message: RunMessage) {
        let control = self.control.clone();
        tokio::spawn(async move {
            if let Err(error) = control.request(to, ControlService::Run, message.to_bytes()).await {
                debug!(peer = %to.short(), %error, "message about a run is lost");
            }
        });
    }

    fn broadcast(&self, message: RunMessage) {
        let control = self.control.clone();
        tokio::spawn(async move {
            let bytes = message.to_bytes();
            match control.publish(TOPIC, bytes.clone()).await {
                Ok(()) => return,
                // Nobody listens yet in a mesh that is being formed, and large entries do not fit gossip.
                Err(ControlError::NobodyListens { .. } | ControlError::TooLong { .. }) => {}
                Err(error) => debug!(%error, "gossip about a run failed"),
            }
            let tell = control.present().into_iter().take(TOLD_MAX).map(|peer| {
                let (control, bytes) = (control.clone(), bytes.clone());
                async move { control.request(peer.node, ControlService::Run, bytes).await }
            });
            for told in futures::future::join_all(tell).await {
                if let Err(error) = told {
                    debug!(%error, "message about a run is lost");
                }
            }
        });
    }

    fn open(&self, to: NodeId, opening: Vec<u8>) -> BoxFuture<'_, Result<Box<dyn Link>, String>> {
        async move {
            let opened = self.data.open(to, Class::Act, Service::Replica, opening).await;
            let (sender, receiver) = opened.map_err(|error| error.to_string())?;
            let link: Box<dyn Link> = Box::new(Stream { sender, receiver });
            Ok(link)
        }
        .boxed()
    }

    fn traffic(&self) -> (u64, u64) {
        (self.data.bytes_sent(None), self.data.bytes_received(None))
    }
}
