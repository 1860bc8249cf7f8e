//! What honest peers send: where fuzzing begins.

use std::collections::BTreeMap;

use polder_protocol::aggregate::PartState;
use polder_protocol::blob::{ChunkSet, Manifest};
use polder_protocol::charter::{
    Capabilities, Certificate, Charter, Charters, Credentials, InstitutionEntry, Revocation, SignedCharter,
};
use polder_protocol::codec::{self, Form, Header};
use polder_protocol::directory::{Announcement, EpochNotice, Page, PageRequest, StageOffer};
use polder_protocol::epoch::Epoch;
use polder_protocol::hash::{BlobId, Digest, EpochId, NodeId, digest};
use polder_protocol::identity::{KeyPair, Signed};
use polder_protocol::invite::{Door, Invite};
use polder_protocol::layout::{BlockRange, Part};
use polder_protocol::log::{Body, Contribution, EndReason, Entry, ReplicaId, Round, Signature, Stage};
use polder_protocol::round::{Commit, CommitAnswer, JoinAnswer, RunMessage, SignedCommit};
use polder_protocol::run::state_hash;
use polder_protocol::session::{
    Earlier, Feed, FromSeat, Opening, SeatId, SeatRequest, SessionId, ToSeat, Wiring, encode,
};
use polder_protocol::time::UnixSeconds;
use polder_protocol::wire::{
    self, Envelope, FRAME_BYTES, Farewell, FrameHeader, Greeting, Hello, Offer, PeerHint, Punch, Refusal, Reply,
    Request, Service, Standing,
};
use polder_protocol::work::{Answer, Grammar, Likely, Order, Sampling, Task};
use polder_protocol::{hash, work};
use serde::Serialize;

use crate::targets::serving::{GenerationEvent, SeatEvent};
use crate::targets::training::{Event, node_id, part, spec};

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const RANGE: BlockRange = BlockRange { first: 0, end: 2 };

/// Inputs for each target: its name, and what it begins with.
pub(crate) fn all() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    vec![
        ("aggregate_state", aggregate_states()),
        (
            "blob_manifest",
            vec![Manifest::of(b"").to_bytes(), Manifest::of(&[7; 100]).to_bytes()],
        ),
        (
            "capabilities",
            texts(&["serve,train,query", "all", "", "relay, directory"]),
        ),
        ("charters", vec![charters().to_bytes()]),
        ("chunk_set", vec![chunk_set(1, &[0]), chunk_set(70, &[0, 64, 69])]),
        ("control_messages", control_messages()),
        ("credentials", vec![credentials()]),
        ("directory", directories()),
        ("epoch", vec![epoch().to_bytes()]),
        ("frame_header", vec![frame_header().to_vec()]),
        ("generation", vec![generation()]),
        ("invite", vec![invite().to_string().into_bytes()]),
        ("log", vec![log()]),
        ("node", nodes()),
        (
            "policy_window",
            texts(&["mon-fri 18:00-07:00", "sat,sun 00:00-24:00", "daily 9:00-17:00"]),
        ),
        (
            "round_messages",
            round_messages().iter().map(RunMessage::to_bytes).collect(),
        ),
        ("run_spec", vec![spec().to_bytes()]),
        ("seat", seats()),
        ("session_messages", session_messages()),
        ("update", updates()),
        ("worker_frames", worker_frames()),
    ]
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn bytes(value: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(value).expect("postcard writes it")
}

fn kind(number: u8, rest: Vec<u8>) -> Vec<u8> {
    [&[number], rest.as_slice()].concat()
}

fn key(number: u8) -> KeyPair {
    KeyPair::from_seed(&[number; 32])
}

fn charters() -> Charters {
    let institution = key(1).institution();
    let charter = Charter {
        version: 1,
        name: "Fuzz".into(),
        previous: None,
        founders: vec![institution],
        threshold: 1,
        institutions: vec![InstitutionEntry {
            key: institution,
            name: "Leiden".into(),
            capabilities: Capabilities::ALL,
            expires: None,
        }],
        models: "one".into(),
        policies: "be kind".into(),
        created: UnixSeconds(NOW.0 - 100),
        doors: Vec::new(),
    };
    let mut signed = SignedCharter::new(&charter);
    signed.sign(&key(1));
    Charters::new(vec![signed]).expect("the charter holds")
}

