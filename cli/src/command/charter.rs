//! `polder charter`: write, show and sign the federation's founding document.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use clap::Subcommand;
use polder_node::daemon::member_at;
use polder_node::enrol::{CERTIFICATE_SECONDS, certify};
use polder_node::home::{Home, Institution, write_whole};
use polder_node::members::unix_now;
use polder_protocol::charter::{
    Capabilities, Charter, CharterError, Charters, InstitutionEntry, SignedCharter, chain_from_bytes, chain_to_bytes,
};
use polder_protocol::hash::{InstitutionId, NodeId};
use polder_protocol::invite::Door;
use serde::Serialize;

use crate::context::Context;
use crate::failure::{Hint, hinted};
use crate::institutions::{find, named};

/// Arguments of `polder charter`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Found a federation, or write its next charter
    New(Box<New>),
    /// Print a charter: who belongs, who decides, who has signed
    Show {
        /// A charter file; without it, the charter of this home
        file: Option<PathBuf>,
    },
    /// Sign a charter with the founders' keys of this home; once enough have signed, it is in force here
    Sign {
        /// The charter file; the signatures are added to it
        file: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct New {
    /// What the federation is called; only for the first charter
    name: Option<String>,
    /// A founding institution, whose key is made here; may be given more than once. The first certifies this node
    #[arg(long, value_name = "NAME", requires = "name")]
    institution: Vec<String>,
    /// The charter file to go on from; without it, the charter of this home
    #[arg(long, value_name = "FILE", conflicts_with = "name")]
    from: Option<PathBuf>,
    /// Add a member, by the public key that `polder institution new` printed there; may be given more than once
    #[arg(long, value_name = "KEY=NAME", value_parser = named)]
    add_institution: Vec<(InstitutionId, String)>,
    /// Remove a member, by key or name; may be given more than once
    #[arg(long, value_name = "KEY|NAME")]
    remove_institution: Vec<String>,
    /// Make a member a founder, whose signature counts; may be given more than once
    #[arg(long, value_name = "KEY|NAME")]
    add_founder: Vec<String>,
    /// How many founders must sign a charter [default: more than half]
    #[arg(long, value_name = "COUNT")]
    threshold: Option<u16>,
    /// Name a gateway as a door: whoever has only the charter begins there. Write NODE@/dns4/HOST/tcp/PORT; may be given
    /// more than once, also for several addresses of one gateway
    #[arg(long, value_name = "NODE@MULTIADDR", value_parser = door_address)]
    door: Vec<(NodeId, String)>,
    /// Name a gateway as a door no longer; may be given more than once
    #[arg(long, value_name = "NODE", conflicts_with = "name")]
    remove_door: Vec<NodeId>,
    /// Which models the federation trains and serves, in words
    #[arg(long, value_name = "TEXT")]
    models: Option<String>,
    /// What the federation asks of its members, in words
    #[arg(long, value_name = "TEXT")]
    policies: Option<String>,
    /// Also write the charter to a file, for others to sign
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
}

/// Writes, shows or signs.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let home = Home::open(context.home())?;
    match arguments.verb {
        Verb::New(new) if new.name.is_some() => found(context, &home, &new),
        Verb::New(new) => amend(context, &home, &new),
        Verb::Show { file } => show(context, &home, file.as_deref()),
        Verb::Sign { file } => sign(context, &home, &file),
    }
}

