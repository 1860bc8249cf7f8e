//! Sites that share one store and reach each other through memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use polder_protocol::blob::blob_id;
use polder_protocol::charter::Capabilities;
use polder_protocol::hash::{BlobId, FederationId, InstitutionId, NodeId, RunId};
use polder_protocol::identity::KeyPair;
use polder_protocol::layout::{Layout, Part, PartLayout, TensorLayout};
use polder_protocol::round::RunMessage;
use polder_protocol::run::{
    Boundary, Closing, Codec, Inner, Optimiser, Outer, Precision, RunSpec, SPEC_VERSION, Schedule,
};
use polder_protocol::time::Span;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::gate::Admitted;

use super::super::datasets::DataSets;
use super::super::desk::{Desk, Texts};
use super::super::jobs::Jobs;
use super::super::meeting::Meeting;
use super::super::status::Board;
use super::super::world::{Blobs, Link, Network, Received};
use super::super::{NewRun, TrainConfig, TrainHandle, start};
use super::toy::{Toy, WIDTH, bytes};

/// What all sites share.
pub(super) struct Hub {
    store: Arc<Store>,
    sites: Arc<Mutex<BTreeMap<NodeId, Arc<Jobs>>>>,
    handles: Handles,
    pub(super) spec: Arc<RunSpec>,
    pub(super) run: RunId,
}

/// One node.
pub(super) struct Site {
    pub(super) node: NodeId,
    pub(super) jobs: Arc<Jobs>,
    pub(super) toy: Arc<Toy>,
    pub(super) home: Arc<tempfile::TempDir>,
}

impl Hub {
    pub(super) fn new(codec: Codec) -> Self {
        let store = Arc::new(Store {
            folder: tempfile::tempdir().unwrap(),
        });
        let part = |number| PartLayout {
            tensors: vec![TensorLayout {
                name: format!("part.{number}"),
                shape: vec![WIDTH as u32],
            }],
        };
        let initial = |number: usize| store.keep(&bytes(std::array::from_fn(|i| (i + number) as f32 / 10.0)));
        let spec = RunSpec {
            version: SPEC_VERSION,
            name: "toy".into(),
            federation: FederationId::default(),
            steward: NodeId([1; 32]),
            config_json: "{}".into(),
            layout: Layout {
                parts: (0..4).map(part).collect(),
            },
            tokenizer: store.keep(b"{}"),
            initial: (0..4).map(initial).collect(),
            rounds: 3,
            inner: Inner {
                steps: 4,
                batch: 2,
                micro_batches: 3,
                seq: 4,
                learning_rate: 0.05,
                warmup_steps: 0,
                beta_1: 0.9,
                beta_2: 0.95,
                epsilon: 1e-8,
                weight_decay: 0.0,
                clip_norm: 1.0,
                decay_ppm: 0,
                final_ppm: 0,
                schedule: Schedule::WarmupStableDecay,
                optimiser: Optimiser::AdamW,
                goldfish: None,
                precision: Precision::F32,
            },
            outer: Outer {
                codec,
                learning_rate: 0.7,
                momentum: 0.9,
                warm_start_rounds: 0,
            },
            closing: Closing {
                quorum: 1,
                grace: Span::seconds(1),
                deadline: Span::seconds(60),
                late_rounds_max: 2,
            },
            data: vec![],
            seed: 7,
            evaluation: None,
            evaluate_every_rounds: 1,
            boundary: Boundary::F32,
            adapters: None,
        };
        Self {
            store,
            sites: Arc::default(),
            handles: Arc::default(),
            run: spec.id(),
            spec: Arc::new(spec),
        }
    }

    pub(super) fn site(&self, number: u8) -> Site {
        self.site_in(number, Arc::new(tempfile::tempdir().unwrap()))
    }

    /// A site whose home is there already.
    pub(super) fn site_in(&self, number: u8, home: Arc<tempfile::TempDir>) -> Site {
        let node = NodeId([number; 32]);
        let text = home.path().join("text.txt");
        fs::write(&text, "text").unwrap();
        let mut data = DataSets::open(home.path().join("data.toml")).unwrap();
        if data.list().is_empty() {
            data.add("text", &text, None).unwrap();
        }
        let toy = Arc::new(Toy::new());
        let network = Wires {
            me: node,
            sites: Arc::clone(&self.sites),
            handles: Arc::clone(&self.handles),
        };
        let jobs = Arc::new(Jobs {
            compute: toy.clone(),
            blobs: self.store.clone(),
            network: Arc::new(network),
            board: Arc::new(Board::new(node)),
            data: Arc::new(Mutex::new(data)),
            meeting: Meeting::default(),
            meeting_patience: Duration::from_millis(300),
            texts_loaded: Texts::new(toy.clone()),
            desk: tokio::sync::Mutex::new(Desk::new(toy.clone())),
            runs: home.path().join("runs"),
        });
        self.sites.lock().unwrap().insert(node, Arc::clone(&jobs));
        Site { node, jobs, toy, home }
    }

