//! Once the faults stop, rounds go on, and the run comes to its end in the time that it may take.

use super::{End, Invariant, Seen};

#[derive(Debug)]
pub(crate) struct Progress;

impl Invariant for Progress {
    fn name(&self) -> &'static str {
        "rounds go on"
    }

    fn see(&mut self, _seen: &Seen<'_>) -> Result<(), String> {
        Ok(())
    }

    fn end(&self, end: &End) -> Result<(), String> {
        match end.hosts.iter().find(|host| !host.is_over) {
            Some(host) => Err(format!(
                "host {} has {} entries, and the run is not over for it",
                host.host, host.entries
            )),
            None => Ok(()),
        }
    }
}