fn found(context: &Context, home: &Home, new: &New) -> anyhow::Result<()> {
    if let Some(charters) = home.charters()? {
        return Err(hinted(
            anyhow!("this home belongs to `{}` already", charters.current().name),
            "to change its charter, say what changes, such as --add-institution KEY=NAME; to found another federation, \
             use another --home",
        ));
    }
    if new.institution.is_empty() {
        return Err(hinted(
            anyhow!("a federation needs an institution that founds it"),
            "add --institution \"NAME\"",
        ));
    }
    let founders: Result<Vec<_>, _> = new.institution.iter().map(|name| Institution::draw(name)).collect();
    let founders = founders?;
    let own = founders
        .iter()
        .map(|founder| (founder.key.institution(), founder.name.clone()));
    let mut charter = Charter {
        version: 1,
        name: new.name.clone().unwrap_or_default(),
        previous: None,
        founders: Vec::new(),
        threshold: 0,
        institutions: own.chain(new.add_institution.iter().cloned()).map(entry).collect(),
        models: new.models.clone().unwrap_or_default(),
        policies: new.policies.clone().unwrap_or_default(),
        created: unix_now(),
        doors: Vec::new(),
    };
    add_doors(&mut charter, &new.door);
    charter.founders = founders.iter().map(|founder| founder.key.institution()).collect();
    add_founders(&mut charter, &new.add_founder)?;
    charter.threshold = new.threshold.unwrap_or_else(|| majority(&charter));
    let mut signed = SignedCharter::new(&charter);
    founders.iter().for_each(|founder| signed.sign(&founder.key));
    // Keys are kept once it is known that the charter holds, so that a mistake leaves nothing behind.
    check(std::slice::from_ref(&signed), new.to.as_deref())?;
    for founder in &founders {
        home.keep_institution(founder)?;
    }
    conclude(context, home, vec![signed], new.to.as_deref())
}

fn amend(context: &Context, home: &Home, new: &New) -> anyhow::Result<()> {
    let chain = match &new.from {
        Some(file) => read(file)?,
        None => home
            .charters()?
            .context("this home has no charter to go on from")
            .hint("to found a federation: polder charter new \"NAME\" --institution \"NAME\"")?
            .chain()
            .to_vec(),
    };
    let charters = Charters::new(chain)
        .context("the charter to go on from is not in force")
        .hint("collect the missing signatures first: polder charter sign FILE")?;
    let before = charters.current();
    let mut charter = Charter {
        previous: Some(charters.hash()),
        created: unix_now(),
        ..before.clone()
    };
    for (key, name) in &new.add_institution {
        ensure!(
            charter.institution(*key).is_none(),
            "institution {key} is a member already"
        );
        charter.institutions.push(entry((*key, name.clone())));
    }
    for text in &new.remove_institution {
        let key = find(&charter, text)?.key;
        charter.institutions.retain(|member| member.key != key);
        charter.founders.retain(|founder| *founder != key);
    }
    add_founders(&mut charter, &new.add_founder)?;
    let changed_founders = charter.founders != before.founders;
    charter.threshold = match new.threshold {
        Some(threshold) => threshold,
        None if changed_founders => majority(&charter),
        None => before.threshold,
    };
    for node in &new.remove_door {
        let count = charter.doors.len();
        charter.doors.retain(|door| door.node != *node);
        ensure!(charter.doors.len() < count, "{node} is no door of the charter");
    }
    add_doors(&mut charter, &new.door);
    charter.models = new.models.clone().unwrap_or(charter.models);
    charter.policies = new.policies.clone().unwrap_or(charter.policies);
    let same = Charter {
        created: before.created,
        previous: before.previous,
        version: before.version,
        ..charter.clone()
    };
    if same == *before {
        return Err(hinted(
            anyhow!("nothing would change"),
            "say what changes, such as --add-institution KEY=NAME",
        ));
    }
    let mut signed = SignedCharter::new(&charter);
    let mut chain = charters.chain().to_vec();
    sign_with_own(home, &mut signed, &[before, &charter])?;
    chain.push(signed);
    conclude(context, home, chain, new.to.as_deref())
}

fn sign(context: &Context, home: &Home, file: &Path) -> anyhow::Result<()> {
    let mut chain = read(file)?;
    let mut last = chain.pop().ok_or(CharterError::Empty)?;
    let charter = last.charter()?;
    let before = match chain.last() {
        Some(before) => before.charter()?,
        None => charter.clone(),
    };
    sign_with_own(home, &mut last, &[&before, &charter])?;
    chain.push(last);
    conclude(context, home, chain, Some(file))
}

fn show(context: &Context, home: &Home, file: Option<&Path>) -> anyhow::Result<()> {
    let chain = match file {
        Some(file) => read(file)?,
        None => home
            .charters()?
            .context("this home belongs to no federation yet")
            .hint("join one with `polder join INVITE`, or found one with `polder charter new`")?
            .chain()
            .to_vec(),
    };
    context.show(&Answer::new(&chain)?)
}

