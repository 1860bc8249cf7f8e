//! The log is one: whatever entry any node writes down at a place, it is the same entry.

use polder_protocol::hash::Digest;
use polder_protocol::node::{Effect, Persist, Report};

use super::{End, Invariant, Seen};

#[derive(Debug, Default)]
pub(crate) struct OneLog {
    hashes: Vec<Digest>,
}

impl Invariant for OneLog {
    fn name(&self) -> &'static str {
        "the log is one"
    }

    fn see(&mut self, seen: &Seen<'_>) -> Result<(), String> {
        if let Effect::Report(report @ (Report::Equivocation { .. } | Report::LogDamaged { .. })) = seen.effect {
            return Err(format!("host {} reports {report:?}", seen.host));
        }
        let Effect::Persist {
            what: Persist::Entry(entry),
            ..
        } = seen.effect
        else {
            return Ok(());
        };
        let place = entry.index as usize;
        match self.hashes.get(place) {
            None if place == self.hashes.len() => self.hashes.push(entry.hash()),
            None => return Err(format!("host {} writes entry {place} before the one before", seen.host)),
            Some(hash) if *hash != entry.hash() => {
                return Err(format!(
                    "host {} has another entry {place}: {:?}",
                    seen.host, entry.body
                ));
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn end(&self, end: &End) -> Result<(), String> {
        let last = self.hashes.last().copied().unwrap_or_default();
        let behind = end
            .hosts
            .iter()
            .find(|host| host.head != last || host.entries as usize != self.hashes.len());
        match behind {
            Some(host) => Err(format!(
                "host {} has {} of {} entries",
                host.host,
                host.entries,
                self.hashes.len()
            )),
            None => Ok(()),
        }
    }
}