fn certificate() -> Signed<Certificate> {
    let claim = Certificate {
        version: 1,
        federation: charters().federation(),
        node: key(2).node(),
        institution: key(1).institution(),
        capabilities: Capabilities::ORDINARY,
        not_before: UnixSeconds(NOW.0 - 50),
        not_after: UnixSeconds(NOW.0 + 1_000),
        serial: 3,
    };
    Signed::new(&key(1), &claim)
}

fn shown() -> Vec<u8> {
    let charters = charters();
    let credentials = Credentials {
        federation: charters.federation(),
        federation_name: "Fuzz".into(),
        charter: charters.hash(),
        certificate: certificate(),
    };
    credentials.to_bytes()
}

fn credentials() -> Vec<u8> {
    let revocation = Revocation {
        version: 1,
        federation: charters().federation(),
        institution: key(1).institution(),
        epoch: 1,
        nodes: vec![key(9).node()],
        serials: vec![8],
    };
    let revocation = Signed::new(&key(1), &revocation).to_bytes();
    bytes(&[charters().to_bytes(), shown(), revocation])
}

fn invite() -> Invite {
    Invite {
        federation: charters().federation(),
        federation_name: "Fuzz".into(),
        institution: key(1).institution(),
        doors: vec![Door {
            node: key(2).node(),
            control: vec!["/ip4/192.0.2.1/tcp/4001".into()],
            data: vec!["192.0.2.1:4002".parse().expect("an address")],
        }],
        token: [5; 32],
        expires: NOW,
    }
}

fn chunk_set(chunks: u16, members: &[u32]) -> Vec<u8> {
    let mut set = ChunkSet::empty(chunks.into());
    for member in members {
        set.insert(*member);
    }
    [chunks.to_le_bytes().to_vec(), set.to_bytes()].concat()
}

fn aggregate_states() -> Vec<Vec<u8>> {
    let elements = part().elements().expect("it is small");
    let mut state = PartState::initial(vec![0.5; elements]);
    let plain = state.to_bytes();
    state.momentum.fill(0.25);
    vec![plain, state.to_bytes()]
}

fn epoch() -> Epoch {
    Epoch {
        version: 1,
        name: "fuzz".into(),
        config_json: "{}".into(),
        tokenizer: BlobId([1; 32]),
        chat_template: Some("{{ messages }}".into()),
        end_tokens: vec![2],
        begin_token: Some(1),
        parts: vec![BlobId([2; 32]); 4],
        part_bytes: vec![10; 4],
        context_tokens_max: 128,
        parent: Some(EpochId([3; 32])),
        trained: Some((spec().id(), 0, 9)),
        evaluation: BTreeMap::from([("bits_per_byte.de".into(), 1_500_000)]),
    }
}

fn frame_header() -> [u8; FRAME_BYTES] {
    FrameHeader::new(3, 0, 40, 65_536).expect("it fits").to_bytes()
}

