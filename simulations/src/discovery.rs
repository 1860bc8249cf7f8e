//! How nodes of a large federation find each other, and what that costs each of them.
//!
//! Announcements, certificates, pages and directories are the real ones, made and checked by `protocol`. The mesh over
//! which gossip travels is a model: a random graph of gossipsub's degree, of which some nodes pass nothing on. What
//! libp2p adds is counted with the sizes below.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use polder_protocol::charter::{
    Capabilities, Certificate, Charter, Charters, Credentials, InstitutionEntry, Membership, SignedCharter,
};
use polder_protocol::directory::{
    ANNOUNCEMENT_VERSION, Announcement, Directory, PageRequest, Standing, announcement_seconds, repeat_seconds,
};
use polder_protocol::hash::{FederationId, NodeId};
use polder_protocol::identity::{KeyPair, Signed};
use polder_protocol::rng::Random;
use polder_protocol::time::UnixSeconds;
use polder_protocol::wire;

/// When the simulated world begins.
const BEGIN: u64 = 1_800_000_000;

/// Partners that each node chooses in the mesh; with those that choose it six, the most that the control plane allows.
const MESH_CHOSEN: usize = 3;

/// Nodes that a node is connected to: those that the control plane aims at, and as many that find it.
const PEERS: usize = 32;

/// Of them, those outside the mesh that a node has chosen; as many have chosen it.
const OUTSIDE_CHOSEN: usize = (PEERS - 2 * MESH_CHOSEN) / 2;

/// What gossipsub puts around a message: author, number, topic, key and signature, and the frame.
const ENVELOPE_BYTES: u64 = 330;

/// A message that is advertised: its id and its share of the frame.
const ADVERTISED_BYTES: u64 = 18;

/// Peers outside the mesh that hear of it, at each heartbeat.
const ADVERTISED_TO: usize = 4;

/// Heartbeats at which a message is advertised, one a second.
const HEARTBEATS: u64 = 3;

/// A ping and its answer, with the headers of their packets, once in twenty seconds for each peer.
const PING_BYTES_PER_SECOND: u64 = 15;

/// Nodes whose whole directory is kept, as a sample of all.
const OBSERVERS: usize = 8;

/// Delay of one hop, in milliseconds, at least and at most.
const HOP_MILLIS: (u64, u64) = (5, 120);

/// Runs one world and says what was seen.
pub(crate) fn run(seed: u64, nodes: usize, silent_percent: u64) -> Report {
    let began = Instant::now();
    let mut world = World::new(seed, nodes, silent_percent);
    let repeat = repeat_seconds(nodes);
    let mut observers: Vec<Directory> = (0..OBSERVERS.min(nodes))
        .map(|_| Directory::new(world.federation))
        .collect();
    let mut report = Report {
        seed,
        nodes,
        repeat_seconds: repeat,
        life_seconds: announcement_seconds(nodes),
        ..Report::default()
    };
    // Every node speaks once in an interval, at its own moment; the second interval renews all.
    let mut moments: Vec<(u64, usize)> = (0..nodes)
        .map(|node| (world.random.below(repeat * 1_000), node))
        .collect();
    moments.sort_unstable();
    for interval in 0..2 {
        for (millis, node) in &moments {
            let now = UnixSeconds(BEGIN + interval * repeat + millis / 1_000);
            let signed = world.announce(*node, interval + 1, now);
            let flood = world.flood(*node);
            report.messages += 1;
            report.message_bytes += signed.to_bytes().len() as u64 + ENVELOPE_BYTES;
            report.copies += flood.copies;
            report.unreached += (nodes - flood.reached) as u64;
            report.slowest_millis = report.slowest_millis.max(flood.slowest_millis);
            for (observer, directory) in observers.iter_mut().enumerate() {
                if flood.arrived.get(observer).is_some_and(Option::is_some) {
                    let arrives = UnixSeconds(now.0 + 1);
                    if directory
                        .insert(arrives, signed.clone(), |node, shown| world.admit(node, shown, arrives))
                        .is_err()
                    {
                        report.refused += 1;
                    }
                }
            }
        }
        for directory in &mut observers {
            directory.expire(UnixSeconds(BEGIN + (interval + 1) * repeat));
        }
    }
    report.known_least = observers
        .iter()
        .map(|directory| directory.nodes().count())
        .min()
        .unwrap_or_default();
    (report.pages, report.join_bytes, report.joined) = world.join(&observers, repeat);
    report.wall_seconds = began.elapsed().as_secs_f64();
    report
}

