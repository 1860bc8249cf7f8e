//! `polder invite`: one line that lets one new node in.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use polder_node::control::is_multiaddress;
use polder_node::daemon::Config;
use polder_node::home::{Home, TokenGrant, write_secret};
use polder_node::members::unix_now;
use polder_protocol::charter::Capabilities;
use polder_protocol::invite::{DOOR_ADDRESSES_MAX, Door, Invite};
use polder_protocol::time::UnixSeconds;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Hint, hinted};
use crate::institutions::{acting, date};

/// Arguments of `polder invite`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which institution certifies the new node, where this home holds several keys
    #[arg(long, value_name = "KEY|NAME")]
    institution: Option<String>,
    /// What the new node may do: serve, train, relay, directory, publish, query, or all
    #[arg(long, value_name = "LIST", default_value_t = Capabilities::ORDINARY)]
    capabilities: Capabilities,
    /// For how many hours the line can be used
    #[arg(long, value_name = "HOURS", default_value_t = 72, value_parser = clap::value_parser!(u64).range(1..=8760))]
    hours: u64,
    /// Where this gateway's control plane answers, such as /dns4/polder.example.org/tcp/4001; may be given more than
    /// once [default: what the daemon last saw]
    #[arg(long, value_name = "MULTIADDRESS", value_parser = multiaddress)]
    address: Vec<String>,
    /// Where this gateway's data plane answers, such as 192.0.2.1:4002; may be given more than once
    #[arg(long, value_name = "IP:PORT")]
    data_address: Vec<SocketAddr>,
    /// Write the line to a file instead
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
}

fn multiaddress(text: &str) -> Result<String, String> {
    if is_multiaddress(text) {
        return Ok(text.to_owned());
    }
    Err("write it as /dns4/HOST/tcp/PORT or /ip4/192.0.2.1/tcp/4001".to_owned())
}

/// Prints the line.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let home = Home::open(context.home())?;
    let charters = home
        .charters()?
        .context("this home belongs to no federation yet")
        .hint("found one with `polder charter new`")?;
    let institution = acting(&home, charters.current(), arguments.institution.as_deref())?;
    let door = door(&home, &arguments)?;
    let now = unix_now();
    let grant = TokenGrant {
        institution: institution.key.institution(),
        capabilities: arguments.capabilities,
        expires: UnixSeconds(now.0.saturating_add(arguments.hours.saturating_mul(3600))),
    };
    let invite = Invite {
        federation: charters.federation(),
        federation_name: charters.current().name.clone(),
        institution: grant.institution,
        doors: vec![door],
        token: home.new_token(&grant, now)?,
        expires: grant.expires,
    };
    let line = invite.to_string();
    if let Some(file) = &arguments.to {
        // Whoever reads the line is let in.
        write_secret(file, format!("{line}\n").as_bytes())?;
    }
    context.show(&Answer {
        invite: line,
        federation: invite.federation_name,
        institution: institution.name,
        expires: date(invite.expires),
        file: arguments.to.map(|file| file.display().to_string()),
    })
}

/// Where to knock: what was named, else what the configuration says and what the daemon last saw.
fn door(home: &Home, arguments: &Arguments) -> anyhow::Result<Door> {
    let seen = home.addresses()?;
    let config = Config::load(home.root())?;
    let pick = |named: &[String], seen: Vec<String>, configured: Vec<String>| {
        let mut list = if named.is_empty() {
            let unconfigured = seen.into_iter().filter(|address| !configured.contains(address));
            configured.iter().cloned().chain(unconfigured).collect()
        } else {
            named.to_vec()
        };
        list.truncate(DOOR_ADDRESSES_MAX);
        list
    };
    let (seen_control, seen_data) = seen.map_or_else(Default::default, |own| (own.control, own.data));
    let control = pick(&arguments.address, seen_control, config.external);
    if control.is_empty() {
        return Err(hinted(
            anyhow!("nobody would know where to knock: this gateway has not run yet"),
            "start it first (`polder join`), or name its address: --address /ip4/192.0.2.1/tcp/4001",
        ));
    }
    let mut data = match (arguments.data_address.is_empty(), seen_data.is_empty()) {
        (false, _) => arguments.data_address.clone(),
        (true, false) => seen_data,
        (true, true) => config.external_data,
    };
    data.truncate(DOOR_ADDRESSES_MAX);
    Ok(Door {
        node: home.node_key()?.node(),
        control,
        data,
    })
}

#[derive(Debug, Serialize)]
struct Answer {
    invite: String,
    federation: String,
    institution: String,
    expires: String,
    file: Option<String>,
}

impl fmt::Display for Answer {
    // The line alone, so that it can be piped; who wants more asks for --json.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => writeln!(f, "{file} lets one node in until {}", self.expires),
            None => writeln!(f, "{}", self.invite),
        }
    }
}