fn control_messages() -> Vec<Vec<u8>> {
    let hello = Hello {
        agent: "polder/0.1.0".into(),
        instance: 4,
        credentials: shown(),
        control_addresses: vec!["/ip4/192.0.2.1/tcp/4001".into()],
        data_addresses: vec!["0.0.0.0:4002".parse().expect("an address")],
    };
    let hint = PeerHint {
        node: node_id(3),
        control_addresses: vec!["/ip6/2001:db8::1/udp/4001/quic-v1".into()],
    };
    let greeting = Greeting {
        hello: hello.clone(),
        peers: vec![hint],
    };
    let request = Request {
        service: Service::Directory,
        body: bytes(&PageRequest::default()),
    };
    let refused = Reply::Refused(Refusal::NotAdmitted {
        reason: "expired".into(),
    });
    let farewell = Farewell {
        reason: "leaving".into(),
        refused: false,
    };
    let envelope = Envelope {
        credentials: shown(),
        body: vec![1, 2, 3],
    };
    let offer = Offer {
        nonce: 9,
        candidates: vec!["192.0.2.1:4002".parse().expect("an address")],
        standing: Standing::Punchable,
    };
    vec![
        kind(0, wire::encode(&request)),
        kind(1, wire::encode(&Reply::Done(vec![9]))),
        kind(1, wire::encode(&refused)),
        kind(2, wire::encode(&hello)),
        kind(3, wire::encode(&greeting)),
        kind(4, wire::encode(&farewell)),
        kind(5, wire::encode(&envelope)),
        kind(6, wire::encode(&Punch::Offer(offer))),
        kind(6, wire::encode(&Punch::Go { nonce: 9 })),
    ]
}

fn announcement() -> Signed<Announcement> {
    let announcement = Announcement {
        version: 1,
        federation: hash::FederationId([7; 32]),
        node: key(2).node(),
        credentials: vec![1],
        sequence: 5,
        expires: UnixSeconds(NOW.0 + 60),
        stages: vec![StageOffer {
            epoch: EpochId([3; 32]),
            range: RANGE,
            token_micros: 900,
            sessions_free: 4,
            context_tokens_max: 512,
        }],
        epochs: vec![EpochNotice {
            epoch: EpochId([3; 32]),
            name: "fuzz".into(),
            blocks: 4,
            manifest: BlobId([4; 32]),
            bytes: 300,
        }],
    };
    Signed::new(&key(2), &announcement)
}

fn directories() -> Vec<Vec<u8>> {
    let announced = announcement().to_bytes();
    let page = Page {
        announcements: vec![announced.clone()],
        next: Some(node_id(4)),
    };
    vec![
        [
            bytes(&announced),
            bytes(&bytes(&PageRequest::default())),
            bytes(&bytes(&page)),
        ]
        .concat(),
    ]
}

fn stages() -> Vec<Stage> {
    let institution = key(1).institution();
    vec![Stage {
        node: node_id(1),
        institution,
        range: RANGE,
        incarnation: 1,
    }]
}

fn entry(body: Body) -> Entry {
    Entry {
        run: spec().id(),
        index: 0,
        previous: Digest([0; 32]),
        body,
        author: node_id(1),
        signature: Signature::from_bytes(&[0; 64]),
    }
}

fn bodies() -> Vec<Body> {
    let made = vec![BlobId([6; 32]); 4];
    let contribution = Contribution {
        replica: ReplicaId(1),
        base: Round(0),
        tokens: 64,
        loss_ppm: 3_000_000,
        parts: made.clone(),
    };
    vec![
        Body::Genesis {
            spec: spec().to_bytes(),
        },
        Body::Replica {
            id: ReplicaId(1),
            stages: stages(),
            from: Round(0),
        },
        Body::Closed {
            round: Round(0),
            base: state_hash(&spec().initial),
            set: vec![contribution],
        },
        Body::Applied {
            round: Round(0),
            state: state_hash(&made),
            parts: made,
        },
        Body::Evaluated {
            round: Round(0),
            bits_per_byte_ppm: BTreeMap::from([("de".into(), 2_000_000)]),
        },
        Body::Paused,
        Body::Resumed,
        Body::ReplicaEnded {
            id: ReplicaId(1),
            reason: EndReason::Left(node_id(1)),
        },
        Body::Stopped,
    ]
}

fn log() -> Vec<u8> {
    bodies().into_iter().flat_map(|body| bytes(&entry(body))).collect()
}

fn commit(from: NodeId) -> SignedCommit {
    SignedCommit {
        commit: Commit {
            run: spec().id(),
            round: Round(0),
            replica: ReplicaId(2),
            base: state_hash(&spec().initial),
            parts: (0..4).map(|part| (Part(part), BlobId([6; 32]))).collect(),
            tokens: 64,
            loss_ppm: 3_000_000,
            node: from,
        },
        signature: Signature::from_bytes(&[0; 64]),
    }
}

