//! Start, stop, configuration: the one place that wires everything together.

mod acquaintances;
mod addresses;
mod admin;
mod ahead;
mod caps;
mod config;
mod doctor;
mod local;
mod membership;
mod models;
mod network;
mod probe;
mod rates;
mod status;
pub(crate) mod untrusted;

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use polder_protocol::charter::Capabilities;
use polder_protocol::hash::{NodeId, hex};
use polder_protocol::identity::KeyPair;
use polder_protocol::invite::Invite;
use polder_protocol::policy::Verdict;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use ahead::{Target, examine_ahead};
pub use caps::{CapClock, CapWindow, Caps, CapsStatus};
pub use config::{Config, ConfigError, member_at};
pub use doctor::{Finding, Health};
pub use local::LocalApi;
pub use probe::{BulkReport, EchoReport, EchoRequest};
pub use status::{
    DataPathStatus, DeviceStatus, FederationStatus, ModelStatus, PeerStatus, RefusalStatus, Status, TrafficStatus,
};

use crate::contribute::{self, ContributeHandle};
use crate::control::{self, ControlConfig, ControlError, ControlHandle, ProxyError};
use crate::data::{BlobError, BlobStore, DataConfig, DataError, DataPlane};
use crate::device::{Device, Process};
use crate::directory::{self, DirectoryHandle};
use crate::enrol::EnrolError;
use crate::gate::{AddressBook, Gate};
use crate::home::{Home, HomeError, HomeLock, KnownPeer, random_32};
use crate::mapping::{self, Mapper};
use crate::members::{Members, MembersError, unix_now};
use crate::punch;
use crate::serve::{self, ServeConfig, ServeHandle};
use crate::store::{DiskStore, StoreError};
use crate::train::{self, TrainConfig, TrainError, TrainHandle};
use acquaintances::Acquaintances;
use caps::Schedule;
use network::{LateBook, hang_up_on_the_lost};

/// What parts of the node get to finish in when it stops.
const STOP_TIME_MAX: Duration = Duration::from_secs(4);

/// How often the peers that are present are kept for the next start.
const REMEMBER_EVERY: Duration = Duration::from_secs(30);

