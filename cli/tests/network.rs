//! Real nodes behind routers, firewalls and proxies, in a laboratory of network namespaces.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use polder_protocol::invite::Invite;
use serde_json::Value;
use support::lab::{Host, Lab, Site, WORLD};
use support::{Node, wait_for};

/// Where the helper listens that is the campus's proxy.
const PROXY: &str = "POLDER_LAB_PROXY";

/// What a change of network may cost. Measured where nothing else runs it is half of that.
const HEAL_TIME_MAX: Duration = Duration::from_secs(10);

/// What members get to meet each other.
const MEET_TIME_MAX: Duration = Duration::from_secs(60);

/// Everybody reaches everybody, and the way is printed. A table, since it is what a release is judged by.
#[test]
fn every_kind_of_network_reaches_every_other() {
    let Some(mut town) = Town::new(2) else { return };
    for (name, site) in [
        ("open", Site::Open),
        ("cone-a", Site::Cone),
        ("cone-b", Site::Cone),
        ("symmetric-a", Site::Symmetric),
        ("symmetric-b", Site::Symmetric),
        ("no-udp", Site::UdpBlocked),
        ("proxy-only", Site::ProxyOnly),
        ("ipv6-only", Site::Ipv6Only),
    ] {
        town.join(name, site);
    }
    let names: Vec<String> = town.nodes.iter().skip(2).map(|(node, _)| node.name.clone()).collect();
    for name in &names {
        town.meets_gateways(name);
    }
    println!(
        "{:<12} {:<12} {:<8} {:>12} {:>10}  afterwards",
        "from", "to", "way", "first 64 KiB", "p50"
    );
    let mut begun = Vec::new();
    for (place, from) in names.iter().enumerate() {
        for to in &names[place + 1..] {
            let began = Instant::now();
            let report = town.echo(from, to);
            begun.push((from.clone(), to.clone(), began));
            let way = report["road"].as_str().unwrap();
            let expects_straight = from.starts_with("cone") && to.starts_with("cone");
            let later = town.way_later(from, to, if expects_straight { 5 } else { 0 });
            let millis = |value: &Value| value.as_f64().unwrap_or(f64::NAN) / 1000.0;
            println!(
                "{from:<12} {to:<12} {way:<8} {:>9.1} ms {:>7.2} ms  {later}",
                millis(&report["first_micros"]),
                millis(&report["p50_micros"]),
            );
        }
    }
    for (name, what, health, words, ask) in [
        ("open", "address", "good", "public: ", None),
        ("cone-a", "UDP", "good", "comes back", None),
        ("cone-a", "address", "good", "keeps one port", None),
        (
            "symmetric-a",
            "address",
            "fair",
            "another port for every peer",
            Some("forward UDP port 4002"),
        ),
        ("no-udp", "UDP", "bad", "inside TCP", Some("allow outgoing UDP")),
        ("proxy-only", "gateways", "good", "through http://192.168.", None),
        ("ipv6-only", "IPv6", "good", "2001:db8::", None),
    ] {
        let findings = town.node(name).doctor(&[])["findings"].clone();
        let found = findings
            .as_array()
            .and_then(|all| all.iter().find(|finding| finding["what"] == what))
            .cloned();
        let found = found.unwrap_or_else(|| panic!("{name} says nothing of {what}: {findings}"));
        println!("{name}: {found}");
        assert_eq!(found["health"], health, "{name}: {found}");
        assert!(found["words"].as_str().unwrap().contains(words), "{name}: {found}");
        assert_eq!(found["ask"].is_string(), ask.is_some(), "{name}: {found}");
        assert!(
            ask.is_none_or(|ask| found["ask"].as_str().unwrap().contains(ask)),
            "{name}: {found}"
        );
    }
    // Punches have had their time by now: those that can be straight are.
    for (from, to, _) in begun
        .iter()
        .filter(|(from, to, _)| from.starts_with("cone") && to.starts_with("cone"))
    {
        assert_ne!(
            town.way(from, to),
            "relayed",
            "{from} {to}\n{}",
            town.node(from).last_words()
        );
    }
    assert_eq!(town.way("no-udp", "open"), "tcp", "TCP leads straight there");
    for (from, to) in [("symmetric-a", "symmetric-b"), ("no-udp", "proxy-only")] {
        assert_eq!(
            town.way(from, to),
            "relayed",
            "no straight way is possible: {from} {to}"
        );
    }
}