fn round_messages() -> Vec<RunMessage> {
    let run = spec().id();
    vec![
        RunMessage::Entries {
            run,
            entries: bodies().into_iter().map(entry).collect(),
        },
        RunMessage::Head {
            run,
            entries: 3,
            head: digest(b"head"),
        },
        RunMessage::Ask { run, from: 1 },
        join(2),
        RunMessage::JoinAnswer {
            run,
            answer: JoinAnswer::Waiting { blocks_missing: 1 },
        },
        RunMessage::Alive {
            run,
            incarnation: 1,
            entries: 2,
        },
        RunMessage::Commit(commit(node_id(2))),
        RunMessage::Ack {
            run,
            round: Round(0),
            replica: ReplicaId(1),
            answer: CommitAnswer::Accepted,
        },
        RunMessage::Leave { run },
    ]
}

fn join(blocks_max: u32) -> RunMessage {
    RunMessage::Join {
        run: spec().id(),
        institution: key(1).institution(),
        blocks_max,
        languages: vec!["de".into()],
        incarnation: 1,
        entries: 1,
    }
}

fn nodes() -> Vec<Vec<u8>> {
    let events = |events: &[Event]| events.iter().flat_map(bytes).collect::<Vec<u8>>();
    let run = spec().id();
    let alive = RunMessage::Alive {
        run,
        incarnation: 1,
        entries: 3,
    };
    let good = 2;
    let whole = [
        Event::Found(0),
        Event::Told(0, join(2)),
        Event::Wait(100),
        Event::Done(good),
        Event::Told(0, alive.clone()),
        Event::Told(0, RunMessage::Commit(commit(node_id(2)))),
        Event::Done(good),
        Event::Done(good),
        Event::Wait(6_000),
        Event::Done(good),
        Event::Done(good),
        Event::Told(0, RunMessage::Ask { run, from: 0 }),
        Event::Done(good),
        Event::Wait(6_000),
        Event::Lost(0),
        Event::Done(0),
    ];
    let chain = [
        Event::Told(1, join(1)),
        Event::Told(2, join(1)),
        Event::Wait(100),
        Event::Told(1, alive.clone()),
        Event::Told(2, alive),
        Event::Message(1, RunMessage::Leave { run }.to_bytes()),
        Event::Done(1),
        Event::Wait(30_000),
    ];
    vec![events(&whole), events(&chain)]
}

fn wiring() -> Wiring {
    Wiring {
        attempt: 1,
        positions: 0,
        previous: node_id(3),
        next: node_id(3),
        next_seat: SeatId(2),
    }
}

fn tokens(tokens: &[u32]) -> ToSeat {
    ToSeat::Tokens {
        attempt: 1,
        position: 0,
        tokens: tokens.to_vec(),
        more: false,
        replay: false,
    }
}

fn seats() -> Vec<Vec<u8>> {
    let wired = SeatEvent::Told(ToSeat::Wire(wiring()));
    let first = [
        SeatEvent::Told(ToSeat::Text {
            position: 0,
            tokens: vec![4, 5, 6],
        }),
        wired.clone(),
        SeatEvent::Told(tokens(&[4, 5, 6])),
        SeatEvent::Told(ToSeat::Ping),
        SeatEvent::Computed,
        SeatEvent::Fed(
            3,
            Feed::Token {
                attempt: 1,
                position: 3,
                token: 9,
            },
            0,
        ),
        SeatEvent::Computed,
        SeatEvent::Told(ToSeat::Replay {
            attempt: 1,
            positions: 3,
        }),
    ];
    let hidden = Feed::Hidden {
        attempt: 1,
        position: 0,
        more: false,
        replay: false,
    };
    let later = [wired, SeatEvent::Fed(3, hidden, 24), SeatEvent::Computed];
    let events = |number, events: &[SeatEvent]| kind(number, events.iter().flat_map(bytes).collect());
    vec![
        events(0, &first),
        events(1, &first),
        events(2, &later),
        events(3, &later),
    ]
}

