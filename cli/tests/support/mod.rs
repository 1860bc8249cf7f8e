//! Real `polder` processes on loopback, for tests: a node is a folder, and a process while it runs.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod lab;

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A node starts in under a second on an idle machine; test machines are not idle.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// What a node gets to leave in order.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(20);
/// What a verb gets to end in. One that serves when it ought to refuse would hold the test for ever.
const VERB_TIME_MAX: Duration = Duration::from_secs(180);
/// How often a condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One node. Dropping it kills its process.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) home: PathBuf,
    /// The network namespace that it lives in, where that is not this process's.
    namespace: Option<String>,
    child: Option<Child>,
}

impl Node {
    /// A node without a process. It listens on loopback, on ports that are free now and stay its own over restarts, as
    /// those of a gateway do. `settings` are further lines of its `config.toml`.
    pub(crate) fn prepare(root: &Path, name: &str, settings: &str) -> Self {
        let home = root.join(name);
        fs::create_dir_all(&home).unwrap();
        let (control, data) = (free_port(), free_port());
        let base = format!(
            "listen = \"127.0.0.1\"\ncontrol_port = {control}\ndata_port = {data}\napi = \"127.0.0.1:0\"\nmdns = false\n"
        );
        fs::write(home.join("config.toml"), format!("{base}{settings}")).unwrap();
        Self {
            name: name.to_owned(),
            home,
            namespace: None,
            child: None,
        }
    }

    /// A node of its own in a laboratory's host, on the usual ports of all its interfaces.
    pub(crate) fn prepare_on(host: &lab::Host, root: &Path, name: &str, settings: &str) -> Self {
        let home = root.join(name);
        fs::create_dir_all(&home).unwrap();
        let base = "api = \"127.0.0.1:0\"\nmdns = false\ntrain = false\nserve = false\n";
        fs::write(home.join("config.toml"), format!("{base}{settings}")).unwrap();
        Self {
            name: name.to_owned(),
            home,
            namespace: Some(host.namespace.clone()),
            child: None,
        }
    }