    /// A node with everything that decides, in a home of its own.
    pub(super) fn node(&self, number: u8, blocks_max: u32, home: &Path) -> (TrainHandle, JoinHandle<()>) {
        let seal = KeyPair::from_seed(&[number; 32]);
        let text = home.join("text.txt");
        fs::write(&text, "text").unwrap();
        let mut data = DataSets::open(home.join("data.toml")).unwrap();
        if data.list().is_empty() {
            data.add("text", &text, None).unwrap();
        }
        let network = Wires {
            me: seal.node(),
            sites: Arc::clone(&self.sites),
            handles: Arc::clone(&self.handles),
        };
        let config = TrainConfig {
            home: home.to_owned(),
            federation: FederationId::default(),
            institution: institution(seal.node()),
            train: true,
            blocks_max,
        };
        let toy = Arc::new(Toy::new());
        let node = seal.node();
        let started = start(config, Arc::new(seal), toy, self.store.clone(), Arc::new(network));
        let (handle, task) = started.unwrap();
        self.sites.lock().unwrap().insert(node, Arc::clone(&handle.jobs));
        self.handles.lock().unwrap().insert(node, handle.clone());
        (handle, task)
    }

    /// The run's facts and files, as a person hands them in.
    pub(super) fn new_run(&self, rounds: u64) -> NewRun {
        let mut spec = RunSpec::clone(&self.spec);
        spec.rounds = rounds;
        spec.closing.quorum = 2;
        NewRun {
            initial_files: spec.initial.iter().map(|blob| self.store.file(*blob)).collect(),
            base_files: vec![],
            tokenizer_file: self.store.file(spec.tokenizer),
            spec,
            evaluation: None,
        }
    }

    /// What an update of a part says.
    pub(super) fn update(&self, part: Part, blob: BlobId) -> Vec<f32> {
        let bytes = fs::read(self.store.path(blob).unwrap()).unwrap();
        let layout = &self.spec.layout.parts[part.0 as usize];
        polder_protocol::codec::decode(&bytes, layout).unwrap().1
    }
}

struct Store {
    folder: tempfile::TempDir,
}

impl Store {
    fn keep(&self, bytes: &[u8]) -> BlobId {
        let blob = blob_id(bytes);
        fs::write(self.file(blob), bytes).unwrap();
        blob
    }

    fn file(&self, blob: BlobId) -> PathBuf {
        Path::new(self.folder.path()).join(blob.to_string())
    }
}

impl Blobs for Store {
    fn put(&self, _: RunId, bytes: Vec<u8>) -> BoxFuture<'_, Result<BlobId, String>> {
        std::future::ready(Ok(self.keep(&bytes))).boxed()
    }

    fn path(&self, blob: BlobId) -> Option<PathBuf> {
        Some(self.file(blob)).filter(|path| path.exists())
    }

    fn fetch(&self, _: RunId, blob: BlobId, _: Vec<NodeId>, bytes_max: u64) -> BoxFuture<'_, Result<(), String>> {
        let fits = fs::metadata(self.file(blob)).is_ok_and(|metadata| metadata.len() <= bytes_max);
        let fetched = if fits {
            Ok(())
        } else {
            Err("nobody has it, or it is too long".to_owned())
        };
        std::future::ready(fetched).boxed()
    }

    fn keep(&self, _: RunId, _: BlobId) {}

    fn forget(&self, _: RunId) {}

    fn retain(&self, _: RunId, _: BTreeSet<BlobId>) {}
}

/// Each node is an institution of its own.
pub(super) fn institution(node: NodeId) -> InstitutionId {
    InstitutionId(node.0)
}

type Handles = Arc<Mutex<BTreeMap<NodeId, TrainHandle>>>;

struct Wires {
    me: NodeId,
    sites: Arc<Mutex<BTreeMap<NodeId, Arc<Jobs>>>>,
    handles: Handles,
}

impl Network for Wires {
    fn send(&self, to: NodeId, message: RunMessage) {
        let handle = self.handles.lock().unwrap().get(&to).cloned();
        if let Some(handle) = handle {
            let me = Admitted {
                node: self.me,
                institution: institution(self.me),
                capabilities: Capabilities::TRAIN.0,
            };
            handle.heard(&me, &message.to_bytes());
        }
    }

    fn broadcast(&self, message: RunMessage) {
        let others: Vec<NodeId> = self.handles.lock().unwrap().keys().copied().collect();
        for node in others.into_iter().filter(|node| *node != self.me) {
            self.send(node, message.clone());
        }
    }

    fn open(&self, to: NodeId, opening: Vec<u8>) -> BoxFuture<'_, Result<Box<dyn Link>, String>> {
        let (out, theirs) = mpsc::channel(64);
        let (back, ours) = mpsc::channel(64);
        let peer = self.sites.lock().unwrap().get(&to).cloned();
        let opening = postcard::from_bytes(&opening).unwrap();
        let opened: Result<Box<dyn Link>, String> = match peer {
            Some(peer) => {
                peer.meeting.offer(
                    self.me,
                    opening,
                    Box::new(Wire {
                        out: back,
                        back: theirs,
                    }),
                );
                Ok(Box::new(Wire { out, back: ours }))
            }
            None => Err("no such site".to_owned()),
        };
        std::future::ready(opened).boxed()
    }

    fn traffic(&self) -> (u64, u64) {
        (0, 0)
    }
}

struct Wire {
    out: mpsc::Sender<(Vec<u8>, Bytes)>,
    back: mpsc::Receiver<(Vec<u8>, Bytes)>,
}

impl Link for Wire {
    fn send(&mut self, header: Vec<u8>, payload: Bytes) -> BoxFuture<'_, Result<(), String>> {
        async move {
            self.out
                .send((header, payload))
                .await
                .map_err(|_| "the other end is gone".to_owned())
        }
        .boxed()
    }

    fn receive(&mut self) -> BoxFuture<'_, Result<Received, String>> {
        async move { Ok(self.back.recv().await) }.boxed()
    }
}