/// What a world showed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    seed: u64,
    nodes: usize,
    repeat_seconds: u64,
    life_seconds: u64,
    messages: u64,
    message_bytes: u64,
    copies: u64,
    unreached: u64,
    refused: u64,
    slowest_millis: u64,
    /// Nodes that the observer with the fewest knows.
    known_least: usize,
    pages: u64,
    join_bytes: u64,
    /// What a newcomer knows after the pages of one node.
    joined: usize,
    wall_seconds: f64,
}

impl Report {
    /// Bytes that a node receives each second, over all nodes evenly: copies of announcements, advertisements, pings.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        let seconds = 2 * self.repeat_seconds;
        let mean = self.message_bytes / self.messages.max(1);
        let copies = self.copies * mean / self.nodes as u64 / seconds;
        let outside = (2 * OUTSIDE_CHOSEN).min(self.nodes.saturating_sub(1 + 2 * MESH_CHOSEN));
        let advertised = self.messages * HEARTBEATS * ADVERTISED_TO.min(outside) as u64 * ADVERTISED_BYTES / seconds;
        copies + advertised + PEERS.min(self.nodes.saturating_sub(1)) as u64 * PING_BYTES_PER_SECOND
    }

    /// Whether everybody was found by everybody that was looked at.
    pub(crate) fn all_found(&self) -> bool {
        self.known_least == self.nodes && self.joined == self.nodes && self.refused == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} nodes, seed {}: each announces every {} s and is believed for {} s; {:.1} s of wall time",
            self.nodes, self.seed, self.repeat_seconds, self.life_seconds, self.wall_seconds
        )?;
        let seconds = (2 * self.repeat_seconds) as f64;
        writeln!(
            f,
            "  control traffic per node: {} bytes/s received; {:.2} announcements/s of {} bytes, {:.2} copies of each",
            self.bytes_per_second(),
            self.messages as f64 / seconds,
            self.message_bytes / self.messages.max(1),
            self.copies as f64 / (self.messages.max(1) as f64 * self.nodes as f64),
        )?;
        writeln!(
            f,
            "  of {} deliveries {} failed; the slowest took {} ms; least known {} of {}",
            self.messages * self.nodes as u64,
            self.unreached,
            self.slowest_millis,
            self.known_least,
            self.nodes
        )?;
        write!(
            f,
            "  a newcomer learns of {} nodes in {} pages of {} bytes in all",
            self.joined, self.pages, self.join_bytes
        )
    }
}

struct World {
    federation: FederationId,
    membership: Membership,
    keys: Vec<KeyPair>,
    credentials: Vec<Vec<u8>>,
    mesh: Vec<Vec<u32>>,
    /// Peers outside the mesh.
    outside: Vec<Vec<u32>>,
    silent: Vec<bool>,
    random: Random,
}

struct Flood {
    copies: u64,
    reached: usize,
    slowest_millis: u64,
    arrived: Vec<Option<u64>>,
}