    fn program(&self) -> Command {
        let program = env!("CARGO_BIN_EXE_polder");
        let mut command = match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, program]);
                command
            }
        };
        // A proxy of this machine is none of a laboratory's.
        command.env_remove("HTTPS_PROXY").env_remove("https_proxy");
        command.arg("--home").arg(&self.home);
        command
    }

    /// Runs a verb to its end, which must come within [`VERB_TIME_MAX`].
    pub(crate) fn output(&self, arguments: &[&str]) -> Output {
        let mut command = self.program();
        command.args(arguments).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let process = child.id();
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || ended.send(child.wait_with_output()));
        match end.recv_timeout(VERB_TIME_MAX) {
            Ok(output) => output.unwrap(),
            Err(_) => {
                signal("-KILL", process);
                let words = end.recv().map(|output| format!("{output:?}"));
                panic!("polder {arguments:?} on {} does not end: {words:?}", self.name)
            }
        }
    }

    /// Runs a verb and reads its JSON answer, or gives what it wrote to stderr.
    pub(crate) fn try_verb(&self, arguments: &[&str]) -> Result<Value, String> {
        let output = self.output(&[&["--json"], arguments].concat());
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Runs a verb that must succeed and reads its JSON answer.
    pub(crate) fn verb(&self, arguments: &[&str]) -> Value {
        self.try_verb(arguments)
            .unwrap_or_else(|error| panic!("polder {arguments:?} on {}: {error}\n{}", self.name, self.last_words()))
    }

    /// What `polder doctor` with these further arguments found. Its exit code must tell whether anything is bad.
    pub(crate) fn doctor(&self, arguments: &[&str]) -> Value {
        let output = self.output(&[&["--json", "doctor"], arguments].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}: {error}", self.name));
        let bad = answer["findings"].as_array().unwrap().iter();
        let bad = bad.filter(|finding| finding["health"] == "bad").count();
        assert_eq!(output.status.code(), Some(i32::from(bad > 0)), "{answer}: {error}");
        assert_eq!(error.contains(&format!("error: {bad} of")), bad > 0, "{error}");
        answer
    }

    /// Starts `polder join` with these further arguments and waits until it answers. Its log is kept over restarts.
    pub(crate) fn start(&mut self, arguments: &[&str]) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let level = std::env::var("POLDER_LOG").unwrap_or_else(|_| "info".into());
        let mut command = self.program();
        command
            .arg("join")
            .args(arguments)
            .env("POLDER_LOG", level)
            .env("NO_COLOR", "1");
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
        let process = u64::from(self.process());
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("{} ended at once ({status}):\n{}", self.name, self.last_words());
            }
            // A killed process leaves the address of its interface behind, so whose answer it is matters.
            let api = fs::read(self.home.join("api.json")).unwrap_or_default();
            let api: Value = serde_json::from_slice(&api).unwrap_or_default();
            if api["process"] == process && self.try_verb(&["status"]).unwrap_or_default()["process"] == process {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{} did not come up:\n{}",
                self.name,
                self.last_words()
            );
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The daemon's process id.
    pub(crate) fn process(&self) -> u32 {
        self.child.as_ref().expect("the node runs").id()
    }

    /// `kill -9`: no goodbye, nothing flushed. Its worker ends by itself.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("the node runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGSTOP: the process neither hears nor says anything until [`Node::go_on`].
    pub(crate) fn halt(&self) {
        signal("-STOP", self.process());
    }

    /// SIGCONT.
    pub(crate) fn go_on(&self) {
        signal("-CONT", self.process());
    }

    /// `polder leave`, then waits for the end of the process.
    pub(crate) fn leave(&mut self) {
        self.verb(&["leave"]);
        let child = self.child.as_mut().expect("the node runs");
        let deadline = Instant::now() + LEAVE_TIME_MAX;
        while child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "{} does not leave", self.name);
            std::thread::sleep(LOOK_EVERY);
        }
        self.child = None;
    }

    /// All that the node has written.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The end of it.
    pub(crate) fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.home.join("node.log")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; a test that has failed has said so.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A federation of one institution whose gateway is the first node; all of them run. Nodes are names and further lines
/// of `config.toml`.
pub(crate) fn federation(root: &Path, institution: &str, nodes: &[(&str, &str)]) -> Vec<Node> {
    let mut running: Vec<Node> = Vec::new();
    for (name, settings) in nodes {
        let mut node = Node::prepare(root, name, settings);
        if let Some(gateway) = running.first() {
            node.start(&[&invite(gateway, institution)]);
        } else {
            node.verb(&["charter", "new", "Test", "--institution", institution]);
            node.start(&[]);
        }
        running.push(node);
    }
    running
}

/// A new invite of a gateway.
pub(crate) fn invite(gateway: &Node, institution: &str) -> String {
    let invite = gateway.verb(&["invite", "--institution", institution]);
    invite["invite"].as_str().unwrap().to_owned()
}

/// Looks until there is something to see.
pub(crate) fn wait_for<T>(what: &str, time_max: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + time_max;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "waited {} s for {what}", time_max.as_secs());
        std::thread::sleep(LOOK_EVERY);
    }
}

fn signal(name: &str, process: u32) {
    let status = Command::new("kill")
        .arg(name)
        .arg(process.to_string())
        .status()
        .unwrap();
    assert!(status.success(), "kill {name} {process}");
}

/// Free for TCP and UDP at this moment, and below those that systems give to whoever asks for any: a port that a test has
/// set aside would else be taken by one of many connections before its node listens.
pub(crate) fn free_port() -> u16 {
    /// Linux gives from 32,768 on.
    const PORTS: std::ops::Range<u16> = 10_240..32_768;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let span = u32::from(PORTS.end - PORTS.start);
    // Tests of several programs run at once: each begins elsewhere.
    let begin = std::process::id().wrapping_mul(2_654_435_761) % span;
    loop {
        let number = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % span;
        let port = PORTS.start + u16::try_from(number).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && UdpSocket::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
