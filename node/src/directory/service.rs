//! The tasks behind the handle: announce, hear, answer, ask.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polder_protocol::charter::Capabilities;
use polder_protocol::directory::{Announcement, Change, Page, PageRequest, Verdict, repeat_seconds};
use polder_protocol::hash::NodeId;
use polder_protocol::identity::Signed;
use polder_protocol::wire;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::time::{Instant, MissedTickBehavior};

use super::{Inner, unix_now};
use crate::control::{ControlHandle, Gossip, Incoming, PeerEvent, Service};

/// How often the first few peers of a while are asked for pages.
const REPEAT: Duration = Duration::from_secs(30);

/// Changes in quick succession, such as a session that opens and closes, are told together.
const PAUSE: Duration = Duration::from_millis(500);

/// While nobody listens, as in the first seconds of a connection, it is tried again so soon.
const UNHEARD: Duration = Duration::from_secs(2);

/// Peers that are asked for pages at once.
const ASKED_MAX: usize = 4;

/// Of more peers that are met in one [`REPEAT`], gossip tells soon enough: gateways, which keep the directory, and others,
/// each of which asks as well when it comes.
const GATEWAYS_ASKED_PER_REPEAT_MAX: usize = 8;
/// See [`GATEWAYS_ASKED_PER_REPEAT_MAX`].
const OTHERS_ASKED_PER_REPEAT_MAX: usize = 3;

/// In a directory of more nodes than this, whole snapshots are large: two that agree are enough.
const LARGE: usize = 256;

/// Pages that are taken from one peer.
const PAGES_MAX: usize = 64;

pub(super) fn spawn(inner: &Arc<Inner>) {
    // Everything is registered before the first task runs, so nothing that happens after `start` is missed.
    let gossip = inner.control.subscribe(&inner.topic());
    let asked = inner.control.register(Service::Directory);
    let events = inner.control.events();
    tokio::spawn(until_stopped(inner.clone(), announce(inner.clone())));
    tokio::spawn(until_stopped(inner.clone(), hear(inner.clone(), gossip)));
    tokio::spawn(until_stopped(inner.clone(), answer(inner.clone(), asked)));
    tokio::spawn(until_stopped(inner.clone(), meet(inner.clone(), events)));
}

async fn until_stopped(inner: Arc<Inner>, work: impl Future<Output = ()>) {
    tokio::select! {
        () = inner.stop.cancelled() => {}
        () = work => {}
    }
}

/// Repeats this node's announcement, and drops what has expired.
async fn announce(inner: Arc<Inner>) {
    let mut expiry = tokio::time::interval(Duration::from_secs(1));
    expiry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next) => {
                let heard = inner.publish().await;
                let repeat = Duration::from_secs(repeat_seconds(inner.lock().directory.len()));
                next = Instant::now() + if heard { with_jitter(repeat) } else { UNHEARD };
            }
            () = inner.announce.notified() => next = next.min(Instant::now() + PAUSE),
            _ = expiry.tick() => {
                let changed = inner.lock().directory.expire(unix_now());
                if changed {
                    inner.tell();
                }
            }
        }
    }
}

/// `span`, up to a fifth shorter or longer, so that nodes do not speak in chorus.
fn with_jitter(span: Duration) -> Duration {
    let mut byte = [128];
    // Without random numbers the nodes speak in chorus, which is loud and not wrong.
    let _ = getrandom::fill(&mut byte);
    let [byte] = byte;
    span.mul_f32(0.8 + 0.4 * f32::from(byte) / 255.0)
}

async fn hear(inner: Arc<Inner>, mut gossip: mpsc::Receiver<Gossip>) {
    while let Some(message) = gossip.recv().await {
        let from = message.from;
        match Signed::from_bytes(&message.bytes) {
            // Gossip is for one's own words; those of others are asked for in pages.
            Ok(signed) if signed.by() == from.0 => {
                let expires = signed.open().map(|told: Announcement| told.expires);
                match (inner.insert(signed), expires) {
                    (Ok(Change::Offers | Change::Renewed), Ok(expires)) => inner.lock().note_clock(from, expires),
                    (Ok(_), _) => {}
                    (Err(error), _) => tracing::debug!(%from, %error, "an announcement is not kept"),
                }
            }
            Ok(_) => tracing::debug!(%from, "an announcement of another is not kept"),
            Err(error) => tracing::debug!(%from, %error, "an announcement is malformed"),
        }
    }
}

async fn answer(inner: Arc<Inner>, mut asked: mpsc::Receiver<Incoming>) {
    while let Some(incoming) = asked.recv().await {
        let Ok(request) = wire::decode::<PageRequest>(&incoming.body) else {
            tracing::debug!(from = %incoming.from, "a request for the directory is malformed");
            continue;
        };
        let page = inner.lock().directory.page(request);
        // The asker may have gone.
        let _ = incoming.reply.send(wire::encode(&page));
    }
}