/// Writes the charter to the file, and takes it into force in this home when enough founders have signed.
fn conclude(context: &Context, home: &Home, chain: Vec<SignedCharter>, to: Option<&Path>) -> anyhow::Result<()> {
    let mut answer = Answer::new(&chain)?;
    let charters = check(&chain, to)?;
    if let Some(file) = to {
        write_whole(file, &chain_to_bytes(&chain))?;
    }
    if let Some(charters) = charters {
        take(home, &charters)?;
        answer.in_force_here = true;
        answer.node_certified = certify_own_node(home, &charters)?;
    }
    context.show(&answer)
}

/// The charters, if enough founders have signed. Without a file for the others to sign, too few are a mistake.
fn check(chain: &[SignedCharter], to: Option<&Path>) -> anyhow::Result<Option<Charters>> {
    match Charters::new(chain.to_vec()) {
        Ok(charters) => Ok(Some(charters)),
        Err(CharterError::Unsigned { .. }) if to.is_some() => Ok(None),
        Err(error @ CharterError::Unsigned { .. }) => Err(error)
            .context("the charter needs more signatures than this home can give")
            .hint("write it to a file for the others to sign: --to FILE"),
        Err(error) => Err(error).context("the charter does not hold"),
    }
}

/// Keeps the charters, unless this home holds other ones.
fn take(home: &Home, charters: &Charters) -> anyhow::Result<()> {
    let _held = home.lock_membership()?;
    match home.charters()? {
        Some(known) if known.hash() == charters.hash() => Ok(()),
        Some(known) if known.federation() != charters.federation() => bail!(
            "this home belongs to `{}` ({}), the charter is of {}",
            known.current().name,
            known.federation(),
            charters.federation()
        ),
        Some(known) if !known.is_continued_by(charters) => {
            bail!("this home holds a charter that does not lead to this one")
        }
        Some(_) | None => Ok(home.save_charters(charters)?),
    }
}

