//! What is wrong from outside, with the real binary: each gets a clear error and changes nothing.

mod support;

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use polder_node::enrol::packet;
use polder_node::home::Home;
use polder_node::members::unix_now;
use polder_protocol::charter::{Capabilities, Certificate};
use polder_protocol::identity::Signed;
use polder_protocol::time::UnixSeconds;
use serde_json::json;
use support::{Node, federation, invite, wait_for};

const SEEN_TIME_MAX: Duration = Duration::from_secs(60);

#[test]
fn a_broken_model_is_not_imported() {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::prepare(folder.path(), "a", "");
    let good = hugging_face(&folder.path().join("good"), |_| {});
    let imported = node.verb(&["model", "import", good.to_str().unwrap()]);
    assert_eq!(imported["parts"], 5);

    let refused = |name: &str, path: &Path, words: &[&str]| {
        let node = Node::prepare(folder.path(), name, "");
        let error = node.try_verb(&["model", "import", path.to_str().unwrap()]).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{name}: `{word}` is missing from: {error}");
        }
        assert_eq!(node.verb(&["model", "list"])["models"], json!([]));
        assert_eq!(left_behind(&node), Vec::<PathBuf>::new(), "{name}");
    };
    let cut = hugging_face(&folder.path().join("cut"), |weights| {
        weights.truncate(weights.len() - 7)
    });
    refused("truncated-safetensors", &cut, &["model.safetensors"]);
    let headless = hugging_face(&folder.path().join("headless"), |weights| weights.truncate(5));
    refused("headless-safetensors", &headless, &["model.safetensors"]);
    let lying = hugging_face(&folder.path().join("lying"), |weights| {
        // The embedding says that it has a row more than its bytes hold; the length of the header stays.
        let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        let text = String::from_utf8(weights[8..8 + header].to_vec()).unwrap();
        let at = text.find("\"shape\":[").unwrap() + "\"shape\":[".len();
        weights[8 + at] = if weights[8 + at] == b'9' {
            b'8'
        } else {
            weights[8 + at] + 1
        };
    });
    refused("lying-safetensors", &lying, &["model.safetensors"]);

    let gguf = folder.path().join("lying.gguf");
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(u64::MAX.to_le_bytes());
    bytes.extend(u64::MAX.to_le_bytes());
    fs::write(&gguf, &bytes).unwrap();
    refused("lying-gguf", &gguf, &["lying.gguf"]);
    if let Some(whole) = std::env::var_os("POLDER_SMOLLM2_GGUF") {
        let bytes = fs::read(whole).unwrap();
        for (name, length) in [("gguf-cut-in-header", 40_000), ("gguf-cut-in-weights", bytes.len() / 2)] {
            let path = folder.path().join(format!("{name}.gguf"));
            fs::write(&path, &bytes[..length]).unwrap();
            refused(name, &path, &[name]);
        }
    }
    refused("nothing", &folder.path().join("absent"), &["absent"]);
}

#[test]
fn an_invite_that_does_not_fit_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut ours = federation(&folder.path().join("ours"), "Leiden", &[("a", ""), ("b", "")]);
    let others = federation(&folder.path().join("others"), "Uppsala", &[("c", "")]);
    let foreign = invite(&others[0], "Uppsala");
    let mut member = ours.remove(1);
    let before = member.verb(&["status"])["federation"].clone();
    member.leave();
    let error = member.try_verb(&["join", &foreign]).unwrap_err();
    assert!(error.contains("a member of `Test`"), "{error}");
    member.start(&[]);
    assert_eq!(member.verb(&["status"])["federation"], before);

    // A line is for one node.
    let line = invite(&ours[0], "Leiden");
    let (mut first, second) = (
        Node::prepare(folder.path(), "first", ""),
        Node::prepare(folder.path(), "second", ""),
    );
    first.start(&[&line]);
    let error = second.try_verb(&["join", &line]).unwrap_err();
    assert!(error.contains("used"), "{error}");
    let error = second.try_verb(&["join", &line[..line.len() - 9]]).unwrap_err();
    assert!(
        error.contains("this invite cannot be used") && error.contains("hint:"),
        "{error}"
    );
    let error = second.try_verb(&["join"]).unwrap_err();
    assert!(error.contains("hint: ask your institution's gateway"), "{error}");

    // Nobody is at home.
    let line = invite(&ours[0], "Leiden");
    ours[0].leave();
    let error = second.try_verb(&["join", &line]).unwrap_err();
    assert!(error.contains("hint: is the gateway running"), "{error}");
}

