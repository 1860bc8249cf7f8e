//! Virtual time: a heap of events, hosts that step the real machines, and a watch that looks at every effect.

mod compute;
mod event;
mod host;
mod network;
mod tally;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use polder_protocol::hash::{Digest, RunId, digest};
use polder_protocol::log::{Body, Phase, Round};
use polder_protocol::node::{Command, Effect, Input, Joining, Node, Persist, Report, RestoredRun};
use polder_protocol::rng::Random;
use polder_protocol::round::{JobId, RunMessage};
use polder_protocol::time::{Instant, Span};

use crate::invariants::{End, Seen, Standing, Violation, Watch};
use crate::worlds::{Fault, Flaw, World, node_id};

use compute::{Meetings, failed};
use event::{Event, Scheduled};
use host::Host;
use network::Network;
pub(crate) use tally::Tally;

/// A world that takes more events than this runs in circles.
const EVENTS_MAX: u64 = 2_000_000;
/// A node that is woken more often than this within one microsecond does, too.
const WAKES_AT_ONCE_MAX: u32 = 1_000;
/// How often a host crashes between two effects, per effect, while things go wrong.
const CRASH_BETWEEN_PPM: u64 = 300;

/// How a simulation ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) violation: Option<Violation>,
    pub(crate) trace: Digest,
    pub(crate) tally: Tally,
    pub(crate) seconds: f64,
}

/// One simulation.
#[derive(Debug)]
pub(crate) struct Engine {
    world: World,
    run: RunId,
    now: Instant,
    sequence: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    random: Random,
    network: Network,
    hosts: Vec<Host>,
    meetings: Meetings,
    watch: Watch,
    tally: Tally,
    trace: Digest,
    wakes_at_once: (Instant, u32),
    tell: bool,
}

impl Engine {
    pub(crate) fn new(world: World) -> Self {
        let hosts: Vec<Host> = (0..world.plans.len()).map(Host::new).collect();
        let mut engine = Self {
            run: world.spec.id(),
            now: Instant(0),
            sequence: 0,
            queue: BinaryHeap::new(),
            random: Random::from_labels(&[world.seed, 1]),
            network: Network::new(),
            hosts,
            meetings: Meetings::new(),
            watch: Watch::new(&world.spec),
            tally: Tally::default(),
            trace: Digest::default(),
            wakes_at_once: (Instant(0), 0),
            tell: false,
            world,
        };
        engine.hosts[0].disk.blobs.extend(&engine.world.spec.initial);
        for (host, plan) in engine.world.plans.clone().iter().enumerate() {
            engine.at(plan.joins_at, Event::Join { host });
        }
        for (at, fault) in engine.world.faults.clone() {
            engine.at(at, Event::Fault(fault));
        }
        engine.at(engine.world.quiet_at, Event::Quiet);
        engine
    }