/// A laptop moves to another network, and a cable is pulled and put back: both are members again within ten seconds.
#[test]
fn a_change_of_network_heals_within_ten_seconds() {
    let Some(mut town) = Town::new(1) else { return };
    town.join("still", Site::Cone);
    town.join("moving", Site::Open);
    for name in ["still", "moving"] {
        town.meets_gateways(name);
    }
    town.echo("still", "moving");

    let (old, new) = (town.host("moving").number, 99);
    let began = Instant::now();
    town.host("moving").ip(&format!("addr del {WORLD}.{old}/24 dev wan"));
    town.host("moving").ip(&format!("addr add {WORLD}.{new}/24 dev wan"));
    town.echo("moving", "still");
    let there = began.elapsed();
    town.echo("still", "moving");
    println!(
        "another address: heard after {:.1} s, and heard from after {:.1} s",
        there.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    assert!(
        began.elapsed() < HEAL_TIME_MAX,
        "{:?}\n{}",
        began.elapsed(),
        town.node("moving").last_words()
    );

    let router = town.host("still").number;
    town.host("still").ip("link set eth0 down");
    std::thread::sleep(Duration::from_secs(12));
    town.host("still").ip("link set eth0 up");
    town.host("still")
        .ip(&format!("route add default via 192.168.{router}.1"));
    let began = Instant::now();
    town.echo("still", "moving");
    let there = began.elapsed();
    town.echo("moving", "still");
    println!(
        "a cable out for 12 s: heard after {:.1} s, and heard from after {:.1} s",
        there.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    assert!(
        began.elapsed() < HEAL_TIME_MAX,
        "{:?}\n{}",
        began.elapsed(),
        town.node("still").last_words()
    );
}

/// A router that gives every peer another port can be asked to open one: then its nodes are met straight, and when they
/// leave it is as closed as before.
#[test]
fn a_router_that_is_asked_opens_ports_until_the_node_stops() {
    if let Err(reason) = Lab::has_program("miniupnpd") {
        println!("skipped: no router that can be asked here: {reason}");
        return;
    }
    let Some(mut town) = Town::new(1) else { return };
    town.join("far", Site::Symmetric);
    for (name, site, language) in [("natpmp", Site::NatPmp, "NAT-PMP"), ("upnp", Site::Upnp, "UPnP")] {
        let began = Instant::now();
        town.join(name, site);
        town.meets_gateways(name);
        let words = wait_for("the router to open ports", MEET_TIME_MAX, || {
            let words = town.finding(name, "router")?["words"].as_str()?.to_owned();
            words.contains("has opened").then_some(words)
        });
        println!(
            "{name}: {words}, {:.1} s after its start",
            began.elapsed().as_secs_f64()
        );
        assert!(
            words.contains(&format!("TCP 4001, UDP 4001, UDP 4002 over {language}")),
            "{words}"
        );
        let address = town.finding(name, "address").unwrap();
        assert_eq!(address["health"], "good", "{address}");
        assert_eq!(town.host(name).opened().len(), 3, "{:?}", town.host(name).opened());

        town.meets_gateways("far");
        town.echo("far", name);
        let later = town.way_later("far", name, 15);
        println!("far to {name}: {later}");
        let peer = town.peer("far", name).unwrap();
        assert_eq!(
            peer["data_path"]["road"],
            "direct",
            "{peer}\n{}",
            town.node("far").last_words()
        );
        let mapped = format!("{WORLD}.{}:4002", town.host(name).number);
        assert_eq!(peer["data_path"]["address"], mapped, "{peer}");

        town.node_mut(name).leave();
        assert_eq!(town.host(name).opened(), Vec::<String>::new(), "{name} has left");
    }
}

/// Members whose only way leads through a gateway get what its owner gives, and no more; without a cap the circuit is held up
/// by nothing but the machine.
#[test]
fn a_capped_gateway_gives_a_circuit_no_more_than_its_cap() {
    const CAP_BYTES_PER_SECOND: u64 = 512 << 10;
    const BYTES: u64 = 4 << 20;
    let Some(mut town) = Town::new(1) else { return };
    for name in ["symmetric-a", "symmetric-b"] {
        town.join(name, Site::Symmetric);
    }
    let config = town.gateway().home.join("config.toml");
    let uncapped = fs::read_to_string(&config).unwrap();
    let caps = ["", "relay_bytes_per_second", "relay_bytes_per_second_of_each_circuit"];
    let mut free = f64::NAN;
    for cap in caps {
        let line = match cap {
            "" => String::new(),
            cap => format!("{cap} = {CAP_BYTES_PER_SECOND}\n"),
        };
        town.node_mut("gateway-0").leave();
        fs::write(&config, format!("{uncapped}{line}")).unwrap();
        town.node_mut("gateway-0").start(&[]);
        for name in ["symmetric-a", "symmetric-b"] {
            town.meets_gateways(name);
        }
        town.echo("symmetric-a", "symmetric-b");
        let id = town.ids["symmetric-b"].clone();
        let report = wait_for("a transfer through the gateway", MEET_TIME_MAX, || {
            let size = BYTES.to_string();
            let arguments = ["bench", "net", "--peer", &id, "--count", "1", "--bulk", &size];
            town.node("symmetric-a").try_verb(&arguments).ok()
        });
        assert_eq!(town.way("symmetric-a", "symmetric-b"), "relayed");
        let seconds = report["bulk"]["micros"].as_f64().unwrap() / 1e6;
        println!(
            "{} through a gateway in {seconds:.2} s, {:.2} MiB/s, with {}",
            report["bulk"]["bytes"],
            BYTES as f64 / seconds / f64::from(1 << 20),
            if cap.is_empty() { "no cap" } else { line.trim() }
        );
        // Time runs from the first byte. What a pause leaves, and what is between the gateway and the receiver then, come
        // at once.
        let held = 0.7 * BYTES as f64 / CAP_BYTES_PER_SECOND as f64;
        if cap.is_empty() {
            free = seconds;
        } else {
            assert!(seconds > held, "{cap}: {seconds} s, {report}");
            assert!(seconds > 1.5 * free, "{cap}: {seconds} s, and {free} s without a cap");
        }
    }
}

/// A machine gets another address, a router opens a port: the next invite leads there.
#[test]
fn an_invite_names_the_addresses_that_its_gateway_has_now() {
    let Some(mut town) = Town::new(1) else { return };
    let known = |node: &Node| fs::read_to_string(node.home.join("addresses.json")).unwrap();
    let named = |node: &Node| {
        let invite: Invite = support::invite(node, "Leiden").parse().unwrap();
        invite.doors[0].control.clone()
    };
    let other = format!("/ip4/{WORLD}.98/tcp/4001");
    assert!(!named(town.gateway()).contains(&other));
    town.host("gateway-0").ip(&format!("addr add {WORLD}.98/24 dev wan"));
    wait_for("the new address", MEET_TIME_MAX, || {
        known(town.gateway()).contains(&other).then_some(())
    });
    assert!(named(town.gateway()).contains(&other));
    town.host("gateway-0").ip(&format!("addr del {WORLD}.98/24 dev wan"));
    wait_for("it to go", MEET_TIME_MAX, || {
        (!known(town.gateway()).contains(&other)).then_some(())
    });
    if let Err(reason) = Lab::has_program("miniupnpd") {
        println!("skipped in part: no router that can be asked here: {reason}");
        return;
    }
    // A gateway at home: its router has opened the port under which a newcomer finds it.
    let host = town.lab.host("home", Site::NatPmp);
    let mut home = Node::prepare_on(&host, town.root.path(), "home", "");
    home.verb(&["charter", "new", "Second", "--institution", "Leiden"]);
    home.start(&[]);
    let mapped = format!("/ip4/{WORLD}.{}/tcp/4001", host.number);
    wait_for("the opened port", MEET_TIME_MAX, || {
        known(&home).contains(&mapped).then_some(())
    });
    assert_eq!(named(&home)[0], mapped, "the public address comes first");
}

/// Before there is a node: which ways lead to the gateway of an invite, and what to ask for where some do not.
#[test]
fn doctor_tells_before_joining_which_ways_lead_to_a_gateway() {
    let Some(mut town) = Town::new(1) else { return };
    let invite = support::invite(town.gateway(), "Leiden");
    let gateway = format!("{WORLD}.{}", town.host("gateway-0").number);
    let udp = format!("allow outgoing UDP from this machine to {gateway} ports 4001 and 4002");
    let tcp = format!("allow outgoing TCP from this machine to {gateway} port 4001 or 443");
    let sites = [
        ("cone", Site::Cone, ["good", "good", "good", "good", "good"], None),
        (
            "no-udp",
            Site::UdpBlocked,
            ["good", "fair", "good", "good", "fair"],
            Some(&udp),
        ),
        (
            "proxy-only",
            Site::ProxyOnly,
            ["good", "fair", "fair", "good", "fair"],
            Some(&udp),
        ),
        (
            "walled-in",
            Site::ProxyOnly,
            ["bad", "bad", "bad", "bad", "fair"],
            Some(&tcp),
        ),
    ];
    for (name, site, expected, ask) in sites {
        let host = town.lab.host(name, site);
        let proxy = format!("192.168.{}.1:3128", host.number);
        let mut settings = String::new();
        if name == "proxy-only" {
            town.lab.helper(&host, "proxy", (PROXY, &proxy));
            settings = format!("proxy = \"http://{proxy}\"\n");
        }
        let node = Node::prepare_on(&host, town.root.path(), name, &settings);
        let began = Instant::now();
        let answer = node.doctor(&["--invite", &invite]);
        println!("{name}, after {:.1} s:", began.elapsed().as_secs_f64());
        let output = node.output(&["doctor", "--invite", &invite]);
        println!("{}", String::from_utf8_lossy(&output.stdout));
        let findings = answer["findings"].as_array().unwrap();
        for (what, health) in ["gateway", "QUIC", "TCP", "WebSocket", "data"]
            .into_iter()
            .zip(expected)
        {
            let found = findings.iter().find(|finding| finding["what"] == what);
            let found = found.unwrap_or_else(|| panic!("{name} says nothing of {what}: {answer}"));
            assert_eq!(found["health"], health, "{name}: {found}");
        }
        let asks = |line: &String| {
            let all = findings.iter().filter_map(|finding| finding["ask"].as_str());
            all.into_iter().any(|ask| ask.contains(line.as_str()))
        };
        assert!(ask.is_none_or(asks), "{name}: {answer}");
        assert_eq!(ask.is_some(), asks(&udp), "{name}: {answer}");
    }
}

/// The campus's proxy: CONNECT to port 443 and nothing else. Not a test: the laboratory starts it in a router.
#[test]
#[ignore = "a helper of the other tests"]
fn proxy() {
    let Ok(address) = std::env::var(PROXY) else { return };
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            std::thread::spawn(move || serve_proxy(stream));
        }
    });
    // Until whoever started it is gone.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