#[test]
fn an_expired_certificate_and_a_revoked_node_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = federation(folder.path(), "Leiden", &[("a", ""), ("b", "")]);
    let revoked = nodes[1].verb(&["status"])["node"].as_str().unwrap().to_owned();
    nodes[0].verb(&["institution", "revoke", &revoked]);
    wait_for("the revoked node's absence", SEEN_TIME_MAX, || {
        let status = nodes[0].verb(&["status"]);
        let peers = status["peers"].as_array().unwrap();
        peers.iter().all(|peer| peer["path"] == "lost").then_some(())
    });
    // On its disk: what is only in memory when the process dies is not known to the next one.
    let told = Home::open(&nodes[1].home).unwrap();
    wait_for("the revoked node to hear", SEEN_TIME_MAX, || {
        (!told.revocations().unwrap().is_empty()).then_some(())
    });
    let shut_out = nodes[1].verb(&["status"])["shut_out_because"].clone();
    assert!(shut_out.as_str().unwrap().contains("has revoked node"), "{shut_out}");
    nodes[1].kill();
    let error = nodes[1].try_verb(&["join"]).unwrap_err();
    assert!(error.contains("revoked"), "{error}");

    // A certificate whose end is longer ago than clocks may differ, of a node that was away when it should have renewed.
    let gateway = Home::open(&nodes[0].home).unwrap();
    let late = Node::prepare(folder.path(), "late", "");
    let home = Home::open(&late.home).unwrap();
    let institution = gateway.institutions().unwrap().remove(0);
    let charters = gateway.charters().unwrap().unwrap();
    let now = unix_now().0;
    let claim = Certificate {
        version: 1,
        federation: charters.federation(),
        node: home.node_key().unwrap().node(),
        institution: institution.key.institution(),
        capabilities: Capabilities::ORDINARY,
        not_before: UnixSeconds(now - 9_000),
        not_after: UnixSeconds(now - 1_000),
        serial: 1,
    };
    let certificate = Signed::new(&institution.key, &claim);
    let error = accept(&late, &packet(&certificate, &charters, &[]), folder.path());
    assert!(error.contains("expired"), "{error}");
    home.save_charters(&charters).unwrap();
    home.save_certificate(&certificate).unwrap();
    let error = late.try_verb(&["join"]).unwrap_err();
    assert!(error.contains("expired") && error.contains("hint:"), "{error}");
}

/// What `polder institution accept` says to a packet that it must refuse.
fn accept(node: &Node, packet: &[u8], folder: &Path) -> String {
    let file = folder.join("packet");
    fs::write(&file, packet).unwrap();
    node.try_verb(&["institution", "accept", file.to_str().unwrap()])
        .unwrap_err()
}

#[test]
fn a_port_in_use_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (tcp, udp) = (
        TcpListener::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    let (tcp, udp) = (
        tcp.local_addr().unwrap().port(),
        (udp.local_addr().unwrap().port(), udp, tcp),
    );
    for (key, line, hint) in [
        (
            "control",
            format!("control_port = {tcp}\n"),
            "`control_port` in config.toml",
        ),
        ("data", format!("data_port = {}\n", udp.0), "`data_port` in config.toml"),
        ("api", format!("api = \"127.0.0.1:{tcp}\"\n"), "`api` in config.toml"),
    ] {
        let node = Node::prepare(folder.path(), key, "");
        let path = node.home.join("config.toml");
        let name = line.split(' ').next().unwrap();
        let others = fs::read_to_string(&path).unwrap();
        let others = others.lines().filter(|line| !line.starts_with(name));
        let others: String = others.map(|line| format!("{line}\n")).collect();
        fs::write(&path, others + &line).unwrap();
        node.verb(&["charter", "new", "Test", "--institution", "Leiden"]);
        let error = node.try_verb(&["join"]).unwrap_err();
        assert!(error.contains(hint), "{key}: {error}");
    }
}

#[test]
fn garbage_on_both_ports_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let nodes = federation(folder.path(), "Leiden", &[("a", ""), ("b", "")]);
    let status = wait_for("the members to meet", Duration::from_secs(20), || {
        let status = nodes[0].verb(&["status"]);
        (status["peers"].as_array()?.len() == 1).then_some(status)
    });
    let control = status["control"].as_array().unwrap().iter().find_map(|address| {
        let (_, port) = address.as_str().unwrap().split_once("/tcp/")?;
        port.split('/').next().unwrap().parse::<u16>().ok()
    });
    let control = control.unwrap();
    let data: u16 = status["data"]
        .as_str()
        .unwrap()
        .rsplit(':')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let mut state = 7u64;
    let mut noise = move |length: usize| -> Vec<u8> {
        let byte = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..length).map(byte).collect()
    };
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for round in 0..200 {
        let mut stream = TcpStream::connect(("127.0.0.1", control)).unwrap();
        // The node may hang up in the middle.
        let _ = stream.write_all(&noise(1 + round * 37));
        for port in [control, data] {
            socket.send_to(&noise(20 + round * 5), ("127.0.0.1", port)).unwrap();
            // A long header of QUIC, so that more than the first byte is looked at.
            let mut packet = noise(1_200);
            packet[0] = 0xc0 | (packet[0] & 0x0f);
            packet[1..5].copy_from_slice(&1u32.to_be_bytes());
            socket.send_to(&packet, ("127.0.0.1", port)).unwrap();
        }
    }
    let status = nodes[0].verb(&["status"]);
    assert_eq!(status["peers"].as_array().unwrap().len(), 1);
    assert_eq!(status["peers"][0]["path"], "direct");
    // New members still come in.
    let mut third = Node::prepare(folder.path(), "c", "");
    third.start(&[&invite(&nodes[0], "Leiden")]);
    for node in &nodes {
        assert!(!node.log().contains("panicked"), "{}", node.last_words());
    }
}