fn generation() -> Vec<u8> {
    let said = |seat, message| bytes(&GenerationEvent::Said(seat, message));
    let token = |position| FromSeat::Token {
        attempt: 1,
        position,
        chosen: likely(4),
        alternatives: vec![likely(4), likely(6)],
    };
    [
        said(
            0,
            FromSeat::Opened {
                positions: 2,
                earliest: 1,
            },
        ),
        said(
            1,
            FromSeat::Opened {
                positions: 0,
                earliest: 0,
            },
        ),
        said(0, FromSeat::Wired { attempt: 1 }),
        said(1, FromSeat::Wired { attempt: 1 }),
        said(1, token(3)),
        bytes(&GenerationEvent::Wait(1_200)),
        said(0, FromSeat::Pong),
        bytes(&GenerationEvent::Lost(1)),
        said(
            2,
            FromSeat::Opened {
                positions: 0,
                earliest: 0,
            },
        ),
        said(2, FromSeat::Wired { attempt: 2 }),
        said(0, FromSeat::Wired { attempt: 2 }),
        said(2, FromSeat::Replayed { attempt: 2 }),
    ]
    .concat()
}

fn session_messages() -> Vec<Vec<u8>> {
    let request = SeatRequest {
        session: SessionId([1; 16]),
        seat: SeatId(1),
        epoch: EpochId([2; 32]),
        range: RANGE,
        context_tokens_max: 512,
        sampling: sampling(),
        grammar: Some(Grammar::JsonSchema("{}".into())),
        prompt_tokens: 3,
        end_tokens: vec![2],
        earlier: Some(Earlier {
            session: SessionId([4; 16]),
            positions: 2,
        }),
        keep: true,
    };
    let feed = Opening::Feed {
        session: SessionId([1; 16]),
        seat: SeatId(1),
    };
    let lost = FromSeat::NextLost {
        attempt: 1,
        reason: "gone".into(),
    };
    vec![
        kind(0, encode(&Opening::Seat(request))),
        kind(0, encode(&feed)),
        kind(1, encode(&ToSeat::Wire(wiring()))),
        kind(1, encode(&tokens(&[1, 2, 3]))),
        kind(2, encode(&lost)),
        kind(
            3,
            encode(&Feed::Token {
                attempt: 1,
                position: 2,
                token: 3,
            }),
        ),
        kind(4, epoch().to_bytes()),
    ]
}

fn sampling() -> Sampling {
    Sampling {
        temperature: 0.7,
        top_k: 40,
        top_p: 0.9,
        presence_penalty: 0.5,
        seed: 11,
        alternatives: 2,
        ..Sampling::GREEDY
    }
}

fn likely(token: u32) -> Likely {
    Likely {
        token,
        log_probability: -0.5,
    }
}

fn updates() -> Vec<Vec<u8>> {
    let elements = part().elements().expect("it is small");
    let values: Vec<f32> = (0..elements).map(|index| (index % 17) as f32 / 16.0 - 0.5).collect();
    [Form::Raw, Form::Int8, Form::E3m0, Form::TopkQ2 { k: 64 }]
        .into_iter()
        .map(|form| {
            let header = Header {
                run: spec().id(),
                round: 1,
                replica: 2,
                base: digest(b"base"),
                part: Part(0),
                form,
                tokens: 64,
            };
            codec::encode(&header, &part(), &values).expect("it fits")
        })
        .collect()
}

fn worker_frames() -> Vec<Vec<u8>> {
    let order = Order {
        id: 1,
        task: Task::Hello,
    };
    let reply = work::Reply {
        id: 1,
        answer: Answer::Device {
            name: "cpu".into(),
            memory_bytes: None,
            is_cpu: true,
            fell_back: None,
        },
    };
    vec![kind(0, bytes(&order)), kind(1, bytes(&reply))]
}