fn serve_proxy(mut inside: TcpStream) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 4096 {
        let mut byte = [0];
        inside.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let target = head.strip_prefix("CONNECT ")?.split(' ').next()?.to_owned();
    if !target.ends_with(":443") {
        inside.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").ok()?;
        return None;
    }
    let Ok(outside) = TcpStream::connect(target) else {
        inside.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").ok()?;
        return None;
    };
    inside.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
    let (mut from, mut to) = (inside.try_clone().ok()?, outside.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let (mut from, mut to) = (outside, inside);
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    Some(())
}

/// Two laboratories at a time would measure each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A federation in a laboratory. The first nodes are its gateways. Nodes end before their networks do.
struct Town {
    nodes: Vec<(Node, Host)>,
    ids: BTreeMap<String, String>,
    lab: Lab,
    root: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Town {
    /// A federation of so many gateways, or `None` where this machine cannot have a laboratory; it says why.
    fn new(gateways: usize) -> Option<Self> {
        // A test that has failed has said so.
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = match Lab::new() {
            Ok(lab) => lab,
            Err(reason) => {
                println!("skipped: no network laboratory here: {reason}");
                return None;
            }
        };
        let root = tempfile::tempdir().unwrap();
        let mut town = Self {
            nodes: Vec::new(),
            ids: BTreeMap::new(),
            lab,
            root,
            _alone: alone,
        };
        for number in 0..gateways {
            let name = format!("gateway-{number}");
            let host = town.lab.host(&name, Site::Open);
            let also = "listen_also = [\"/ip4/0.0.0.0/tcp/443/ws\", \"/ip6/::/tcp/443/ws\"]\n";
            let mut node = Node::prepare_on(&host, town.root.path(), &name, also);
            if number == 0 {
                node.verb(&["charter", "new", "Test", "--institution", "Leiden"]);
                node.start(&[]);
            } else {
                let invite = town.gateway().verb(&["invite", "--capabilities", "all"]);
                node.start(&[invite["invite"].as_str().unwrap()]);
            }
            town.add(node, host);
        }
        Some(town)
    }

    fn gateway(&self) -> &Node {
        &self.nodes[0].0
    }

    /// Adds a member behind `site`.
    fn join(&mut self, name: &str, site: Site) {
        let host = self.lab.host(name, site);
        let mut settings = String::new();
        if site == Site::ProxyOnly {
            let proxy = format!("192.168.{}.1:3128", host.number);
            self.lab.helper(&host, "proxy", (PROXY, &proxy));
            settings = format!("proxy = \"http://{proxy}\"\n");
        }
        let mut node = Node::prepare_on(&host, self.root.path(), name, &settings);
        let invite = support::invite(self.gateway(), "Leiden");
        node.start(&[&invite]);
        self.add(node, host);
    }

    fn add(&mut self, node: Node, host: Host) {
        let id = node.verb(&["status"])["node"].as_str().unwrap().to_owned();
        self.ids.insert(node.name.clone(), id);
        self.nodes.push((node, host));
    }

    fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|(node, _)| node.name == name);
        &found.expect("a member").0
    }

    fn node_mut(&mut self, name: &str) -> &mut Node {
        let found = self.nodes.iter_mut().find(|(node, _)| node.name == name);
        &mut found.expect("a member").0
    }

    fn host(&self, name: &str) -> &Host {
        let found = self.nodes.iter().find(|(node, _)| node.name == name);
        &found.expect("a member").1
    }

    /// Waits until a node is connected to all gateways.
    fn meets_gateways(&self, name: &str) {
        let gateways: Vec<&String> = self
            .nodes
            .iter()
            .map(|(node, _)| &node.name)
            .filter(|name| name.starts_with("gateway"))
            .map(|name| &self.ids[name])
            .collect();
        let node = self.node(name);
        wait_for(
            &format!("{name} to meet the gateways:\n{}", node.last_words()),
            MEET_TIME_MAX,
            || {
                let peers = node.verb(&["peers"])["peers"].clone();
                let present = |id: &str| {
                    peers
                        .as_array()
                        .is_some_and(|peers| peers.iter().any(|peer| peer["node"] == id && peer["path"] != "lost"))
                };
                gateways.iter().all(|id| present(id)).then_some(())
            },
        );
    }

    /// Times 64 KiB from one member to another and back. The first tries may come before they have heard of each other.
    fn echo(&self, from: &str, to: &str) -> Value {
        let id = self.ids[to].clone();
        let mut last = String::new();
        let node = self.node(from);
        wait_for(&format!("an echo from {from} to {to}"), MEET_TIME_MAX, || {
            match node.try_verb(&["bench", "net", "--peer", &id, "--count", "10"]) {
                Ok(report) => Some(report),
                Err(error) => {
                    if error != last {
                        println!("{from} to {to}: {}", error.trim());
                        last = error;
                    }
                    None
                }
            }
        })
    }

    /// What `polder doctor` on a node says of something.
    fn finding(&self, name: &str, what: &str) -> Option<Value> {
        let findings = self.node(name).doctor(&[])["findings"].clone();
        let found = findings.as_array()?.iter().find(|finding| finding["what"] == what);
        found.cloned()
    }

    /// What one member says of another.
    fn peer(&self, from: &str, to: &str) -> Option<Value> {
        let peers = self.node(from).verb(&["peers"])["peers"].clone();
        let id = self.ids[to].as_str();
        peers.as_array()?.iter().find(|peer| peer["node"] == id).cloned()
    }

    /// The way that data goes from one member to another.
    fn way(&self, from: &str, to: &str) -> String {
        self.peer(from, to)
            .and_then(|peer| peer["data_path"]["road"].as_str().map(str::to_owned))
            .unwrap_or_else(|| "none".into())
    }

    /// The way as it is so many seconds later, or as soon as it is straight.
    fn way_later(&self, from: &str, to: &str, seconds: u64) -> String {
        let began = Instant::now();
        loop {
            let way = self.way(from, to);
            if way != "relayed" || began.elapsed() >= Duration::from_secs(seconds) {
                return format!("{way} after {} ms", began.elapsed().as_millis());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