#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(folder.path(), 48) else {
        return;
    };
    if let Some(model) = std::env::var_os("POLDER_SMOLLM2_GGUF") {
        let node = Node::prepare(&disk.0, "importer", "");
        let error = node
            .try_verb(&["model", "import", model.to_str().unwrap()])
            .unwrap_err();
        assert!(error.contains("No space left"), "{error}");
        assert_eq!(left_behind(&node), Vec::<PathBuf>::new());
    }

    let text = folder.path().join("text.txt");
    fs::write(
        &text,
        "All human beings are born free and equal in dignity and rights. ".repeat(200),
    )
    .unwrap();
    let run = folder.path().join("run.toml");
    fs::write(
        &run,
        "name = \"small\"\nrounds = 4000\nseed = 1\n\n[model]\nhidden = 64\nblocks = 2\nheads = 2\ncontext = 64\n\n\
         [inner]\nsteps = 2\nbatch = 1\nseq = 32\nlearning_rate = 1e-3\nwarmup_steps = 2\n\n\
         [closing]\nquorum = 1\ngrace = \"100ms\"\ndeadline = \"20s\"\n",
    )
    .unwrap();
    let mut nodes = federation(&disk.0, "Leiden", &[("a", "threads = 1\n")]);
    let node = &mut nodes[0];
    node.verb(&["data", "add", "text", text.to_str().unwrap(), "--language", "en"]);
    node.verb(&["run", "new", run.to_str().unwrap()]);
    node.verb(&["run", "start", "small"]);
    let rounds = |node: &Node| node.verb(&["run", "status", "small"])["rounds_done"].as_u64().unwrap();
    wait_for("two rounds", SEEN_TIME_MAX, || (rounds(node) >= 2).then_some(()));
    let ballast = disk.0.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    while file.write_all(&[1; 4_096]).is_ok() {}
    drop(file);
    // Every round writes; soon one cannot.
    let trouble = wait_for("trouble", SEEN_TIME_MAX, || {
        let status = node.verb(&["run", "status", "small"]);
        status["trouble"].as_str().map(str::to_owned)
    });
    assert!(trouble.contains("No space left"), "{trouble}");
    let done = rounds(node);
    node.kill();
    fs::remove_file(&ballast).unwrap();
    node.start(&[]);
    wait_for("further rounds", SEEN_TIME_MAX, || {
        (rounds(node) >= done + 10).then_some(())
    });
    let status = node.verb(&["run", "status", "small"]);
    assert_eq!(status["rounds_diverged"], 0, "{status}");
}

/// A Llama of the reference cases with a tokenizer of one letter, its weights changed by `change`.
fn hugging_face(folder: &Path, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/tests/golden/llama_rope_llama3");
    fs::create_dir_all(folder).unwrap();
    fs::copy(source.join("config.json"), folder.join("config.json")).unwrap();
    let mut weights = fs::read(source.join("model.safetensors")).unwrap();
    change(&mut weights);
    fs::write(folder.join("model.safetensors"), weights).unwrap();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder.to_owned()
}

/// Files of blobs, epochs and imports in a home.
fn left_behind(node: &Node) -> Vec<PathBuf> {
    let mut left = Vec::new();
    let mut folders = vec![node.home.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("config.toml") && !path.ends_with("lock") {
                left.push(path);
            }
        }
    }
    left
}

/// A file system of so many MiB in memory, taken down again at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: &Path, mebibytes: u32) -> Option<Self> {
        let path = folder.join("disk");
        fs::create_dir_all(&path).unwrap();
        let size = format!("size={mebibytes}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(&path)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(path)),
            Ok(output) => {
                println!(
                    "skipped: a small disk needs the right to mount: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
                None
            }
            Err(error) => {
                println!("skipped: there is no `mount` here: {error}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process of a failed test may still look at it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
