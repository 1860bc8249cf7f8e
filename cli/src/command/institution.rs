//! `polder institution`: make an institution's key, and certify and revoke its nodes.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use clap::Subcommand;
use polder_node::enrol::{self, CERTIFICATE_SECONDS, certify};
use polder_node::home::{Home, write_whole};
use polder_protocol::charter::{Capabilities, Charters, Membership};
use polder_protocol::hash::NodeId;
use polder_protocol::identity::KeyPair;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Hint, hinted};
use crate::institutions::{acting, date, node};

/// Arguments of `polder institution`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make the key of a new institution and print its public half, for the next charter
    New {
        /// What the institution is called
        name: String,
    },
    /// List the institutions whose keys this home holds
    List,
    /// Certify a node by its id, without an invite
    Certify {
        /// The node's id, which `polder institution list` and `polder status` print there
        #[arg(value_parser = node)]
        node: NodeId,
        /// In whose name, where this home holds several keys
        #[arg(long, value_name = "KEY|NAME")]
        institution: Option<String>,
        /// What the node may do: serve, train, relay, directory, publish, query, or all
        #[arg(long, value_name = "LIST", default_value_t = Capabilities::ORDINARY)]
        capabilities: Capabilities,
        /// For how many days, at most 30
        #[arg(long, value_name = "DAYS", default_value_t = CERTIFICATE_SECONDS / DAY_SECONDS,
              value_parser = clap::value_parser!(u64).range(1..=30))]
        days: u64,
        /// Where to write the certificate and the charter, for `polder institution accept` over there
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
    /// Take a certificate that `polder institution certify --to FILE` wrote for this node
    Accept {
        /// The file
        file: PathBuf,
    },
    /// Shut a node out, whatever certificate it holds
    Revoke {
        /// The node's id
        #[arg(value_parser = node)]
        node: NodeId,
        /// In whose name, where this home holds several keys
        #[arg(long, value_name = "KEY|NAME")]
        institution: Option<String>,
    },
}

const DAY_SECONDS: u64 = 24 * 3600;

/// Makes, lists, certifies, accepts or revokes.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let home = Home::open(context.home())?;
    match arguments.verb {
        Verb::New { name } => {
            ensure!(!name.trim().is_empty(), "an institution needs a name");
            let made = home.new_institution(name.trim())?;
            context.show(&Made {
                key: made.key.institution().to_string(),
                name: made.name,
            })
        }
        Verb::List => list(context, &home),
        Verb::Certify {
            node,
            institution,
            capabilities,
            days,
            to,
        } => {
            let charters = charters(&home)?;
            let own = acting(&home, charters.current(), institution.as_deref())?;
            refuse_revoked(&home, &charters, &own.key, node)?;
            let ours = node == home.node_key()?.node();
            if !ours && to.is_none() {
                return Err(hinted(
                    anyhow!("a certificate for another node needs a file to travel in"),
                    "name one with --to FILE; on that node: polder institution accept FILE",
                ));
            }
            let certificate = certify(
                &own.key,
                &charters,
                node,
                capabilities,
                days.saturating_mul(DAY_SECONDS),
            )?;
            if ours {
                home.save_certificate(&certificate)?;
            }
            if let Some(file) = &to {
                let packet = enrol::packet(&certificate, &charters, &home.revocations()?);
                write_whole(file, &packet)?;
            }
            let claim = certificate.open()?;
            context.show(&Certified {
                node: node.to_string(),
                institution: own.name,
                capabilities: claim.capabilities.to_string(),
                until: date(claim.not_after),
                file: to.as_deref().map(|file| file.display().to_string()),
            })
        }
        Verb::Accept { file } => accept(context, &home, &file),
        Verb::Revoke { node, institution } => revoke(context, &home, node, institution.as_deref()),
    }
}

fn list(context: &Context, home: &Home) -> anyhow::Result<()> {
    let rows = home.institutions()?.into_iter().map(|own| Made {
        key: own.key.institution().to_string(),
        name: own.name,
    });
    context.show(&List {
        node: home.node_key()?.node().to_string(),
        institutions: rows.collect(),
    })
}

fn accept(context: &Context, home: &Home, file: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let members = enrol::accept_packet(home, &bytes)
        .with_context(|| format!("{} is not taken", file.display()))
        .hint("the file must be written for this node: polder institution list prints its id")?;
    let own = members.check_own()?;
    context.show(&Certified {
        node: own.node.to_string(),
        institution: own.institution_name,
        capabilities: own.capabilities.to_string(),
        until: date(own.not_after),
        file: None,
    })
}

fn revoke(context: &Context, home: &Home, node: NodeId, institution: Option<&str>) -> anyhow::Result<()> {
    let _held = home.lock_membership()?;
    let charters = charters(home)?;
    let own = acting(home, charters.current(), institution)?;
    let mut membership = Membership::new(charters);
    for kept in home.revocations()? {
        // What does not hold under the present charter is dropped from the file.
        let _ = membership.revoke(kept);
    }
    membership.revoke(enrol::revoke(&own.key, &membership, node)?)?;
    let lists: Vec<_> = membership.revocations().cloned().collect();
    home.save_revocations(&lists)?;
    let epoch = membership
        .revocation(own.key.institution())
        .map_or(0, |list| list.epoch);
    context.show(&Revoked {
        node: node.to_string(),
        institution: own.name,
        epoch,
    })
}

/// Nobody would heed such a certificate.
fn refuse_revoked(home: &Home, charters: &Charters, institution: &KeyPair, node: NodeId) -> anyhow::Result<()> {
    let mut membership = Membership::new(charters.clone());
    for kept in home.revocations()? {
        // A list that does not hold under the present charter revokes nobody.
        let _ = membership.revoke(kept);
    }
    let list = membership.revocation(institution.institution());
    if list.is_some_and(|list| list.nodes.contains(&node)) {
        return Err(hinted(
            anyhow!("node {node} is revoked, and stays so"),
            "if whoever runs it is to come back, let them join under a new key: another `--home`, and an invite",
        ));
    }
    Ok(())
}

fn charters(home: &Home) -> anyhow::Result<Charters> {
    home.charters()?
        .context("this home has no charter yet")
        .hint("found a federation with `polder charter new`, or take a charter with `polder charter sign FILE`")
}

#[derive(Debug, Serialize)]
struct Made {
    key: String,
    name: String,
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}  {}", self.key, self.name)?;
        writeln!(
            f,
            "a member's gateway adds it: polder charter new --add-institution \"{}={}\" --to FILE",
            self.key, self.name
        )?;
        writeln!(f, "then take the file here: polder charter sign FILE")
    }
}

#[derive(Debug, Serialize)]
struct List {
    node: String,
    institutions: Vec<Made>,
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "this node  {}", self.node)?;
        self.institutions
            .iter()
            .try_for_each(|own| writeln!(f, "holds key   {}  {}", own.key, own.name))
    }
}

#[derive(Debug, Serialize)]
struct Certified {
    node: String,
    institution: String,
    capabilities: String,
    until: String,
    file: Option<String>,
}

impl fmt::Display for Certified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} certifies node {}", self.institution, self.node)?;
        writeln!(f, "may {}, until {}", self.capabilities, self.until)?;
        match &self.file {
            Some(file) => writeln!(f, "on that node: polder institution accept {file}"),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Serialize)]
struct Revoked {
    node: String,
    institution: String,
    epoch: u64,
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} revokes node {} (list {})",
            self.institution, self.node, self.epoch
        )
    }
}
