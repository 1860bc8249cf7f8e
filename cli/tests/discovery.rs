//! Many real daemons on one machine: they find each other, and it is measured what that costs each of them.
//!
//! `POLDER_DAEMONS=200` makes it as large as a federation's first year.

mod support;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use polder_node::control::{self, ControlConfig};
use polder_node::gate::Gate;
use polder_node::home::Home;
use polder_node::members::{Members, unix_now};
use polder_protocol::directory::{ANNOUNCEMENT_VERSION, Announcement, announcement_seconds};
use polder_protocol::identity::Signed;
use polder_protocol::time::UnixSeconds;
use support::{Node, invite, wait_for};

/// Daemons of the smallest run.
const DAEMONS: usize = 12;

/// Daemons that are started at the same time: starting one is work for every other that it meets.
const STARTED_AT_ONCE: usize = 4;

/// Neighbours that each has in the end, where there are so many: a node looks for 16, of which some may be busy.
const NEIGHBOURS: usize = 12;

/// How long traffic is counted.
const COUNTED: Duration = Duration::from_secs(60);

const IDLE: &str = "train = false\nserve = false\nthreads = 1\n";

#[test]
fn many_idle_daemons_find_each_other_at_a_bounded_cost() {
    let count: usize = std::env::var("POLDER_DAEMONS")
        .ok()
        .map_or(DAEMONS, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = support::federation(folder.path(), "Leiden", &[("gateway", IDLE)]);
    let began = Instant::now();
    while nodes.len() < count {
        let numbers = nodes.len()..count.min(nodes.len() + STARTED_AT_ONCE);
        let (gateway, root) = (&nodes[0], folder.path());
        let start = |number: usize| {
            let mut node = Node::prepare(root, &format!("node-{number}"), IDLE);
            node.start(&[&invite(gateway, "Leiden")]);
            node
        };
        let started: Vec<Node> = std::thread::scope(|scope| {
            let each: Vec<_> = numbers.map(|number| scope.spawn(move || start(number))).collect();
            each.into_iter().map(|node| node.join().unwrap()).collect()
        });
        nodes.extend(started);
        if nodes.len() % 20 < STARTED_AT_ONCE {
            println!("{} run after {:.0} s", nodes.len(), began.elapsed().as_secs_f64());
        }
    }
    let started = began.elapsed();
    // Announcements are repeated every half minute: whoever missed one hears the next.
    let (enough, known_enough) = ((count - 1).min(NEIGHBOURS), count - count / 50);
    let patience = Duration::from_secs(120 + count as u64);
    let mut missing: Vec<&Node> = nodes.iter().collect();
    wait_for("all to find all others", patience, || {
        // To ask costs them something too.
        std::thread::sleep(Duration::from_secs(1));
        missing.retain(|node| {
            let (neighbours, known) = found(node);
            neighbours < enough || known < known_enough
        });
        missing.is_empty().then_some(())
    });
    let all_found = began.elapsed();
    let (bytes, packets) = loopback();
    let cpu: f64 = nodes.iter().map(|node| cpu_seconds(node.process())).sum();
    std::thread::sleep(COUNTED);
    let (bytes_after, packets_after) = loopback();
    let cpu_after: f64 = nodes.iter().map(|node| cpu_seconds(node.process())).sum();
    let each = |value: u64| value as f64 / count as f64 / COUNTED.as_secs_f64();
    let memory = |what| sorted(nodes.iter().map(|node| memory_kib(node.process(), what)));
    let (resident, share) = (memory("Rss:"), memory("Pss:"));
    let (neighbours, known): (Vec<usize>, Vec<usize>) = nodes.iter().map(found).unzip();
    let (neighbours, known) = (sorted(neighbours.into_iter().skip(1)), sorted(known.into_iter()));
    println!(
        "{count} daemons: started, {STARTED_AT_ONCE} at a time, in {:.0} s; all have found each other after {:.0} s",
        started.as_secs_f64(),
        all_found.as_secs_f64()
    );
    println!(
        "each knows {} at least, and has {} neighbours at least, {} in the middle, {} at most (the gateway has all)",
        known[0],
        neighbours[0],
        neighbours[neighbours.len() / 2],
        neighbours[neighbours.len() - 1]
    );
    println!(
        "per daemon and second: {:.0} bytes in {:.1} packets on loopback, headers and both planes included; {:.1} ms of CPU",
        each(bytes_after - bytes),
        each(packets_after - packets),
        (cpu_after - cpu) / count as f64 / COUNTED.as_secs_f64() * 1e3
    );
    println!(
        "memory per daemon: {} MiB resident in the middle, {} MiB at most; {} MiB where what several share is divided",
        resident[count / 2] / 1024,
        resident[count - 1] / 1024,
        share[count / 2] / 1024
    );
    assert!(each(bytes_after - bytes) < 64e3, "too much talk");
    assert!(resident[count / 2] < 256 << 10, "too much memory");
    assert!(
        neighbours[neighbours.len() / 2] < 64,
        "neighbours grow with the federation"
    );
    for node in &nodes {
        assert!(!node.log().contains("panicked"), "{}", node.last_words());
    }
}

#[test]
fn doctor_tells_a_clock_that_is_off_from_those_of_members() {
    let folder = tempfile::tempdir().unwrap();
    let [gateway, mut second] = <[Node; 2]>::try_from(support::federation(
        folder.path(),
        "Leiden",
        &[("gateway", IDLE), ("second", IDLE)],
    ))
    .unwrap();
    // From here on the test is the second node, since it can choose what time it believes it is.
    second.leave();
    let home = Home::open(&second.home).unwrap();
    let (key, members) = (home.node_key().unwrap(), Arc::new(Members::open(&home).unwrap()));
    let status = gateway.verb(&["status"]);
    let door = status["control"].as_array().unwrap();
    let door: Vec<String> = door
        .iter()
        .map(|address| address.as_str().unwrap().to_owned())
        .collect();
    let mut config = ControlConfig::loopback(key.seed());
    config.bootstrap = vec![(status["node"].as_str().unwrap().parse().unwrap(), door)];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let gate: Arc<dyn Gate> = Arc::clone(&members) as Arc<dyn Gate>;
    let (control, _driver) = runtime.block_on(control::start(config, gate)).unwrap();
    let topic = format!("polder/{}/directory", members.federation());
    let _heard = control.subscribe(&topic);
    let mut sequence = 1 << 60;
    for (ahead, health, side) in [
        (0_i64, "good", "certificates allow"),
        (200, "fair", "s behind that of the one member heard"),
        (-250, "fair", "s ahead of that of the one member heard"),
        (400, "bad", "s behind that of the one member heard"),
    ] {
        let found = wait_for("the doctor's word", Duration::from_secs(60), || {
            sequence += 1;
            let life = i64::try_from(announcement_seconds(2)).unwrap();
            let announcement = Announcement {
                version: ANNOUNCEMENT_VERSION,
                federation: members.federation(),
                node: members.node(),
                credentials: members.credentials(),
                sequence,
                expires: UnixSeconds(unix_now().0.checked_add_signed(ahead + life).unwrap()),
                stages: Vec::new(),
                epochs: Vec::new(),
            };
            let told = Signed::new(&key, &announcement).to_bytes();
            // Nobody listens until they have met.
            let _ = runtime.block_on(control.publish(&topic, told));
            std::thread::sleep(Duration::from_millis(500));
            let findings = gateway.doctor(&[])["findings"].clone();
            let all = findings.as_array().unwrap();
            let clock = all.iter().find(|finding| finding["what"] == "clock").unwrap().clone();
            (clock["health"] == health && clock["words"].as_str().unwrap().contains(side)).then_some(clock)
        });
        println!("{ahead} s ahead: {found}");
        assert_eq!(found["ask"].is_string(), health != "good", "{found}");
    }
}

#[test]
fn any_one_of_the_invites_doors_last_known_peers_and_a_listed_name_leads_back() {
    let folder = tempfile::tempdir().unwrap();
    let [gateway, mut node] = <[Node; 2]>::try_from(support::federation(
        folder.path(),
        "Leiden",
        &[("gateway", IDLE), ("node", IDLE)],
    ))
    .unwrap();
    let met = |node: &Node| {
        wait_for("the gateway", Duration::from_secs(60), || {
            let status = node.try_verb(&["status"]).unwrap_or_default();
            let peers = status["peers"].as_array()?;
            peers.iter().any(|peer| peer["path"] == "direct").then_some(())
        });
    };
    let (doors, index) = (node.home.join("peers.json"), Home::open(&node.home).unwrap().index());
    let forget = |what: &std::path::Path| {
        if what.is_dir() {
            fs::remove_dir_all(what).unwrap();
        } else if what.exists() {
            fs::remove_file(what).unwrap();
        }
    };
    met(&node);
    // The doors of the invite alone.
    node.leave();
    forget(&index);
    node.start(&[]);
    met(&node);
    // Whom it met last alone.
    node.leave();
    let kept = fs::read(&doors).unwrap();
    forget(&doors);
    node.start(&[]);
    met(&node);
    // A name in the configuration alone, which is looked up.
    node.leave();
    forget(&doors);
    forget(&index);
    let status = gateway.verb(&["status"]);
    let addresses = status["control"].as_array().unwrap();
    let port = addresses
        .iter()
        .find_map(|address| address.as_str()?.split("/tcp/").nth(1))
        .unwrap();
    let id = status["node"].as_str().unwrap();
    let config = node.home.join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        format!("{text}bootstrap = [\"{id}@/dns4/localhost/tcp/{port}\"]\n"),
    )
    .unwrap();
    node.start(&[]);
    met(&node);
    // And nothing of the three leads nowhere.
    node.leave();
    forget(&doors);
    forget(&index);
    fs::write(&config, text).unwrap();
    node.start(&[]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(node.verb(&["status"])["peers"].as_array().unwrap().len(), 0);
    fs::write(&doors, kept).unwrap();
}

#[test]
fn the_charter_alone_leads_a_second_institutions_gateway_to_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let [first] = <[Node; 1]>::try_from(support::federation(folder.path(), "Leiden", &[("first", IDLE)])).unwrap();
    let status = first.verb(&["status"]);
    let addresses = status["control"].as_array().unwrap();
    let address = addresses
        .iter()
        .find_map(|address| address.as_str().filter(|text| text.contains("/tcp/")));
    let door = format!("{}@{}", status["node"].as_str().unwrap(), address.unwrap());
    let mut second = Node::prepare(folder.path(), "second", IDLE);
    let key = second.verb(&["institution", "new", "Utrecht"])["key"]
        .as_str()
        .unwrap()
        .to_owned();
    // All that the second gateway gets is this file, by mail perhaps.
    let file = folder.path().join("next.charter");
    let file = file.to_str().unwrap();
    let entry = format!("{key}=Utrecht");
    let next = first.verb(&[
        "charter",
        "new",
        "--add-institution",
        &entry,
        "--door",
        &door,
        "--to",
        file,
    ]);
    assert_eq!(next["doors"][0], door);
    assert_eq!(second.verb(&["charter", "sign", file])["node_certified"], true);
    second.start(&[]);
    wait_for("the first gateway", Duration::from_secs(60), || {
        let status = second.try_verb(&["status"]).unwrap_or_default();
        let peers = status["peers"].as_array()?;
        peers.iter().any(|peer| peer["path"] == "direct").then_some(())
    });
    // Without the door it would have found nobody: the next charter takes it away, and the traces of the meeting go too.
    second.leave();
    let node = door.split('@').next().unwrap();
    first.verb(&["charter", "new", "--remove-door", node, "--to", file]);
    assert!(
        second.verb(&["charter", "sign", file])["doors"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    fs::remove_dir_all(Home::open(&second.home).unwrap().index()).unwrap();
    second.start(&[]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(second.verb(&["status"])["peers"].as_array().unwrap().len(), 0);
}

/// Bytes and packets that have gone through the loopback interface.
fn loopback() -> (u64, u64) {
    let devices = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"));
    let mut numbers = line
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse().ok());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default())
}

/// Processor time of a process so far, in ticks of 10 ms.
fn cpu_seconds(process: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after_name = text.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2);
    ticks.filter_map(|word| word.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Memory of a process in KiB, with what it shares with others (`Rss:`) or with its part of that (`Pss:`).
fn memory_kib(process: u32, what: &str) -> usize {
    let memory = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    let line = memory.lines().find_map(|line| line.strip_prefix(what));
    line.and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

/// Members that a node is connected to, and those that it has heard of, itself among them.
fn found(node: &Node) -> (usize, usize) {
    let status = node.try_verb(&["status"]).unwrap_or_default();
    let present = |peers: &Vec<serde_json::Value>| peers.iter().filter(|peer| peer["path"] != "lost").count();
    let known = status["known"].as_u64().unwrap_or_default();
    (
        status["peers"].as_array().map_or(0, present),
        usize::try_from(known).unwrap(),
    )
}

fn sorted(values: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut values: Vec<usize> = values.collect();
    values.sort_unstable();
    values
}
