//! `polder join`: runs this machine's node.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use polder_node::daemon::{Config, Daemon, DaemonError, Started};
use polder_node::enrol::EnrolError;
use polder_node::home::Home;
use polder_node::members::MembersError;
use polder_protocol::charter::Refusal;
use polder_protocol::invite::Invite;
use tokio::signal;

use crate::client::Client;
use crate::context::Context;
use crate::failure::{Hint, hinted};

/// What a node in the background may take until it answers.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// Threads of a daemon on a machine of many cores: each encrypts a gigabit per second, and idle ones only take memory.
const DAEMON_THREADS_MAX: usize = 8;

/// Arguments of `polder join`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The line from `polder invite`, or a file that holds it; only the first time
    #[arg(value_name = "INVITE")]
    invite: Option<String>,
    /// Run in the background; `polder leave` ends it
    #[arg(long)]
    detach: bool,
    /// What to compute on, in place of `device` in config.toml; the CPU takes over where it is not there
    #[arg(long, value_name = "DEVICE", value_parser = ["auto", "cpu", "wgpu"])]
    device: Option<String>,
}

/// Runs the node until it is interrupted or told to leave.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let invite = arguments.invite.as_deref().map(read_invite).transpose()?;
    if arguments.detach {
        return detach(context, &arguments);
    }
    let home = Home::open(context.home())?;
    let mut config =
        Config::load(context.home()).hint("`polder join` reads it at every start; mend or remove the file")?;
    if let Some(device) = arguments.device {
        config.device = device;
    }
    crate::pages::take_small();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(DAEMON_THREADS_MAX))
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(context, home, config, invite.as_ref()))
}

/// Reads an invite, or a file that holds it.
pub(super) fn read_invite(text: &str) -> anyhow::Result<Invite> {
    let line = if text.starts_with("polder1") {
        text.to_owned()
    } else {
        std::fs::read_to_string(text)
            .with_context(|| format!("`{text}` is neither an invite nor a file that can be read"))
            .hint("an invite is one line that begins with polder1")?
    };
    line.trim()
        .parse()
        .context("this invite cannot be used")
        .hint("copy the whole line, or ask your institution's gateway for a new one: `polder invite`")
}

async fn serve(context: &Context, home: Home, config: Config, invite: Option<&Invite>) -> anyhow::Result<()> {
    let daemon = Daemon::start(home, config, invite).await.map_err(explain)?;
    greet(context, daemon.started())?;
    tokio::select! {
        () = daemon.asked_to_stop() => {}
        stopped = interrupted() => stopped?,
    }
    context.say("Leaving: finishing what is under way. Press Ctrl-C again to stop at once.")?;
    tokio::select! {
        () = daemon.stop() => context.say("Left. Everything that was acknowledged is on disk."),
        again = interrupted() => {
            again?;
            std::process::exit(130);
        }
    }
}

fn greet(context: &Context, started: &Started) -> anyhow::Result<()> {
    if context.json() {
        let line = serde_json::json!({
            "node": started.node, "federation": started.federation, "institution": started.institution,
            "api": started.api.to_string(), "control": started.control, "data": started.data.to_string(),
        });
        return crate::context::write_all(&format!("{line}\n"));
    }
    context.say(format_args!("Node        {}", started.node))?;
    context.say(format_args!(
        "Federation  {}, certified by {}",
        started.federation, started.institution
    ))?;
    context.say(format_args!(
        "Listens     {}; data {}",
        started.control.join(", "),
        started.data
    ))?;
    context.say(format_args!("Local API   http://{}/v1", started.api))?;
    context.say("Ready. Ctrl-C leaves in order; `polder status` tells more.")
}

/// Waits for Ctrl-C or a request of the system to end.
async fn interrupted() -> anyhow::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate =
            signal::unix::signal(signal::unix::SignalKind::terminate()).context("cannot listen for signals")?;
        tokio::select! {
            pressed = signal::ctrl_c() => pressed.context("cannot listen for Ctrl-C"),
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    signal::ctrl_c().await.context("cannot listen for Ctrl-C")
}

/// Adds what to try to what went wrong.
fn explain(error: DaemonError) -> anyhow::Error {
    let hint = match &error {
        DaemonError::Members(MembersError::NotEnrolled) => {
            "ask your institution's gateway for a line (`polder invite`) and run `polder join LINE`; or found a \
             federation with `polder charter new`"
        }
        DaemonError::Members(_) => "a gateway of your institution can certify this node anew: `polder invite` there",
        DaemonError::Enrol(error) if matches!(**error, EnrolError::Member { .. }) => {
            "`polder join` without a line starts this node; for another federation, name another folder with --home"
        }
        DaemonError::Enrol(error)
            if matches!(
                **error,
                EnrolError::Certificate(Refusal::Expired { .. } | Refusal::NotYetValid { .. })
            ) =>
        {
            "is this machine's clock right? `date -u` shows it; the same line can be used again"
        }
        DaemonError::Enrol(_) => "ask your institution's gateway for a new line: `polder invite`",
        DaemonError::Door { .. } => {
            "is the gateway running, and does a firewall between here and there let it through?"
        }
        DaemonError::Api { .. } => "set `api` in config.toml to another port, or to port 0 for any",
        DaemonError::Data(_) => {
            "set `data_port` in config.toml to another port, or to 0 for any; `listen` there must be an address of this machine"
        }
        DaemonError::Control(_) => "set `control_port` in config.toml to another port, or to 0 for any",
        _ => return error.into(),
    };
    hinted(error, hint)
}

/// Starts this program again without a terminal and waits until it answers.
fn detach(context: &Context, arguments: &Arguments) -> anyhow::Result<()> {
    if Client::open(context.home()).is_ok_and(|client| client.get::<serde_json::Value>("/polder/v1/status").is_ok()) {
        bail!("a node is running in {} already", context.home().display());
    }
    std::fs::create_dir_all(context.home()).with_context(|| format!("cannot make {}", context.home().display()))?;
    let path: PathBuf = context.home().join("node.log");
    // What the node said before it ended, or was ended, is what one looks for after a new start.
    let earlier = path.with_extension("log.old");
    if path.metadata().is_ok_and(|log| log.len() > 0) {
        std::fs::rename(&path, &earlier).with_context(|| format!("cannot make {}", earlier.display()))?;
    }
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let program = std::env::current_exe().context("cannot tell where this program lies")?;
    let mut command = Command::new(program);
    command
        .arg("--home")
        .arg(context.home())
        .arg("join")
        .args(&arguments.invite)
        .args(arguments.device.iter().flat_map(|device| ["--device", device]))
        .stdin(Stdio::null());
    command
        .stdout(log.try_clone().context("cannot use the log twice")?)
        .stderr(log);
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().context("cannot start the node")?;
    let deadline = Instant::now() + START_TIME_MAX;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().context("cannot watch the node")? {
            let log = std::fs::read_to_string(&path).unwrap_or_default();
            if log.trim().is_empty() {
                return Err(hinted(
                    anyhow!("the node ended at once ({status}) and could not say why"),
                    format!("is there room on the disk of {}?", context.home().display()),
                ));
            }
            bail!("the node ended at once ({status}):\n{}", log.trim_end());
        }
        if let Ok(client) = Client::open(context.home())
            && client.process() == child.id()
        {
            return context.say(format_args!(
                "The node runs in the background as process {}; its log is {}.\n`polder leave` ends it.",
                child.id(),
                path.display()
            ));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(hinted(
        anyhow!("the node did not come up within {} s", START_TIME_MAX.as_secs()),
        format!("its log is {}", path.display()),
    ))
}
