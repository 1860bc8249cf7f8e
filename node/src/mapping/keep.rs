//! Keeps ports open: asks when the node starts and when the network changes, renews, tells, and closes at the end.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::router::{self, Place, Router};
use super::{Carries, Mapping, Opened, Port};
use crate::control::{ControlHandle, is_public};
use crate::data::DataPlane;
use crate::punch::Puncher;

/// How often it is looked whether the network has changed. Nothing is sent for it.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// How often ports are asked for again. A router that was switched off and on has forgotten them, and says nothing.
const RENEW_EVERY: Duration = Duration::from_secs(300);

/// When a router that refused or did not answer is asked again: somebody may have changed its settings.
const ASK_AGAIN: Duration = Duration::from_secs(600);

/// What closing may take when the node stops.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(2);

/// Ports that are kept open.
#[derive(Debug)]
pub struct Mapper {
    state: watch::Receiver<Mapping>,
    task: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Mapper {
    /// What has become of it until now.
    pub fn mapping(&self) -> Mapping {
        self.state.borrow().clone()
    }

    /// Waits until the ports are closed, after the `stop` that [`start`] was given.
    pub async fn closed(&self) {
        if let Some(task) = self.task.lock().await.take() {
            // It ends by itself, and a panic in it has been printed.
            let _ = tokio::time::timeout(CLOSE_TIME_MAX, task).await;
        }
    }
}

/// Keeps the ports of both planes open where `wanted`, until `stop`.
pub fn start(
    wanted: bool,
    control: ControlHandle,
    data: DataPlane,
    puncher: Arc<Puncher>,
    stop: CancellationToken,
) -> Mapper {
    let first = if wanted { Mapping::Asking } else { Mapping::Off };
    let (sender, state) = watch::channel(first);
    let keeper = Keeper {
        control,
        data,
        puncher,
        state: sender,
        held: None,
    };
    let task = wanted.then(|| tokio::spawn(keeper.run(stop)));
    Mapper {
        state,
        task: tokio::sync::Mutex::new(task),
    }
}

struct Keeper {
    control: ControlHandle,
    data: DataPlane,
    puncher: Arc<Puncher>,
    state: watch::Sender<Mapping>,
    held: Option<(Router, Vec<Opened>)>,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) {
        let mut seen: Option<(Option<Place>, Vec<Port>)> = None;
        let mut due = Instant::now();
        loop {
            let now = (self.place().await, self.ports());
            let changed = seen.as_ref() != Some(&now);
            if changed || Instant::now() >= due {
                if changed {
                    // What was open before another router is out of reach, and ends with its lease.
                    self.held = None;
                }
                let asked = async {
                    match now.0 {
                        Some(place) if !now.1.is_empty() => self.ask(place, &now.1).await,
                        _ => Mapping::NotNeeded,
                    }
                };
                let mapping = tokio::select! {
                    () = stop.cancelled() => break,
                    mapping = asked => mapping,
                };
                let pause = if mapping.opened().is_empty() {
                    ASK_AGAIN
                } else {
                    RENEW_EVERY
                };
                due = Instant::now() + pause;
                self.tell(mapping).await;
                seen = Some(now);
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        self.close().await;
    }

    /// Where this machine stands, if a router may stand before it.
    async fn place(&self) -> Option<Place> {
        let own = self.control.own_ips();
        if own.iter().any(|ip| ip.is_ipv4() && is_public(*ip)) {
            return None;
        }
        let place = router::place().await?;
        own.contains(&IpAddr::V4(place.own)).then_some(place)
    }

    /// The ports of both planes, each once.
    fn ports(&self) -> Vec<Port> {
        let control = self.control.own_ports();
        let data = Port {
            carries: Carries::Udp,
            number: self.data.local_address().port(),
        };
        let mut ports: Vec<Port> = control.into_iter().chain([data]).collect();
        ports.sort();
        ports.dedup();
        ports
    }

    async fn ask(&mut self, place: Place, ports: &[Port]) -> Mapping {
        let failed = |reason: String| Mapping::Closed { reason };
        // One that goes on is asked again in the same words; one that has started anew may have another address.
        if let Some((router, opened)) = &self.held
            && !opened.is_empty()
            && renew(router, opened).await
        {
            return open(router, place, opened.clone());
        }
        let router = match router::find(place).await {
            Ok(router) => router,
            Err(reason) => return failed(reason),
        };
        if let Some(external) = router.external()
            && !is_public(external.into())
        {
            return failed(behind_another(external));
        }
        // Written down one by one: this may be dropped halfway, and what is open is to be closed.
        let (router, opened) = self.held.insert((router, Vec::new()));
        let mut refused = String::from("the router opened nothing");
        for port in ports {
            match router.open(*port).await {
                Ok(one) if !is_public(one.external.ip()) => {
                    refused = behind_another(one.external.ip());
                    let _ = router.close(one).await;
                }
                Ok(one) => opened.push(one),
                Err(reason) => {
                    tracing::debug!(?port, reason, "the router does not open a port");
                    refused = reason;
                }
            }
        }
        if opened.is_empty() {
            return failed(refused);
        }
        open(router, place, opened.clone())
    }

    /// Tells the members, where something has changed.
    async fn tell(&self, mapping: Mapping) {
        if *self.state.borrow() == mapping {
            return;
        }
        match &mapping {
            Mapping::Open { language, opened, .. } => {
                let places: Vec<String> = opened.iter().map(|one| one.external.to_string()).collect();
                tracing::info!(language = language.name(), ?places, "the router has opened ports");
            }
            Mapping::Closed { reason } => tracing::info!(reason, "the router opens no ports"),
            Mapping::Off | Mapping::NotNeeded | Mapping::Asking => {}
        }
        let data_port = self.data.local_address().port();
        let is_data = |one: &&Opened| one.port.carries == Carries::Udp && one.port.number == data_port;
        let data: Vec<SocketAddr> = mapping
            .opened()
            .iter()
            .filter(is_data)
            .map(|one| one.external)
            .collect();
        let control = mapping.opened().iter().filter(|one| !is_data(one)).copied().collect();
        self.control.set_mapped(control).await;
        self.puncher.set_mapped(data);
        self.state.send_replace(mapping);
    }

    async fn close(self) {
        let Some((router, opened)) = self.held else { return };
        for one in opened {
            if let Err(reason) = router.close(one).await {
                tracing::debug!(reason, "a port stays open until its lease ends");
            }
        }
    }
}

/// Asks for more time; says whether everything is as it was.
async fn renew(router: &Router, opened: &[Opened]) -> bool {
    for one in opened {
        if router.open(one.port).await.as_ref() != Ok(one) {
            return false;
        }
    }
    true
}

fn open(router: &Router, place: Place, opened: Vec<Opened>) -> Mapping {
    Mapping::Open {
        language: router.language(),
        router: place.router,
        opened,
    }
}

fn behind_another(external: impl Into<IpAddr>) -> String {
    let external: IpAddr = external.into();
    format!("the router's own address outside is {external}: another router stands before it")
}