/// Why a node does not run.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum DaemonError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Members(#[from] MembersError),
    #[error("this node cannot be enrolled")]
    Enrol(#[source] Box<EnrolError>),
    #[error("no gateway of the invite let this node in")]
    Door { source: ControlError },
    #[error("the invite names no gateway")]
    NoDoor,
    #[error("the control plane does not start")]
    Control(#[source] ControlError),
    #[error("the data plane does not start")]
    Data(#[from] DataError),
    #[error("the store of blobs cannot be used")]
    Blobs(#[from] BlobError),
    #[error("the index cannot be used")]
    Index(#[from] StoreError),
    #[error("training does not start")]
    Train(#[from] TrainError),
    #[error("the local interface cannot listen on {address}: {source}")]
    Api { address: SocketAddr, source: io::Error },
    #[error("`contribute.windows` in config.toml is not understood")]
    Window(#[from] polder_protocol::policy::WindowError),
    #[error("`when` of `cap_windows` in config.toml is not understood")]
    CapWindow(#[source] polder_protocol::policy::WindowError),
    #[error("`{entry}` of `bootstrap` in config.toml is no member; write `NODE@/dns4/gateway.example.org/tcp/4001`")]
    Bootstrap { entry: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("`proxy` in config.toml is not understood")]
    Proxy(#[from] ProxyError),
    #[error("cannot {what}")]
    System { what: &'static str, source: io::Error },
}

/// A node that runs.
pub struct Daemon {
    home: Home,
    _lock: HomeLock,
    shared: Arc<Shared>,
    started: Started,
}

/// What a person wants to read when a node has started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The node's id.
    pub node: String,
    /// What the federation is called.
    pub federation: String,
    /// What the institution is called.
    pub institution: String,
    /// The local interface.
    pub api: SocketAddr,
    /// Where the control plane listens.
    pub control: Vec<String>,
    /// Where the data plane listens.
    pub data: SocketAddr,
}

/// What the local interface and the daemon's tasks share.
pub(crate) struct Shared {
    pub(crate) began: Instant,
    pub(crate) home: Home,
    pub(crate) config: Config,
    pub(crate) members: Arc<Members>,
    pub(crate) refusals: Arc<membership::Refusals>,
    pub(crate) acquaintances: Acquaintances,
    pub(crate) control: ControlHandle,
    pub(crate) data: DataPlane,
    pub(crate) puncher: Arc<punch::Puncher>,
    pub(crate) mapper: Mapper,
    pub(crate) rates: Arc<rates::Rates>,
    pub(crate) caps: Schedule,
    pub(crate) device: Device,
    pub(crate) train: TrainHandle,
    pub(crate) directory: DirectoryHandle,
    pub(crate) serve: ServeHandle,
    pub(crate) contribute: ContributeHandle,
    pub(crate) working: tokio::sync::watch::Sender<Working>,
    pub(crate) stop: CancellationToken,
}

/// Whether this node works, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Working {
    Yes,
    No(String),
}

impl From<EnrolError> for DaemonError {
    fn from(error: EnrolError) -> Self {
        Self::Enrol(Box::new(error))
    }
}

impl Working {
    fn of(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::MayWork => Self::Yes,
            Verdict::MustYield(reason) => Self::No(reason.to_string()),
        }
    }
}

impl Daemon {
    /// Starts the node in `home`, enrolling it first where there is an `invite`. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`DaemonError`] says which part does not start, and why.
    pub async fn start(home: Home, config: Config, invite: Option<&Invite>) -> Result<Self, DaemonError> {
        let schedule = Schedule::new(&config).map_err(DaemonError::CapWindow)?;
        let lock = home.lock()?;
        let key = home.node_key()?;
        if let Some(invite) = invite {
            membership::enrol(&home, key.seed(), invite, &config).await?;
        }
        let members = Arc::new(Members::open(&home)?);
        let gate: Arc<dyn Gate> = Arc::clone(&members) as Arc<dyn Gate>;
        let blobs = BlobStore::open(home.root())?;
        let book = Arc::new(LateBook::default());
        let data = DataPlane::start(
            DataConfig {
                upload: schedule.now().upload(),
                ..DataConfig::new(key.seed(), SocketAddr::new(config.listen, config.data_port))
            },
            Arc::clone(&gate),
            Arc::clone(&book) as Arc<dyn AddressBook>,
            blobs,
        )?;
        let acquaintances = open_index(&home).await?;
        let listed = config.bootstrap().map_err(|entry| DaemonError::Bootstrap { entry })?;
        let bootstrap = membership::bootstrap(&home, &members, &acquaintances, listed)?;
        let control = start_control(&config, &key, &members, Arc::clone(&gate), &data, bootstrap).await?;
        // Set once, here.
        let _ = book.0.set(control.clone());
        let refusals = Arc::default();
        membership::keep(&home, &members, &control, &refusals);
        let device = start_device(&config)?;
        let planes = train::Planes::new(control.clone(), data.clone());
        let stop = CancellationToken::new();
        let (train, _) = train::start(
            TrainConfig {
                home: home.root().to_owned(),
                federation: members.federation(),
                institution: members.institution(),
                train: config.train && members.capabilities().has(Capabilities::TRAIN),
                blocks_max: config.blocks_max,
            },
            Arc::new(KeyPair::from_seed(&key.seed())),
            Arc::new(device.clone()),
            Arc::new(train::RunBlobs::new(data.clone(), home.root().join("runs"))),
            Arc::new(planes.clone()),
        )?;
        planes.listen(train.clone(), stop.clone());
        hang_up_on_the_lost(&control, &data);
        let puncher = punch::start(
            control.clone(),
            data.clone(),
            config.external_data.clone(),
            stop.clone(),
        );
        let mapper = mapping::start(
            config.map_ports,
            control.clone(),
            data.clone(),
            Arc::clone(&puncher),
            stop.clone(),
        );
        let directory = directory::start(
            control.clone(),
            KeyPair::from_seed(&key.seed()),
            members.federation(),
            gate,
        );
        let mut serving = ServeConfig::new(members.institution());
        serving.sessions_max = config.sessions_max;
        serving.context_tokens_max = config.context_tokens_max;
        let serve = serve::start(
            serving,
            Arc::new(directory.clone()),
            data.clone(),
            data.blobs().clone(),
            device.clone(),
        );
        let rates = rates::watch(data.clone(), stop.clone());
        let policy = contribute::policy(&config.contribute)?;
        let shared = Arc::new(Shared {
            began: Instant::now(),
            home: home.clone(),
            config,
            members,
            refusals,
            acquaintances,
            control,
            data,
            puncher,
            mapper,
            rates,
            caps: schedule,
            device,
            train,
            directory,
            serve,
            contribute: contribute::start(policy, false),
            working: tokio::sync::watch::Sender::new(Working::Yes),
            stop,
        });
        obey(&shared);
        caps::keep(&shared);
        addresses::keep(&shared);
        models::keep(&shared);
        let api = serve_api(&shared).await?;
        let started = shared.started(api)?;
        Ok(Self {
            home,
            _lock: lock,
            shared,
            started,
        })
    }

    /// What a person wants to read now.
    pub fn started(&self) -> &Started {
        &self.started
    }

    /// Runs until somebody asks it to stop over the local interface.
    pub async fn asked_to_stop(&self) {
        self.shared.stop.cancelled().await;
    }

    /// How many members are connected now.
    pub fn peers(&self) -> usize {
        self.shared.control.present().len()
    }

    /// Stops: finishes what is under way, tells the peers, gives the device back.
    pub async fn stop(self) {
        self.shared.stop.cancel();
        self.shared.acquaintances.remember(&self.shared.control, unix_now());
        let stopping = async {
            let planes = async {
                self.shared.serve.stop();
                self.shared.train.shutdown().await;
                self.shared.directory.shutdown().await;
                self.shared.control.clone().shutdown().await;
                self.shared.data.shutdown().await;
            };
            tokio::join!(self.shared.mapper.closed(), planes);
        };
        if tokio::time::timeout(STOP_TIME_MAX, stopping).await.is_err() {
            tracing::warn!("some of the node did not stop in time; everything that was acknowledged is on disk");
        }
        self.shared.device.kill();
        LocalApi::remove(self.home.root());
    }
}

impl Shared {
    fn started(&self, api: SocketAddr) -> Result<Started, DaemonError> {
        let own = KnownPeer {
            node: self.control.node().to_string(),
            control: self.control.listen_addresses(),
            data: vec![self.data.local_address()],
        };
        self.home.save_addresses(&own)?;
        Ok(Started {
            node: own.node,
            federation: self.members.federation_name(),
            institution: self.members.institution_name(),
            api,
            control: own.control,
            data: self.data.local_address(),
        })
    }
}

/// Opens what can be rebuilt. A damaged index is set aside and told of; the node starts with an empty one.
async fn open_index(home: &Home) -> Result<Acquaintances, DaemonError> {
    let path = home.index();
    let opened = tokio::task::spawn_blocking(move || DiskStore::open(&path)).await;
    let opened = match opened {
        Ok(opened) => opened?,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    };
    if let Some(aside) = opened.set_aside {
        tracing::warn!(path = %aside.path.display(), reason = aside.reason, "the index was damaged; a new one is begun");
    }
    Ok(Acquaintances::new(Arc::new(opened.store)))
}

async fn start_control(
    config: &Config,
    key: &KeyPair,
    members: &Members,
    gate: Arc<dyn Gate>,
    data: &DataPlane,
    bootstrap: Vec<(NodeId, Vec<String>)>,
) -> Result<ControlHandle, DaemonError> {
    let port = config.control_port;
    let mut plane = ControlConfig::loopback(key.seed());
    let every_interface = config.listen == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let mut hosts = match config.listen {
        IpAddr::V4(address) => vec![format!("/ip4/{address}")],
        // Whether there is IPv6 here was found out when the data plane was bound.
        IpAddr::V6(_) if every_interface && data.local_address().is_ipv4() => Vec::new(),
        IpAddr::V6(address) => vec![format!("/ip6/{address}")],
    };
    if every_interface {
        // libp2p's sockets speak one family each.
        hosts.push("/ip4/0.0.0.0".into());
    }
    let listen = hosts
        .iter()
        .flat_map(|host| [format!("{host}/tcp/{port}"), format!("{host}/udp/{port}/quic-v1")]);
    plane.listen = listen.chain(config.listen_also.iter().cloned()).collect();
    plane.proxy = config.proxy()?;
    plane.roots = config.roots()?;
    plane.external.clone_from(&config.external);
    plane.bootstrap = bootstrap;
    plane.mdns = config.mdns;
    plane.relay_server = members.capabilities().has(Capabilities::RELAY);
    plane.data_addresses = if config.external_data.is_empty() {
        vec![data.local_address()]
    } else {
        config.external_data.clone()
    };
    let (control, _) = control::start(plane, gate).await?;
    Ok(control)
}

fn start_device(config: &Config) -> Result<Device, DaemonError> {
    let program = Process::this_program().map_err(|source| DaemonError::System {
        what: "find this program",
        source,
    })?;
    let mut process = program.device(&config.device);
    if config.threads > 0 {
        process = process.threads(usize::try_from(config.threads).unwrap_or(usize::MAX));
    }
    Ok(Device::start(process))
}

/// Ends the worker when this node may not work, and starts it again when it may; keeps the peers now and then.
fn obey(shared: &Arc<Shared>) {
    let (decided, shared_) = (shared.working.subscribe(), Arc::clone(shared));
    let mut decided = decided;
    let mut verdicts = shared.contribute.decisions();
    shared.working.send_replace(Working::of(&verdicts.borrow_and_update()));
    tokio::spawn(async move {
        let mut remember = tokio::time::interval(REMEMBER_EVERY);
        loop {
            tokio::select! {
                changed = decided.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = decided.borrow_and_update().clone();
                    let works = now == Working::Yes;
                    if works { shared_.device.start_again() } else { shared_.device.kill() }
                    if let Err(error) = shared_.train.work(works).await {
                        tracing::debug!(%error, "training does not hear whether it may work");
                    }
                }
                changed = verdicts.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let verdict = *verdicts.borrow_and_update();
                    shared_.working.send_replace(Working::of(&verdict));
                }
                _ = remember.tick() => shared_.acquaintances.remember(&shared_.control, unix_now()),
                () = shared_.stop.cancelled() => return,
            }
        }
    });
}

async fn serve_api(shared: &Arc<Shared>) -> Result<SocketAddr, DaemonError> {
    let wanted = shared.config.api;
    let failed = |source| DaemonError::Api {
        address: wanted,
        source,
    };
    let listener = TcpListener::bind(wanted).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "the local interface is open to the network: who reaches it may ask the models without a key");
    }
    let api = LocalApi {
        address,
        token: hex(&random_32()?),
        process: std::process::id(),
    };
    api.write(shared.home.root()).map_err(|source| DaemonError::System {
        what: "write api.json",
        source,
    })?;
    let told = Arc::clone(shared);
    let open = crate::api::router(shared.serve.clone(), Arc::new(move || told.peers()));
    let router: Router = admin::router(Arc::clone(shared), &api.token).merge(open);
    let stop = shared.stop.clone();
    tokio::spawn(async move {
        let served = axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the local interface has stopped");
        }
    });
    Ok(address)
}