impl World {
    fn new(seed: u64, nodes: usize, silent_percent: u64) -> Self {
        let mut random = Random::from_labels(&[seed, nodes as u64]);
        let institutions: Vec<KeyPair> = (0..nodes.div_ceil(50).max(5) as u64)
            .map(|n| key(1 << 40 | n))
            .collect();
        let founders: Vec<_> = institutions.iter().take(3).map(KeyPair::institution).collect();
        let entry = |(n, key): (usize, &KeyPair)| InstitutionEntry {
            key: key.institution(),
            name: format!("Institution {n}"),
            capabilities: Capabilities::ALL,
            expires: None,
        };
        let charter = Charter {
            version: 1,
            name: "A large federation".into(),
            previous: None,
            founders,
            threshold: 2,
            institutions: institutions.iter().enumerate().map(entry).collect(),
            models: String::new(),
            policies: String::new(),
            created: UnixSeconds(BEGIN - 1_000),
            doors: Vec::new(),
        };
        let mut signed = SignedCharter::new(&charter);
        institutions.iter().take(3).for_each(|founder| signed.sign(founder));
        let charters = Charters::new(vec![signed]).expect("three founders have signed");
        let federation = charters.federation();
        let keys: Vec<KeyPair> = (0..nodes as u64).map(key).collect();
        let certify = |(n, node): (usize, &KeyPair)| {
            let institution = &institutions[n % institutions.len()];
            let certificate = Certificate {
                version: 1,
                federation,
                node: node.node(),
                institution: institution.institution(),
                capabilities: Capabilities::ORDINARY,
                not_before: UnixSeconds(BEGIN - 1_000),
                not_after: UnixSeconds(BEGIN + 1_000_000),
                serial: n as u64,
            };
            let credentials = Credentials {
                federation,
                federation_name: charter.name.clone(),
                charter: charters.hash(),
                certificate: Signed::new(institution, &certificate),
            };
            credentials.to_bytes()
        };
        let credentials = keys.iter().enumerate().map(certify).collect();
        let mesh = graph(&mut random, nodes, MESH_CHOSEN);
        let outside = graph(&mut random, nodes, OUTSIDE_CHOSEN);
        let silent = (0..nodes).map(|_| random.below(100) < silent_percent).collect();
        Self {
            federation,
            membership: Membership::new(charters),
            keys,
            credentials,
            mesh,
            outside,
            silent,
            random,
        }
    }

    fn announce(&self, node: usize, sequence: u64, now: UnixSeconds) -> Signed<Announcement> {
        let announcement = Announcement {
            version: ANNOUNCEMENT_VERSION,
            federation: self.federation,
            node: self.keys[node].node(),
            credentials: self.credentials[node].clone(),
            sequence,
            expires: UnixSeconds(now.0 + announcement_seconds(self.keys.len())),
            stages: Vec::new(),
            epochs: Vec::new(),
        };
        Signed::new(&self.keys[node], &announcement)
    }

    fn admit(&self, node: NodeId, credentials: &[u8], now: UnixSeconds) -> Option<Standing> {
        let member = self.membership.admit(credentials, node, now).ok()?;
        Some(Standing {
            institution: member.institution,
            capabilities: member.capabilities,
        })
    }

    /// Passes a message of `from` along the mesh: everybody sends it on to all of its mesh but the one it came from. Whoever
    /// missed it may hear at one of the next heartbeats, from a peer outside its mesh, that there is one, and asks for it.
    fn flood(&mut self, from: usize) -> Flood {
        let mut arrived: Vec<Option<u64>> = vec![None; self.keys.len()];
        let mut flood = Flood {
            copies: 0,
            reached: 0,
            slowest_millis: 0,
            arrived: Vec::new(),
        };
        let mut queue = VecDeque::from([(from, from, 0u64)]);
        arrived[from] = Some(0);
        for heartbeat in 0..=HEARTBEATS {
            self.pass_on(from, &mut queue, &mut arrived, &mut flood);
            if flood.reached == arrived.len() || heartbeat == HEARTBEATS {
                break;
            }
            for (node, heard) in self.hear_of(from, &arrived, (heartbeat + 1) * 1_000) {
                flood.copies += 1;
                arrived[node] = Some(heard);
                queue.push_back((node, node, heard));
            }
        }
        flood.arrived = arrived;
        flood
    }

