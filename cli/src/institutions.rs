//! How people name institutions and nodes, and how times are printed.

use anyhow::{Context as _, anyhow};
use polder_node::home::{Home, Institution};
use polder_protocol::charter::{Charter, InstitutionEntry};
use polder_protocol::hash::{InstitutionId, NodeId};
use polder_protocol::time::UnixSeconds;

use crate::failure::{Hint, hinted};

/// Reads `KEY=NAME`.
pub(crate) fn named(text: &str) -> Result<(InstitutionId, String), String> {
    let (key, name) = text.split_once('=').ok_or("expected KEY=NAME")?;
    let key = key.trim().parse().map_err(|error| format!("the key: {error}"))?;
    Ok((key, name.trim().to_string()))
}

/// The member that a key or a name means.
pub(crate) fn find<'a>(charter: &'a Charter, text: &str) -> anyhow::Result<&'a InstitutionEntry> {
    let key = text.parse::<InstitutionId>().ok();
    let means = |entry: &&InstitutionEntry| Some(entry.key) == key || entry.name == text;
    charter.institutions.iter().find(means).ok_or_else(|| {
        let names: Vec<_> = charter.institutions.iter().map(|entry| entry.name.as_str()).collect();
        hinted(
            anyhow!("`{text}` is no institution of `{}`", charter.name),
            format!("there are: {}", names.join(", ")),
        )
    })
}

/// The institution in whose name this home acts: the one that is named, or the first of the charter whose key is here.
pub(crate) fn acting(home: &Home, charter: &Charter, text: Option<&str>) -> anyhow::Result<Institution> {
    if let Some(text) = text {
        let key = find(charter, text)?.key;
        return home
            .institution(key)?
            .with_context(|| format!("this home does not hold the key of `{text}`"))
            .hint("run this on the institution's gateway");
    }
    for member in &charter.institutions {
        if let Some(institution) = home.institution(member.key)? {
            return Ok(institution);
        }
    }
    Err(hinted(
        anyhow!("this home holds no key of an institution of `{}`", charter.name),
        "run this on your institution's gateway",
    ))
}

/// Reads a node's id.
pub(crate) fn node(text: &str) -> Result<NodeId, String> {
    text.parse()
        .map_err(|error| format!("a node is named by its key, which `polder status` prints there: {error}"))
}

/// A time as people write it, in UTC.
pub(crate) fn date(time: UnixSeconds) -> String {
    let seconds = i64::try_from(time.0).unwrap_or(i64::MAX);
    match jiff::Timestamp::from_second(seconds) {
        Ok(timestamp) => timestamp.to_string(),
        Err(_) => format!("{seconds} s after 1970"),
    }
}
