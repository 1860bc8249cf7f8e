//! The demonstration's nodes: real `polder` processes with a folder each, ended when the demonstration ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::de::DeserializeOwned;

use crate::client::Client;

/// A node that has not opened its interface after so long will not: it starts in under a second on an idle machine.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// What a node gets to say goodbye before it is killed.
const GOODBYE_TIME_MAX: Duration = Duration::from_secs(5);

/// One node: a folder, and a process while it runs.
#[derive(Debug)]
pub(crate) struct Node {
    /// What the demonstration calls it.
    pub(crate) name: String,
    /// Its folder.
    pub(crate) home: PathBuf,
    /// Its id, once it is up.
    pub(crate) id: Option<String>,
    child: Option<Child>,
}

impl Node {
    /// A node without a process, with a configuration for the loopback interface and free ports.
    pub(crate) fn prepare(root: &Path, name: &str, configuration: &str) -> anyhow::Result<Self> {
        let home = root.join(name);
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let base = "listen = \"127.0.0.1\"\ncontrol_port = 0\ndata_port = 0\napi = \"127.0.0.1:0\"\nmdns = false\n";
        fs::write(home.join("config.toml"), format!("{base}{configuration}"))
            .with_context(|| format!("cannot write the configuration of {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            home,
            id: None,
            child: None,
        })
    }

    /// Runs a verb of this very program on the node's folder and reads its JSON answer.
    pub(crate) fn verb<T: DeserializeOwned>(&self, arguments: &[&str]) -> anyhow::Result<T> {
        let mut command = program()?;
        command
            .arg("--home")
            .arg(&self.home)
            .arg("--json")
            .args(arguments)
            .stdin(Stdio::null());
        // As below: what Ctrl-C ended would look like a failure of its own.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let output = command
            .output()
            .with_context(|| format!("cannot run polder {}", arguments.join(" ")))?;
        if !output.status.success() {
            bail!(
                "polder {} failed on {}:\n{}",
                arguments.join(" "),
                self.name,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "polder {} printed no JSON: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stdout)
            )
        })
    }

    /// Starts `polder join` with these further arguments, its log in the node's folder.
    pub(crate) fn start(&mut self, arguments: &[&str]) -> anyhow::Result<()> {
        let log = File::create(self.log()).with_context(|| format!("cannot make the log of {}", self.name))?;
        let mut command = program()?;
        command
            .arg("--home")
            .arg(&self.home)
            .arg("join")
            .args(arguments)
            .stdin(Stdio::null());
        command
            .stdout(log.try_clone()?)
            .stderr(log)
            .env("POLDER_LOG", log_level());
        // Ctrl-C reaches the demonstration alone, which then ends its nodes in order.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        self.child = Some(command.spawn().with_context(|| format!("cannot start {}", self.name))?);
        Ok(())
    }

    /// Waits until the node answers on its local interface.
    pub(crate) fn wait_until_up(&mut self) -> anyhow::Result<Client> {
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("{} ended at once ({status}):\n{}", self.name, self.last_words());
            }
            if let Ok(client) = Client::open(&self.home)
                && let Ok(status) = client.get::<serde_json::Value>("/polder/v1/status")
            {
                self.id = status
                    .get("node")
                    .and_then(serde_json::Value::as_str)
                    .map(ToOwned::to_owned);
                return Ok(client);
            }
            if Instant::now() > deadline {
                bail!(
                    "{} did not come up in {} s:\n{}",
                    self.name,
                    START_TIME_MAX.as_secs(),
                    self.last_words()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The end of the node's log.
    pub(crate) fn last_words(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines
            .get(lines.len().saturating_sub(12)..)
            .unwrap_or_default()
            .join("\n")
    }

    /// Resident memory of the node and its worker in bytes, where the system tells.
    pub(crate) fn memory_bytes(&self) -> Option<u64> {
        let daemon = self.child.as_ref()?.id();
        let mut total = resident_bytes(daemon)?;
        for worker in children_of(daemon) {
            total += resident_bytes(worker).unwrap_or(0);
        }
        Some(total)
    }

    /// Asks the node to leave, waits for it, and kills it if it takes too long.
    pub(crate) fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        if let Ok(client) = Client::open(&self.home) {
            // A node that cannot hear us is killed below.
            let _ = client.post::<serde_json::Value>("/polder/v1/leave", &serde_json::json!({}));
        }
        let deadline = Instant::now() + GOODBYE_TIME_MAX;
        while Instant::now() < deadline {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // It may have ended in this very moment.
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Ends the node without a goodbye, as a power cut would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended in this very moment.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn log(&self) -> PathBuf {
        self.home.join("node.log")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

fn program() -> anyhow::Result<Command> {
    Ok(Command::new(
        std::env::current_exe().context("cannot tell where this program lies")?,
    ))
}

fn log_level() -> String {
    std::env::var("POLDER_LOG").unwrap_or_else(|_| "warn".into())
}

fn resident_bytes(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kibibytes| kibibytes * 1024)
}

fn children_of(process: u32) -> Vec<u32> {
    let path = format!("/proc/{process}/task/{process}/children");
    let by_main_thread = fs::read_to_string(path).unwrap_or_default();
    let mut children: Vec<u32> = by_main_thread
        .split_whitespace()
        .filter_map(|id| id.parse().ok())
        .collect();
    // A child belongs to the thread that started it.
    if let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) {
        for task in tasks.flatten() {
            let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            children.extend(text.split_whitespace().filter_map(|id| id.parse::<u32>().ok()));
        }
    }
    children.sort_unstable();
    children.dedup();
    children
}