/// Asks those who come, and forgets those who leave.
async fn meet(inner: Arc<Inner>, mut events: broadcast::Receiver<PeerEvent>) {
    let places = Arc::new(Semaphore::new(ASKED_MAX));
    let mut since = Instant::now();
    let (mut gateways_asked, mut others_asked) = (0, 0);
    // Whether two of those that were asked in this while told the same.
    let agreed = Arc::new(AtomicBool::new(false));
    // Whoever was met before the events began.
    let mut waiting: Vec<NodeId> = inner.control.present().iter().map(|peer| peer.node).collect();
    loop {
        for node in waiting.drain(..) {
            if since.elapsed() >= REPEAT {
                since = Instant::now();
                (gateways_asked, others_asked) = (0, 0);
                agreed.store(false, Ordering::Relaxed);
            }
            let enough = agreed.load(Ordering::Relaxed) && inner.lock().directory.len() > LARGE;
            let (asked, most) = match keeps(&inner.control, node) {
                true => (&mut gateways_asked, GATEWAYS_ASKED_PER_REPEAT_MAX),
                false => (&mut others_asked, OTHERS_ASKED_PER_REPEAT_MAX),
            };
            if *asked < most && !enough {
                *asked += 1;
                let agreed = agreed.clone();
                let (inner, places) = (inner.clone(), places.clone());
                tokio::spawn(async move {
                    // The semaphore is never closed.
                    let _place = places.acquire().await;
                    let asking = async {
                        if ask(&inner, node).await == Verdict::Agreed {
                            agreed.store(true, Ordering::Relaxed);
                        }
                    };
                    until_stopped(inner.clone(), asking).await;
                });
            }
        }
        match events.recv().await {
            Ok(PeerEvent::Joined(record)) => waiting.push(record.node),
            Ok(PeerEvent::Left { node, .. }) => {
                let changed = {
                    let mut state = inner.lock();
                    state.snapshots.forget(node);
                    state.directory.forget(node)
                };
                if changed {
                    inner.tell();
                }
            }
            Ok(PeerEvent::Moved { .. } | PeerEvent::Refused { .. } | PeerEvent::RefusedBy { .. }) => {}
            // Who left unnoticed expires; who came unnoticed is asked now.
            Err(broadcast::error::RecvError::Lagged(_)) => {
                waiting.extend(inner.control.present().iter().map(|peer| peer.node));
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Takes over what `node` knows, and holds it against what others told.
async fn ask(inner: &Inner, node: NodeId) -> Verdict {
    let mut told = BTreeSet::new();
    let mut request = PageRequest::default();
    for _ in 0..PAGES_MAX {
        let page = match page_of(&inner.control, node, request).await {
            Ok(page) => page,
            Err(reason) => {
                tracing::debug!(%node, reason, "the directory of a peer cannot be had");
                return Verdict::Alone;
            }
        };
        for bytes in page.announcements {
            let signed = Signed::from_bytes(&bytes);
            let by = signed.as_ref().ok().map(|signed| NodeId(signed.by()));
            let kept = signed.map(|signed| inner.insert(signed));
            if matches!(kept, Ok(Ok(_))) {
                told.extend(by);
            }
            if !matches!(kept, Ok(Ok(_))) {
                tracing::debug!(%node, ?kept, "an announcement is not kept");
            }
            // Each costs a signature; others may have something to do.
            tokio::task::yield_now().await;
        }
        // A peer whose pages do not go on has no more.
        if page.next <= request.after {
            break;
        }
        request.after = page.next;
    }
    if !keeps(&inner.control, node) {
        return Verdict::Alone;
    }
    let verdict = inner.lock().snapshots.take(node, told);
    if let Verdict::Withholds { by, missing } = &verdict {
        tracing::warn!(gateway = %by, missing, "a member leaves many nodes out of its directory");
        inner.lock().snapshots.forget(*by);
    }
    verdict
}

/// Whether `node` keeps the whole directory, as gateways do; others may have come just now.
fn keeps(control: &ControlHandle, node: NodeId) -> bool {
    let record = control.peer(node);
    record.is_some_and(|record| Capabilities(record.capabilities).has(Capabilities::DIRECTORY))
}

async fn page_of(control: &ControlHandle, node: NodeId, request: PageRequest) -> Result<Page, String> {
    let answer = control.request(node, Service::Directory, wire::encode(&request)).await;
    let bytes = answer.map_err(|error| error.to_string())?;
    wire::decode(&bytes).map_err(|error| error.to_string())
}
