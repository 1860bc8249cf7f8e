//! How a worker comes to life: as a child process, or, in tests, as anything that speaks over two streams.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tracing::info;

/// Starts workers, one after another.
pub trait Launch: Send + Sync + 'static {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// What the system says.
    fn launch(&self) -> io::Result<Launched>;

    /// The same, computing on the CPU; `None` where it does so already.
    fn on_cpu(&self) -> Option<Box<dyn Launch>> {
        None
    }
}

/// A worker that has just been started.
pub struct Launched {
    /// Where orders go.
    pub input: Box<dyn AsyncWrite + Send + Unpin>,
    /// Where replies come from.
    pub output: Box<dyn AsyncRead + Send + Unpin>,
    /// The process, where it is one. It is killed when this is dropped.
    pub child: Option<Child>,
}

/// A program that speaks [`polder_protocol::work`] over its standard input and output.
#[derive(Debug, Clone)]
pub struct Process {
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl Process {
    /// This very program, with the verb `worker`.
    ///
    /// # Errors
    ///
    /// What the system says when it does not know where the program lies.
    pub fn this_program() -> io::Result<Self> {
        Ok(Self::new(std::env::current_exe()?).argument("worker"))
    }

    /// Another program.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// How many threads may compute. Without it, as many as there are cores.
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        self.variable("POLDER_WORKER_THREADS", threads.to_string())
    }

    /// Which device: `auto`, `cpu` or `wgpu`. Without it, `auto`.
    #[must_use]
    pub fn device(mut self, device: &str) -> Self {
        self.environment.retain(|(name, _)| name != DEVICE_VARIABLE);
        self.variable(DEVICE_VARIABLE, device)
    }
}

/// Where a worker reads which device to use.
const DEVICE_VARIABLE: &str = "POLDER_WORKER_DEVICE";

impl Launch for Process {
    fn launch(&self) -> io::Result<Launched> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // Ctrl-C is for the node, which lets the worker finish what is under way.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.program.display())))?;
        let missing = || io::Error::other("the system gave the worker no pipes");
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        tokio::spawn(log(child.stderr.take().ok_or_else(missing)?));
        Ok(Launched {
            input: Box::new(input),
            output: Box::new(output),
            child: Some(child),
        })
    }

    fn on_cpu(&self) -> Option<Box<dyn Launch>> {
        let is_there = (self.environment.iter()).any(|(name, value)| name == DEVICE_VARIABLE && value == "cpu");
        (!is_there).then(|| Box::new(self.clone().device("cpu")) as Box<dyn Launch>)
    }
}

/// Passes on what a worker has to say, until it ends.
async fn log(stderr: ChildStderr) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        info!(target: "polder::worker", "{line}");
    }
}