    /// Tells the story on standard error: entries, jobs and faults.
    pub(crate) fn telling(mut self, tell: bool) -> Self {
        self.tell = tell;
        self
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(mut self) -> Ended {
        let result = self.run_to_the_end();
        self.tally.dropped = self.network.dropped;
        self.tally.duplicated = self.network.duplicated;
        self.tally.virtual_seconds = self.now.0 / 1_000_000;
        (self.tally.rounds, self.tally.late, self.tally.of_chains) = self.watch.rounds();
        Ended {
            violation: result.err(),
            trace: self.trace,
            tally: self.tally,
            seconds: self.now.0 as f64 / 1e6,
        }
    }

    fn run_to_the_end(&mut self) -> Result<(), Violation> {
        for host in 0..self.hosts.len() {
            self.start(host)?;
        }
        let done_by = self.world.done_by();
        while let Some(Reverse(scheduled)) = self.queue.pop() {
            self.now = scheduled.at;
            self.tally.events += 1;
            if self.now > done_by || self.tally.events > EVENTS_MAX {
                break;
            }
            self.happen(scheduled.event)?;
            if self.now > self.world.quiet_at && self.tally.events.is_multiple_of(64) && self.is_done() {
                break;
            }
        }
        self.watch.end(&self.standing())
    }

    /// Whether everything that is to come has come: the run is over everywhere, and everybody has its last state.
    fn is_done(&self) -> bool {
        let standing = self.standing();
        self.watch.end(&standing).is_ok()
    }

    fn standing(&self) -> End {
        let hosts = self.hosts.iter().enumerate().filter_map(|(index, host)| {
            let standing = host.node.as_ref()?.standing(self.run)?;
            let ledger = standing.log.ledger();
            let is_member = ledger.is_some_and(|ledger| ledger.replica_of(host.id).is_some());
            Some(Standing {
                host: index,
                entries: standing.log.len(),
                head: standing.log.head(),
                is_over: ledger.is_some_and(|ledger| ledger.phase() == Phase::Over),
                keeps_state: standing.is_steward || host.wants_in && is_member,
                state: host.disk.run.state.clone(),
            })
        });
        End {
            hosts: hosts.collect(),
            rounds: Round(self.world.spec.rounds),
        }
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        self.note(&event);
        match event {
            Event::Deliver { to, from, message } => {
                self.tally.messages += 1;
                let from = node_id(from);
                self.step(to, Input::Message { from, message })
            }
            Event::Wake { host, life } => self.wake(host, life),
            Event::Done { host, life, job } => {
                if self.hosts[host].life != life {
                    return Ok(());
                }
                let Some(work) = self.hosts[host].jobs.remove(&job) else {
                    return Ok(());
                };
                if self.world.flaw == Flaw::NeverCloses && matches!(work, polder_protocol::round::Job::Fetch { .. }) {
                    return Ok(());
                }
                self.has_base(host, job, &work)?;
                let outcome = self.outcome(host, &work);
                self.step(host, Input::Done { job, outcome })
            }
            Event::Failed {
                host,
                life,
                job,
                reason,
            } => self.fail(host, life, job, reason),
            Event::Unmet { host, life, job, key } => {
                if self.unmet(host, life, job, key) {
                    self.fail(host, life, job, "the neighbour did not come")
                } else {
                    Ok(())
                }
            }
            Event::Found { host, peer } => self.step(host, Input::PeerFound { node: node_id(peer) }),
            Event::Lost { host, peer } => self.step(host, Input::PeerLost { node: node_id(peer) }),
            Event::Join { host } => {
                self.hosts[host].wants_in = self.world.plans[host].blocks_max > 0;
                self.wish(host)
            }
            Event::Fault(fault) => self.fault(fault),
            Event::Quiet => self.quiet(),
        }
    }

    fn fault(&mut self, fault: Fault) -> Result<(), Violation> {
        self.tally.other_faults += 1;
        if self.tell {
            eprintln!("{:9.3} {fault:?}", self.now.0 as f64 / 1e6);
        }
        match fault {
            Fault::Crash { host } => self.crash(host),
            Fault::CrashAll => (0..self.hosts.len()).for_each(|host| self.crash(host)),
            Fault::Restart { host } => return self.start(host),
            Fault::RestartAll => return (0..self.hosts.len()).try_for_each(|host| self.start(host)),
            Fault::Partition { mask } => self.network.cut(mask),
            Fault::Storm => self.network.storm(),
            Fault::Calm => self.network.calm(),
            Fault::Slow { host, until } => self.hosts[host].slow_until = until,
            Fault::Corrupt { host } => self.hosts[host].corrupt = true,
            Fault::Leave { host } => {
                self.hosts[host].wants_in = false;
                let run = self.run;
                return self.step(host, Input::Local(Command::Leave { run }));
            }
            Fault::Rejoin { host } => {
                self.hosts[host].wants_in = self.world.plans[host].blocks_max > 0;
                return self.wish(host);
            }
            Fault::Pause => return self.step(0, Input::Local(Command::Pause { run: self.run })),
            Fault::Resume => return self.step(0, Input::Local(Command::Resume { run: self.run })),
        }
        Ok(())
    }

    /// The faults stop.
    fn quiet(&mut self) -> Result<(), Violation> {
        self.network.heal();
        for host in 0..self.hosts.len() {
            self.hosts[host].slow_until = Instant(0);
            self.hosts[host].corrupt = false;
            if self.world.plans[host].is_lost {
                self.crash(host);
            } else {
                self.hosts[host].wants_in = self.world.plans[host].blocks_max > 0;
                self.start(host)?;
                self.wish(host)?;
            }
        }
        self.step(0, Input::Local(Command::Resume { run: self.run }))
    }

    /// Starts a host that is down, with what its disk has.
    fn start(&mut self, index: usize) -> Result<(), Violation> {
        let host = &mut self.hosts[index];
        if host.node.is_some() {
            return Ok(());
        }
        host.life += 1;
        host.began = self.now;
        host.wake_at = None;
        host.undo.clear();
        let mut stored = BTreeMap::new();
        if host.disk.run != RestoredRun::default() {
            stored.insert(self.run, host.disk.run.clone());
        }
        let mut effects = Vec::new();
        let incarnation = self.now.0 + host.life;
        host.node = Some(Node::restore(
            host.seal.clone(),
            incarnation,
            Instant(0),
            stored,
            &mut effects,
        ));
        self.carry_out(index, effects)?;
        self.meet_others(index);
        if index == 0 && self.hosts[0].disk.run.entries.is_empty() {
            let spec = self.world.spec.clone();
            self.step(0, Input::Local(Command::Begin { spec }))?;
        }
        self.wish(index)
    }

    /// A host that has come connects to others; some notice, now or in a while.
    fn meet_others(&mut self, index: usize) {
        for other in (0..self.hosts.len()).filter(|other| *other != index) {
            for (host, peer) in [(index, other), (other, index)] {
                if self.random.chance(500_000) {
                    let span = Span(self.random.below(2_000_000));
                    self.after(span, Event::Found { host, peer });
                }
            }
        }
    }

    /// A host's owner says what it is to do.
    fn wish(&mut self, index: usize) -> Result<(), Violation> {
        let (run, steward) = (self.run, node_id(0));
        let blocks_max = self.world.plans[index].blocks_max;
        let command = if self.hosts[index].wants_in {
            let joining = Joining {
                institution: self.world.plans[index].institution,
                blocks_max,
                languages: vec![],
            };
            Command::Join { run, steward, joining }
        } else if index != 0 {
            Command::Follow { run, steward }
        } else {
            return Ok(());
        };
        self.step(index, Input::Local(command))
    }

    fn crash(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        if host.node.take().is_none() {
            return;
        }
        self.tally.crashes += 1;
        host.jobs.clear();
        if self.world.flaw == Flaw::SpeaksBeforeItWrites
            && index == 0
            && let Some(before) = host.undo.first()
        {
            host.disk.run = before.clone();
        }
        self.part_ways(index, None);
        for other in 0..self.hosts.len() {
            if other != index && self.random.chance(500_000) {
                let span = Span(self.random.below(2_000_000));
                self.after(
                    span,
                    Event::Lost {
                        host: other,
                        peer: index,
                    },
                );
            }
        }
    }

    fn fail(&mut self, host: usize, life: u64, job: JobId, reason: &str) -> Result<(), Violation> {
        if self.hosts[host].life != life || self.hosts[host].jobs.remove(&job).is_none() {
            return Ok(());
        }
        self.step(
            host,
            Input::Done {
                job,
                outcome: failed(reason),
            },
        )
    }

    fn wake(&mut self, index: usize, life: u64) -> Result<(), Violation> {
        let now = self.now;
        let host = &mut self.hosts[index];
        if host.life != life || host.wake_at.is_none_or(|at| at > now) {
            return Ok(());
        }
        host.wake_at = None;
        let clock = host.clock(now);
        if host.node.as_ref().and_then(Node::wake_at).is_some_and(|at| at <= clock) {
            self.step(index, Input::Wake)
        } else {
            self.schedule_wake(index)
        }
    }

    fn step(&mut self, index: usize, input: Input) -> Result<(), Violation> {
        let now = self.now;
        let host = &mut self.hosts[index];
        let clock = host.clock(now);
        let Some(node) = host.node.as_mut() else { return Ok(()) };
        let mut effects = Vec::new();
        node.step(clock, input, &mut effects);
        if self.world.flaw == Flaw::SpeaksBeforeItWrites && index == 0 {
            host.undo.push(host.disk.run.clone());
            if host.undo.len() > 3 {
                host.undo.remove(0);
            }
        }
        self.carry_out(index, effects)
    }

    fn carry_out(&mut self, index: usize, effects: Vec<Effect>) -> Result<(), Violation> {
        for effect in effects {
            if self.now < self.world.quiet_at && self.random.chance(CRASH_BETWEEN_PPM) {
                self.crash(index);
                let span = Span(self.random.below(20_000_000));
                self.after(span, Event::Fault(Fault::Restart { host: index }));
                return Ok(());
            }
            self.tell(index, &effect);
            self.watch.see(&Seen {
                host: index,
                effect: &effect,
            })?;
            self.carry_out_one(index, effect)?;
        }
        self.schedule_wake(index)
    }

    fn carry_out_one(&mut self, index: usize, effect: Effect) -> Result<(), Violation> {
        match effect {
            Effect::Persist { what, .. } => {
                let forgets = self.world.flaw == Flaw::ForgetsCommits && index == 0;
                if !(forgets && matches!(what, Persist::Commit(_))) {
                    self.hosts[index].disk.persist(what);
                }
            }
            Effect::Send { to, message } => {
                if let Some(to) = (0..self.hosts.len()).find(|other| node_id(*other) == to) {
                    self.send(index, to, message);
                }
            }
            Effect::Broadcast { message } => {
                for to in (0..self.hosts.len()).filter(|to| *to != index) {
                    self.send(index, to, message.clone());
                }
            }
            Effect::Start { job, work } => return self.begin(index, job, work),
            Effect::Cancel { job } => {
                self.hosts[index].jobs.remove(&job);
                self.part_ways(index, Some(job));
            }
            Effect::Retain { blobs, .. } => self.hosts[index].disk.blobs.retain(|blob| blobs.contains(blob)),
            Effect::Report(_) => {}
        }
        Ok(())
    }

    fn tell(&self, index: usize, effect: &Effect) {
        if !self.tell {
            return;
        }
        let seconds = self.now.0 as f64 / 1e6;
        match effect {
            Effect::Report(Report::Logged { entry }) if entry.author == node_id(index) => match &entry.body {
                Body::Closed { round, set, .. } => {
                    let set: Vec<_> = set.iter().map(|one| (one.replica.0, one.base.0)).collect();
                    eprintln!("{seconds:9.3} entry {} closed {round}: {set:?}", entry.index);
                }
                Body::Applied { round, .. } => eprintln!("{seconds:9.3} entry {} applied {round}", entry.index),
                Body::Genesis { .. } => eprintln!("{seconds:9.3} genesis {:?}", self.world.spec.closing),
                body => eprintln!("{seconds:9.3} entry {} {body:?}", entry.index),
            },
            Effect::Report(Report::Logged { .. }) => {}
            Effect::Report(report) => eprintln!("{seconds:9.3} host {index} {report:?}"),
            Effect::Start { job, work } => {
                let kind = format!("{work:?}");
                let kind = kind.split(' ').next().unwrap_or_default();
                eprintln!("{seconds:9.3} host {index} begins {kind} {job:?}");
            }
            Effect::Cancel { job } => eprintln!("{seconds:9.3} host {index} cancels {job:?}"),
            _ => {}
        }
    }

    fn send(&mut self, from: usize, to: usize, message: RunMessage) {
        for span in self.network.copies(from, to, &mut self.random) {
            let message = message.clone();
            self.after(span, Event::Deliver { to, from, message });
        }
    }

    fn schedule_wake(&mut self, index: usize) -> Result<(), Violation> {
        let host = &mut self.hosts[index];
        let Some(at) = host.node.as_ref().and_then(Node::wake_at) else {
            return Ok(());
        };
        let at = (host.began + Span(at.0)).max(self.now);
        if host.wake_at.is_some_and(|scheduled| scheduled <= at) {
            return Ok(());
        }
        host.wake_at = Some(at);
        let life = host.life;
        let (when, count) = self.wakes_at_once;
        self.wakes_at_once = if when == at { (at, count + 1) } else { (at, 0) };
        if count > WAKES_AT_ONCE_MAX {
            return Err(Violation::new(
                "time goes on",
                format!("host {index} wants to be woken at once, again and again"),
            ));
        }
        self.at(at, Event::Wake { host: index, life });
        Ok(())
    }

    fn after(&mut self, span: Span, event: Event) {
        self.at(self.now + span, event);
    }

    fn at(&mut self, at: Instant, event: Event) {
        self.sequence += 1;
        let sequence = self.sequence;
        self.queue.push(Reverse(Scheduled { at, sequence, event }));
    }

    /// Binds the trace to an event.
    fn note(&mut self, event: &Event) {
        let (kind, one, other) = match event {
            Event::Deliver { to, from, message } => (0u64, *to as u64, (*from as u64) << 8 | tag(message)),
            Event::Wake { host, life } => (1, *host as u64, *life),
            Event::Done { host, job, .. } => (2, *host as u64, job.0),
            Event::Failed { host, job, .. } => (3, *host as u64, job.0),
            Event::Unmet { host, job, .. } => (4, *host as u64, job.0),
            Event::Found { host, peer } => (9, *host as u64, *peer as u64),
            Event::Lost { host, peer } => (5, *host as u64, *peer as u64),
            Event::Join { host } => (6, *host as u64, 0),
            Event::Fault(_) => (7, 0, 0),
            Event::Quiet => (8, 0, 0),
        };
        let mut bytes = self.trace.0.to_vec();
        for number in [self.now.0, kind, one, other, self.sequence] {
            bytes.extend(number.to_le_bytes());
        }
        self.trace = digest(&bytes);
    }
}

fn tag(message: &RunMessage) -> u64 {
    match message {
        RunMessage::Entries { .. } => 0,
        RunMessage::Head { .. } => 1,
        RunMessage::Ask { .. } => 2,
        RunMessage::Join { .. } => 3,
        RunMessage::JoinAnswer { .. } => 4,
        RunMessage::Leave { .. } => 5,
        RunMessage::Alive { .. } => 6,
        RunMessage::Commit(_) => 7,
        RunMessage::Ack { .. } => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_has_one_trace() {
        let trace = |seed| Engine::new(World::of_seed(seed, 6, Flaw::None)).run().trace;
        assert_eq!(trace(3), trace(3));
        assert_ne!(trace(3), trace(4));
    }

    #[test]
    fn thirty_worlds_violate_nothing() {
        for seed in 0..30 {
            let ended = Engine::new(World::of_seed(seed, 8, Flaw::None)).run();
            assert_eq!(ended.violation, None, "seed {seed}");
        }
    }

    /// Here the only replica of an open round was lost, while others waited for the round after it.
    #[test]
    fn worlds_that_once_stood_still_go_on() {
        for (seed, nodes) in [(142, 3), (12, 5), (1144, 8)] {
            let ended = Engine::new(World::of_seed(seed, nodes, Flaw::None)).run();
            assert_eq!(ended.violation, None, "seed {seed} of {nodes} nodes");
        }
    }

    #[test]
    fn finds_a_steward_that_forgets_commits() {
        assert_eq!(found(Flaw::ForgetsCommits), Some("no acknowledged update is lost"));
    }

    #[test]
    fn finds_a_steward_that_speaks_before_it_writes() {
        let found = found(Flaw::SpeaksBeforeItWrites);
        assert!(found.is_some(), "{found:?}");
    }

    #[test]
    fn finds_a_steward_that_steps_in_another_order() {
        assert_eq!(found(Flaw::OtherOrder), Some("states are equal"));
    }

    #[test]
    fn finds_a_steward_that_never_closes() {
        assert_eq!(found(Flaw::NeverCloses), Some("rounds go on"));
    }

    /// The first invariant that a flaw violates in a hundred worlds.
    fn found(flaw: Flaw) -> Option<&'static str> {
        (0..100).find_map(|seed| {
            let ended = Engine::new(World::of_seed(seed, 8, flaw)).run();
            ended.violation.map(|violation| violation.invariant)
        })
    }
}