    /// Empties the queue of those who have the message and have not passed it on: node, whom it came from, and when.
    fn pass_on(
        &mut self,
        from: usize,
        queue: &mut VecDeque<(usize, usize, u64)>,
        arrived: &mut [Option<u64>],
        flood: &mut Flood,
    ) {
        while let Some((node, via, at)) = queue.pop_front() {
            flood.reached += 1;
            flood.slowest_millis = flood.slowest_millis.max(at);
            if self.silent[node] && node != from {
                continue;
            }
            for other in &self.mesh[node] {
                let other = *other as usize;
                if other == via {
                    continue;
                }
                flood.copies += 1;
                if arrived[other].is_none() {
                    let at = at + HOP_MILLIS.0 + self.random.below(HOP_MILLIS.1 - HOP_MILLIS.0);
                    arrived[other] = Some(at);
                    queue.push_back((other, node, at));
                }
            }
        }
    }

    /// Those without the message whom a peer tells at this heartbeat that there is one, and when it has come.
    fn hear_of(&mut self, from: usize, arrived: &[Option<u64>], at: u64) -> Vec<(usize, u64)> {
        let mut heard = Vec::new();
        for (node, _) in arrived.iter().enumerate().filter(|(_, when)| when.is_none()) {
            for peer in &self.outside[node] {
                let peer = *peer as usize;
                let tells = arrived[peer].is_some_and(|when| when < at) && (!self.silent[peer] || peer == from);
                let told_to = self.outside[peer].len().max(1) as u64;
                if tells && self.random.below(told_to) < ADVERTISED_TO as u64 {
                    // It is told, asks, and is given.
                    let hops = 3 * (HOP_MILLIS.0 + self.random.below(HOP_MILLIS.1 - HOP_MILLIS.0));
                    heard.push((node, at + hops));
                    break;
                }
            }
        }
        heard
    }

    /// A newcomer takes the pages of one observer: how many, their bytes, and how many nodes it then knows.
    fn join(&self, observers: &[Directory], repeat: u64) -> (u64, u64, usize) {
        let now = UnixSeconds(BEGIN + 2 * repeat);
        let mut newcomer = Directory::new(self.federation);
        let (mut pages, mut bytes) = (0, 0);
        let mut request = PageRequest::default();
        while let Some(known) = observers.first() {
            let page = known.page(request);
            pages += 1;
            bytes += wire::encode(&page).len() as u64;
            for signed in page
                .announcements
                .iter()
                .filter_map(|bytes| Signed::from_bytes(bytes).ok())
            {
                // What is refused is missing in the count.
                newcomer
                    .insert(now, signed, |node, shown| self.admit(node, shown, now))
                    .ok();
            }
            match page.next {
                Some(next) => request.after = Some(next),
                None => break,
            }
        }
        (pages, bytes, newcomer.nodes().count())
    }
}

/// A random graph without direction, in which every node has chosen so many others.
fn graph(random: &mut Random, nodes: usize, chosen: usize) -> Vec<Vec<u32>> {
    let mut graph = vec![Vec::new(); nodes];
    for node in 0..nodes {
        for _ in 0..chosen {
            let other = random.below(nodes as u64) as usize;
            if other != node && !graph[node].contains(&(other as u32)) {
                graph[node].push(other as u32);
                graph[other].push(node as u32);
            }
        }
    }
    graph
}

fn key(number: u64) -> KeyPair {
    let mut seed = [0x44; 32];
    seed[..8].copy_from_slice(&number.to_le_bytes());
    KeyPair::from_seed(&seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_find_all_though_a_tenth_passes_nothing_on_and_traffic_is_bounded() {
        let report = run(1, 200, 10);
        assert!(report.all_found(), "{report}");
        assert!(report.bytes_per_second() < 64 << 10, "{report}");
    }

    #[test]
    fn a_world_repeats_itself() {
        let (one, two) = (run(7, 40, 10), run(7, 40, 10));
        assert_eq!((one.copies, one.slowest_millis), (two.copies, two.slowest_millis));
    }
}