/// A home that holds a member's key is that member's gateway: its node needs no invite. Answers whether it was
/// certified now.
fn certify_own_node(home: &Home, charters: &Charters) -> anyhow::Result<bool> {
    if home.certificate()?.is_some() {
        return Ok(false);
    }
    // In the charter's order, so that the institution that was named first certifies.
    for member in &charters.current().institutions {
        if let Some(institution) = home.institution(member.key)? {
            let node = home.node_key()?.node();
            let certificate = certify(&institution.key, charters, node, Capabilities::ALL, CERTIFICATE_SECONDS)?;
            home.save_certificate(&certificate)?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn sign_with_own(home: &Home, signed: &mut SignedCharter, charters: &[&Charter]) -> anyhow::Result<()> {
    let counts = |own: &Institution| {
        let key = own.key.institution();
        charters.iter().any(|charter| charter.founders.contains(&key))
    };
    for own in home.institutions()?.iter().filter(|own| counts(own)) {
        signed.sign(&own.key);
    }
    Ok(())
}

fn read(file: &Path) -> anyhow::Result<Vec<SignedCharter>> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    chain_from_bytes(&bytes)
        .with_context(|| format!("{} is no charter", file.display()))
        .hint("charter files are written by `polder charter new --to FILE`")
}

fn add_founders(charter: &mut Charter, texts: &[String]) -> anyhow::Result<()> {
    for text in texts {
        let key = find(charter, text)?.key;
        if !charter.founders.contains(&key) {
            charter.founders.push(key);
        }
    }
    Ok(())
}

/// Adds addresses; the format version follows from whether there are doors.
fn add_doors(charter: &mut Charter, addresses: &[(NodeId, String)]) {
    for (node, address) in addresses {
        match charter.doors.iter_mut().find(|door| door.node == *node) {
            Some(door) if door.control.contains(address) => {}
            Some(door) => door.control.push(address.clone()),
            None => charter.doors.push(Door {
                node: *node,
                control: vec![address.clone()],
                data: Vec::new(),
            }),
        }
    }
    charter.version = Charter::version_for(&charter.doors);
}

fn door_address(text: &str) -> Result<(NodeId, String), String> {
    member_at(text).ok_or_else(|| "write NODE@/dns4/gateway.example.org/tcp/4001; `polder status` prints both".into())
}

fn entry((key, name): (InstitutionId, String)) -> InstitutionEntry {
    InstitutionEntry {
        key,
        name,
        capabilities: Capabilities::ALL,
        expires: None,
    }
}

fn majority(charter: &Charter) -> u16 {
    u16::try_from(charter.founders.len() / 2 + 1).unwrap_or(u16::MAX)
}

/// What is said of a charter.
#[derive(Debug, Serialize)]
struct Answer {
    name: String,
    federation: String,
    /// Which charter of the federation it is, from 1.
    number: usize,
    hash: String,
    threshold: u16,
    institutions: Vec<Row>,
    /// Where whoever has only the charter begins, as `NODE@MULTIADDR`.
    doors: Vec<String>,
    models: String,
    policies: String,
    created: String,
    /// Whether enough founders have signed.
    complete: bool,
    in_force_here: bool,
    node_certified: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    key: String,
    name: String,
    capabilities: String,
    founder: bool,
    signed: bool,
}

impl Answer {
    fn new(chain: &[SignedCharter]) -> anyhow::Result<Self> {
        let (Some(first), Some(last)) = (chain.first(), chain.last()) else {
            return Err(CharterError::Empty.into());
        };
        let charter = last.charter()?;
        let signers = last.signers(&charter.founders);
        let members: BTreeMap<_, _> = charter.institutions.iter().map(|entry| (entry.key, entry)).collect();
        let row = |key: &InstitutionId, name: &str, capabilities: Capabilities| Row {
            key: key.to_string(),
            name: name.to_string(),
            capabilities: capabilities.to_string(),
            founder: charter.founders.contains(key),
            signed: signers.contains(key),
        };
        let founders_outside = charter.founders.iter().filter(|key| !members.contains_key(key));
        let mut institutions: Vec<Row> = Vec::new();
        institutions.extend(
            charter
                .institutions
                .iter()
                .map(|entry| row(&entry.key, &entry.name, entry.capabilities)),
        );
        institutions.extend(founders_outside.map(|key| row(key, "(founder, no member)", Capabilities::default())));
        Ok(Self {
            name: charter.name.clone(),
            federation: first.hash().to_string(),
            number: chain.len(),
            hash: last.hash().to_string(),
            threshold: charter.threshold,
            models: charter.models.clone(),
            policies: charter.policies.clone(),
            created: crate::institutions::date(charter.created),
            complete: Charters::new(chain.to_vec()).is_ok(),
            institutions,
            doors: charter.doors.iter().flat_map(door_lines).collect(),
            in_force_here: false,
            node_certified: false,
        })
    }
}

/// A door's addresses, as `--door` takes them. They are a founder's words: nothing that a terminal would obey.
fn door_lines(door: &Door) -> impl Iterator<Item = String> {
    let printable = |text: &str| text.chars().filter(|letter| !letter.is_control()).collect::<String>();
    let addresses = door.control.iter();
    addresses.map(move |address| format!("{}@{}", door.node, printable(address)))
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} · charter {} of {}", self.name, self.number, self.created)?;
        writeln!(f, "federation  {}", self.federation)?;
        match self.threshold {
            1 => writeln!(f, "decided by  the signature of 1 founder")?,
            count => writeln!(f, "decided by  the signatures of {count} founders")?,
        }
        for (label, text) in [("models", &self.models), ("policies", &self.policies)] {
            if !text.is_empty() {
                writeln!(f, "{label:<12}{text}")?;
            }
        }
        for row in &self.institutions {
            let role = match (row.founder, row.signed) {
                (true, true) => "founder, signed",
                (true, false) => "founder, not signed",
                (false, _) => "member",
            };
            writeln!(f, "  {}  {} ({role}; {})", row.key, row.name, row.capabilities)?;
        }
        for door in &self.doors {
            writeln!(f, "  door {door}")?;
        }
        match (self.complete, self.in_force_here) {
            (false, _) => writeln!(f, "not in force yet: other founders run `polder charter sign FILE`")?,
            (true, true) => writeln!(f, "in force in this home")?,
            (true, false) => {}
        }
        if self.node_certified {
            writeln!(
                f,
                "this home's node is certified: start it with `polder join`, invite others with `polder invite`"
            )?;
        }
        Ok(())
    }
}
