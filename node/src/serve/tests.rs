//! Chains of nodes over QUIC on loopback, with workers whose model is a hash of everything before.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use polder_protocol::hash::{BlobId, digest};
use polder_protocol::route::RoutePolicy;
use polder_protocol::work::frame::{decode_head, frame_start, head_bytes, payload_bytes};
use polder_protocol::work::{Answer, Likely, Order, Prompt, Reply, Sampling, Task, Written};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};

use super::*;
use crate::data::DataConfig;
use crate::device::{Launch, Launched};
use crate::gate::{AddressBook, Admitted, Gate, Refused};

const BLOCKS: u32 = 6;

#[tokio::test(flavor = "multi_thread")]
async fn one_node_answers_itself_without_any_peer() {
    let town = Town::new();
    let node = town.node(1).await;
    node.hold(0, 6).await;
    let answer = node.ask("hello", 12).await.unwrap();
    assert_eq!(answer.text.len(), 12);
    assert_eq!(answer.usage.prompt_tokens, 5);
    assert_eq!(answer.usage.completion_tokens, 12);
    assert_eq!(answer.chain.len(), 1);
    node.ends_all_sessions().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_give_the_text_that_one_gives() {
    let town = Town::new();
    let (alone, expected) = (town.node(9).await, "hello");
    alone.hold(0, 6).await;
    let expected = alone.ask(expected, 20).await.unwrap().text;
    let town = Town::new();
    let [a, b, c] = town.three().await;
    let gateway = town.node(4).await;
    let answer = gateway.ask("hello", 20).await.unwrap();
    assert_eq!(answer.text, expected);
    assert_eq!(
        answer.chain.iter().map(|hop| hop.node).collect::<Vec<_>>(),
        [a.node(), b.node(), c.node()]
    );
    // A stage of the chain may ask too.
    assert_eq!(b.ask("hello", 20).await.unwrap().text, expected);
    for node in [&a, &b, &c] {
        node.ends_all_sessions().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_text_is_the_same_when_any_stage_is_killed_in_mid_generation() {
    for (killed, first, end) in [(0, 0, 2), (1, 2, 4), (2, 4, 6)] {
        let town = Town::new();
        let stages = town.three().await;
        let gateway = town.node(4).await;
        // The choice looks back, so the last stage must know the text before it, and so must who replaces it.
        let mut asked = request(&gateway, "a question", 60);
        asked.sampling.presence_penalty = 0.5;
        let undisturbed = Box::pin(gateway.serve.generate(asked.clone()));
        let expected = rest(undisturbed, String::new()).await.unwrap().text;
        assert_ne!(expected, gateway.ask("a question", 60).await.unwrap().text);
        let spare = town.node(5).await;
        let mut events = Box::pin(gateway.serve.generate(asked));
        let mut text = String::new();
        for _ in 0..10 {
            match events.next().await.unwrap().unwrap() {
                Event::Token { text: piece, .. } => text.push_str(&piece),
                Event::Done { .. } => panic!("ended too early"),
            }
        }
        spare.hold(first, end).await;
        stages[killed].kill();
        let answer = rest(events, text).await.unwrap();
        assert_eq!(answer.text, expected, "with stage {killed} killed");
        assert!(answer.usage.losses >= 1, "the stage was killed after the answer");
        assert_eq!(answer.chain[killed].node, spare.node());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_is_replaced_and_later_holds_its_stage_again() {
    let town = Town::new();
    let [_a, b, _c] = town.three().await;
    let gateway = town.node(4).await;
    let expected = gateway.ask("hello", 60).await.unwrap().text;
    let mut events = Box::pin(gateway.serve.generate(request(&gateway, "hello", 60)));
    let Some(Ok(Event::Token { text, .. })) = events.next().await else {
        panic!("no first token")
    };
    b.device.kill();
    tokio::time::sleep(Duration::from_millis(50)).await;
    b.device.start_again();
    let answer = rest(events, text).await.unwrap();
    assert_eq!(answer.text, expected);
    assert!(answer.usage.losses >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asked_and_left_leaves_no_session_behind() {
    let town = Town::new();
    let stages = town.three().await;
    let gateway = town.node(4).await;
    let mut events = Box::pin(gateway.serve.generate(request(&gateway, "hello", 200)));
    assert!(events.next().await.unwrap().is_ok());
    drop(events);
    for stage in &stages {
        stage.ends_all_sessions().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_stage_and_a_long_prompt_are_named() {
    let town = Town::new();
    let node = town.node(1).await;
    node.hold(0, 3).await;
    let error = node.ask("hello", 5).await.unwrap_err().to_string();
    assert!(error.contains("no chain of nodes serves the blocks 0 to 6"), "{error}");
    let error = node.ask(&"x".repeat(300), 5).await.unwrap_err().to_string();
    assert!(error.contains("the prompt has 300 tokens"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_free_session_refuses_at_once() {
    let town = Town::new();
    let node = town.node(1).await;
    node.hold(0, 6).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut events = Box::pin(node.serve.generate(request(&node, "hello", 200)));
        assert!(events.next().await.unwrap().is_ok());
        open.push(events);
    }
    let error = node.ask("hello", 5).await.unwrap_err().to_string();
    assert!(error.contains("all 2 sessions of this node are in use"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_text_before_it() {
    let town = Town::new();
    let node = town.node(1).await;
    node.hold(0, 6).await;
    let whole = node.ask("hello", 30).await.unwrap().text;
    let stop = whole[10..13].to_owned();
    let before = whole.find(&stop).unwrap();
    let asked = GenerateRequest {
        stop: vec![stop],
        ..request(&node, "hello", 30)
    };
    let answer = rest(Box::pin(node.serve.generate(asked)), String::new()).await.unwrap();
    assert_eq!(answer.text, whole[..before]);
    assert_eq!(answer.reason, Reason::Stop);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_turn_takes_over_what_its_owner_had_computed_and_nobody_else_does() {
    let town = Town::new();
    let stages = town.three().await;
    let (gateway, other) = (town.node(4).await, town.node(5).await);
    let first = "a long question that is asked first";
    let second = format!("{first}, and then goes on");
    let ask = async |node: &Node, prompt: &str, owner: Option<u8>| {
        let asked = GenerateRequest {
            owner: owner.map(|owner| Owner([owner; 32])),
            ..request(node, prompt, 20)
        };
        rest(Box::pin(node.serve.generate(asked)), String::new()).await.unwrap()
    };
    let expected = ask(&gateway, &second, None).await.text;
    ask(&gateway, first, Some(1)).await;
    // Neither another of the same node, nor one of the same name on another node.
    for (node, owner) in [(&gateway, Some(2)), (&gateway, None), (&other, Some(1))] {
        let answer = ask(node, &second, owner).await;
        assert_eq!(
            (answer.text, answer.usage.reused_tokens),
            (expected.clone(), 0),
            "{owner:?}"
        );
    }
    let answer = ask(&gateway, &second, Some(1)).await;
    assert_eq!((answer.text, answer.usage.reused_tokens), (expected.clone(), 35));
    // The same question again takes all but its last token.
    for stage in &stages {
        stage.ends_all_sessions().await;
    }
    let answer = ask(&gateway, &second, Some(1)).await;
    assert_eq!(
        (answer.text, answer.usage.reused_tokens),
        (expected, second.len() as u32 - 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_turn_is_the_same_when_a_stage_has_forgotten_is_lost_or_dies_meanwhile() {
    for (killed, first, end) in [(0, 0, 2), (1, 2, 4), (2, 4, 6)] {
        let town = Town::new();
        let stages = town.three().await;
        let gateway = town.node(4).await;
        let begun = "a long question that is asked first";
        let ask = |prompt: &str| GenerateRequest {
            owner: Some(Owner([1; 32])),
            ..request(&gateway, prompt, 40)
        };
        let all = async |asked| {
            rest(Box::pin(gateway.serve.generate(asked)), String::new())
                .await
                .unwrap()
        };
        let unknown = GenerateRequest {
            owner: None,
            ..ask(begun)
        };
        let expected = all(unknown).await.text;
        all(ask(begun)).await;
        for stage in &stages {
            stage.ends_all_sessions().await;
        }
        // One stage has had to make room.
        stages[killed]
            .serve
            .inner
            .kept
            .expire(tokio::time::Instant::now(), u64::MAX);
        let answer = all(ask(begun)).await;
        assert_eq!((answer.text, answer.usage.reused_tokens), (expected.clone(), 0));
        for stage in &stages {
            stage.ends_all_sessions().await;
        }
        // It is lost after it has gone on: who takes its seat is told everything from the beginning.
        let mut events = Box::pin(gateway.serve.generate(ask(begun)));
        let mut text = String::new();
        for _ in 0..10 {
            match events.next().await.unwrap().unwrap() {
                Event::Token { text: piece, .. } => text.push_str(&piece),
                Event::Done { .. } => panic!("ended too early"),
            }
        }
        let spare = town.node(5).await;
        spare.hold(first, end).await;
        stages[killed].kill();
        let answer = rest(events, text).await.unwrap();
        assert_eq!(answer.text, expected, "with stage {killed} killed");
        assert_eq!(answer.usage.reused_tokens, 34);
        assert!(answer.usage.losses >= 1, "the stage was killed after the answer");
        // Who was lost is not asked again, and the others' part alone is worth nothing.
        let answer = all(ask(begun)).await;
        assert_eq!(answer.text, expected);
    }
}

#[derive(Debug)]
struct Answered {
    text: String,
    reason: Reason,
    usage: Usage,
    chain: Vec<polder_protocol::route::Hop>,
}

async fn rest(
    mut events: std::pin::Pin<Box<impl futures::Stream<Item = Result<Event, ServeError>>>>,
    mut all: String,
) -> Result<Answered, ServeError> {
    while let Some(event) = events.next().await {
        match event? {
            Event::Token { text, .. } => all.push_str(&text),
            Event::Done {
                text,
                reason,
                usage,
                chain,
            } => {
                all.push_str(&text);
                return Ok(Answered {
                    text: all,
                    reason,
                    usage,
                    chain,
                });
            }
        }
    }
    panic!("the stream ended without an end")
}

fn request(node: &Node, prompt: &str, tokens_max: u32) -> GenerateRequest {
    GenerateRequest {
        epoch: node.epoch,
        prompt: Prompt::Plain(prompt.to_owned()),
        tokens_max: Some(tokens_max),
        sampling: Sampling::GREEDY,
        grammar: None,
        names: false,
        stop: Vec::new(),
        policy: RoutePolicy::default(),
        owner: None,
    }
}

#[derive(Default)]
struct Board {
    held: Mutex<BTreeMap<NodeId, Vec<Held>>>,
    addresses: Mutex<BTreeMap<NodeId, SocketAddr>>,
}

pub(crate) struct Town {
    board: Arc<Board>,
    home: TempDir,
    names: AtomicU64,
}

pub(crate) struct Node {
    pub(crate) serve: ServeHandle,
    data: DataPlane,
    device: Device,
    board: Arc<Board>,
    epoch: EpochId,
}

struct View {
    board: Arc<Board>,
    own: Mutex<NodeId>,
}

impl Town {
    pub(crate) fn new() -> Self {
        Self {
            board: Arc::default(),
            home: TempDir::new().unwrap(),
            names: AtomicU64::new(0),
        }
    }

    async fn three(&self) -> [Node; 3] {
        let nodes = [self.node(1).await, self.node(2).await, self.node(3).await];
        for (node, first) in nodes.iter().zip([0, 2, 4]) {
            node.hold(first, first + 2).await;
        }
        nodes
    }

    pub(crate) async fn node(&self, seed: u8) -> Node {
        let name = self.names.fetch_add(1, Ordering::Relaxed);
        let blobs = BlobStore::open(&self.home.path().join(name.to_string())).unwrap();
        let config = DataConfig::new([seed; 32], (Ipv4Addr::LOCALHOST, 0).into());
        let view = Arc::new(View {
            board: Arc::clone(&self.board),
            own: Mutex::default(),
        });
        let data = DataPlane::start(config, Arc::new(Open), view.clone(), blobs.clone()).unwrap();
        *view.own.lock().unwrap() = data.node();
        self.board
            .addresses
            .lock()
            .unwrap()
            .insert(data.node(), data.local_address());
        let blob = |bytes: &[u8]| blobs.put_bytes(bytes).unwrap();
        let epoch = epoch(blob(b"tokenizer"), blob(b"part"));
        let device = Device::start(Hashing);
        let config = ServeConfig {
            sessions_max: 2,
            context_tokens_max: 256,
            ..ServeConfig::new(InstitutionId([seed; 32]))
        };
        let serve = start(config, view, data.clone(), blobs, device.clone());
        let epoch = serve.learn(epoch);
        Node {
            serve,
            data,
            device,
            board: Arc::clone(&self.board),
            epoch,
        }
    }
}

fn epoch(tokenizer: BlobId, part: BlobId) -> Epoch {
    Epoch {
        version: 1,
        name: "hashes".to_owned(),
        config_json: BLOCKS.to_string(),
        tokenizer,
        chat_template: None,
        end_tokens: Vec::new(),
        begin_token: None,
        parts: vec![part; BLOCKS as usize + 2],
        part_bytes: vec![4; BLOCKS as usize + 2],
        context_tokens_max: 256,
        parent: None,
        trained: None,
        evaluation: BTreeMap::new(),
    }
}

impl Node {
    fn node(&self) -> NodeId {
        self.data.node()
    }

    pub(crate) async fn hold(&self, first: u32, end: u32) {
        self.serve.hold(self.epoch, BlockRange { first, end }).unwrap();
        for _ in 0..500 {
            if self
                .board
                .held
                .lock()
                .unwrap()
                .get(&self.node())
                .is_some_and(|held| !held.is_empty())
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the stage was not loaded");
    }

    async fn ask(&self, prompt: &str, tokens_max: u32) -> Result<Answered, ServeError> {
        let events = self.serve.generate(request(self, prompt, tokens_max));
        rest(Box::pin(events), String::new()).await
    }

    /// The whole node goes away without a word to anybody.
    fn kill(&self) {
        self.serve.inner.stop.cancel();
        self.device.kill();
        self.board.held.lock().unwrap().remove(&self.node());
        let data = self.data.clone();
        tokio::spawn(async move { data.shutdown().await });
    }

    async fn ends_all_sessions(&self) {
        for _ in 0..500 {
            if self.serve.sessions() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} sessions are left", self.serve.sessions());
    }
}

struct Open;

impl Gate for Open {
    fn credentials(&self) -> Vec<u8> {
        b"member".to_vec()
    }

    fn admit(&self, peer: NodeId, _: &[u8]) -> Result<Admitted, Refused> {
        Ok(Admitted {
            node: peer,
            institution: InstitutionId([1; 32]),
            capabilities: u16::MAX,
        })
    }
}

impl AddressBook for View {
    fn data_addresses(&self, peer: NodeId) -> Vec<SocketAddr> {
        self.board
            .addresses
            .lock()
            .unwrap()
            .get(&peer)
            .copied()
            .into_iter()
            .collect()
    }
}

impl Directory for View {
    fn offers(&self, epoch: EpochId) -> Vec<Offer> {
        let held = self.board.held.lock().unwrap();
        let stages = held
            .iter()
            .flat_map(|(node, held)| held.iter().map(|held| (*node, *held)));
        stages
            .filter(|(_, held)| held.epoch == epoch)
            .map(|(node, held)| Offer {
                node,
                institution: InstitutionId([1; 32]),
                range: held.range,
                token_micros: held.token_micros,
                latency_micros: 0,
                // What was announced may be old.
                sessions_free: 1,
            })
            .collect()
    }

    fn announce(&self, held: Vec<Held>) {
        let own = *self.own.lock().unwrap();
        self.board.held.lock().unwrap().insert(own, held);
    }
}

/// A worker in this process whose every block is a hash of all rows before.
struct Hashing;

impl Launch for Hashing {
    fn launch(&self) -> io::Result<Launched> {
        let (ours, theirs) = duplex(1 << 20);
        tokio::spawn(work(theirs));
        let (output, input) = split(ours);
        Ok(Launched {
            input: Box::new(input),
            output: Box::new(output),
            child: None,
        })
    }
}

type Pasts = BTreeMap<(StageId, u64), Vec<[u8; 4]>>;

async fn work(mut pipe: DuplexStream) {
    let mut ranges = BTreeMap::new();
    let mut pasts = Pasts::new();
    while let Ok((Order { id, task }, payload)) = read(&mut pipe).await {
        if matches!(task, Task::Forward { .. }) {
            // As long as a small model takes, so that there is a middle of a generation.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let (answer, payload) = perform(&mut ranges, &mut pasts, task, &payload);
        let start = frame_start(&Reply { id, answer }, payload.len()).unwrap();
        if pipe.write_all(&start).await.is_err() || pipe.write_all(&payload).await.is_err() {
            return;
        }
    }
}

async fn read(pipe: &mut DuplexStream) -> io::Result<(Order, Vec<u8>)> {
    let mut prefix = [0; 4];
    pipe.read_exact(&mut prefix).await?;
    let mut head = vec![0; head_bytes(prefix).unwrap()];
    pipe.read_exact(&mut head).await?;
    let mut prefix = [0; 8];
    pipe.read_exact(&mut prefix).await?;
    let mut payload = vec![0; payload_bytes(prefix).unwrap()];
    pipe.read_exact(&mut payload).await?;
    Ok((decode_head(&head).unwrap(), payload))
}

fn perform(
    ranges: &mut BTreeMap<StageId, BlockRange>,
    pasts: &mut Pasts,
    task: Task,
    payload: &[u8],
) -> (Answer, Bytes) {
    let answer = match task {
        Task::Load { stage, range, .. } => {
            ranges.insert(stage, range);
            Answer::Loaded { bytes: 4, hidden: 1 }
        }
        Task::OpenSession {
            stage,
            session,
            earlier,
            ..
        } => {
            let earlier = earlier.and_then(|(from, positions)| Some((pasts.remove(&(stage, from))?, positions)));
            let (mut past, positions) = earlier.unwrap_or_default();
            past.truncate(positions as usize);
            let positions = past.len() as u32;
            pasts.insert((stage, session), past);
            Answer::Opened { positions, earliest: 0 }
        }
        // They are kept for ever.
        Task::EndSession { .. } => Answer::Done,
        Task::CloseSession { stage, session } => {
            pasts.remove(&(stage, session));
            Answer::Done
        }
        Task::Forward {
            stage,
            session,
            position,
            tokens,
            sample,
            written,
        } => {
            let (Some(range), Some(past)) = (ranges.get(&stage), pasts.get_mut(&(stage, session))) else {
                let reason = "no such stage or session".to_owned();
                return (Answer::Failed { reason }, Bytes::new());
            };
            let sampling = sample.unwrap_or(Sampling::GREEDY);
            return forward(*range, past, position as usize, &tokens, payload, &sampling, &written);
        }
        Task::Encode {
            prompt: Prompt::Plain(text),
            ..
        } => Answer::Tokens {
            tokens: text.bytes().map(u32::from).collect(),
        },
        Task::Decode { tokens, .. } => Answer::Text {
            text: tokens
                .iter()
                .map(|token| char::from(b'a' + (token % 26) as u8))
                .collect(),
        },
        Task::TextLoad { .. } | Task::Unload { .. } => Answer::Done,
        task => Answer::Failed {
            reason: format!("{task:?}"),
        },
    };
    (answer, Bytes::new())
}

fn forward(
    range: BlockRange,
    past: &mut Vec<[u8; 4]>,
    position: usize,
    tokens: &[u32],
    payload: &[u8],
    sampling: &Sampling,
    written: &Written,
) -> (Answer, Bytes) {
    if position > past.len() {
        let reason = format!("a gap: {position} after {}", past.len());
        return (Answer::Failed { reason }, Bytes::new());
    }
    past.truncate(position);
    let (rows, _) = payload.as_chunks::<4>();
    past.extend(rows);
    past.extend(tokens.iter().map(|token| token.to_le_bytes()));
    let mut rows = past.clone();
    for _ in range.first..range.end {
        let mut before = Vec::new();
        for row in &mut rows {
            before.extend(*row);
            let [a, b, c, d, ..] = digest(&before).0;
            *row = [a, b, c, d];
        }
    }
    if range.end == BLOCKS {
        let mut all = rows.last().unwrap().to_vec();
        if sampling.looks_back() {
            assert_eq!(written.tokens.len(), past.len());
            all.extend(written.tokens.iter().flat_map(|token| token.to_le_bytes()));
            all = digest(&all).0.to_vec();
        }
        let likely = |token: u32| Likely {
            token: token % 1_000,
            log_probability: -0.5,
        };
        let chosen = likely(u32::from_le_bytes([all[0], all[1], all[2], all[3]]));
        // One more than was asked for.
        let alternatives = (chosen.token..=chosen.token + u32::from(sampling.alternatives)).map(likely);
        let alternatives = alternatives.collect();
        (Answer::Sampled { chosen, alternatives }, Bytes::new())
    } else {
        (Answer::Hidden, Bytes::from(rows.split_off(position).concat()))
    }
}
