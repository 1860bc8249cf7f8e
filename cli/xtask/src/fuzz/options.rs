//! What `xtask fuzz` is told.

use anyhow::{Context as _, bail, ensure};

/// How `xtask fuzz` is called.
pub(crate) const USAGE: &str = "xtask fuzz protocol|kernels|node SECONDS [TARGET]... [--sanitizer none|address]";

const PACKAGES: [&str; 3] = ["protocol", "kernels", "node"];

/// What watches over memory while a target runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Sanitizer {
    /// Nothing: the fastest, and enough where nothing is unsafe. The stable compiler builds it.
    #[default]
    None,
    /// Every access: two to three times slower, and only a nightly compiler builds it.
    Address,
}

/// What to run, and for how long.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) package: String,
    /// For each target; not 0, which libFuzzer takes for ever.
    pub(crate) seconds: u64,
    targets: Vec<String>,
    pub(crate) sanitizer: Sanitizer,
}

impl Options {
    /// Reads what follows `fuzz` on the command line.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub(crate) fn read(arguments: &[&str]) -> anyhow::Result<Self> {
        let (mut words, mut sanitizer) = (Vec::new(), Sanitizer::None);
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match *argument {
                "--sanitizer" => {
                    sanitizer = match arguments.next().copied() {
                        Some("none") => Sanitizer::None,
                        Some("address") => Sanitizer::Address,
                        other => bail!(
                            "`--sanitizer {}` is not known; usage: {USAGE}",
                            other.unwrap_or_default()
                        ),
                    };
                }
                flag if flag.starts_with('-') => bail!("`{flag}` is not known; usage: {USAGE}"),
                word => words.push(word),
            }
        }
        let [package, seconds, targets @ ..] = words.as_slice() else {
            bail!("usage: {USAGE}");
        };
        ensure!(
            PACKAGES.contains(package),
            "`{package}` has no fuzz targets; usage: {USAGE}"
        );
        let seconds: u64 = seconds
            .parse()
            .with_context(|| format!("`{seconds}` is no number of seconds"))?;
        ensure!(seconds > 0, "a target needs at least one second");
        Ok(Self {
            package: (*package).to_owned(),
            seconds,
            targets: targets.iter().map(|target| (*target).to_owned()).collect(),
            sanitizer,
        })
    }

    /// Those of `known` that were named, or all.
    ///
    /// # Errors
    ///
    /// Says which is not known, and which are.
    pub(crate) fn chosen(&self, known: &[String]) -> anyhow::Result<Vec<String>> {
        if let Some(wrong) = self.targets.iter().find(|target| !known.contains(target)) {
            bail!("{} has no target `{wrong}`; it has: {}", self.package, known.join(", "));
        }
        let chosen = |target: &&String| self.targets.is_empty() || self.targets.contains(target);
        Ok(known.iter().filter(chosen).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_a_sanitizer_may_be_named() {
        let options = Options::read(&["kernels", "60", "gguf", "--sanitizer", "address", "config"]).unwrap();
        assert_eq!(options.sanitizer, Sanitizer::Address);
        let known = ["config", "gguf", "part_file"].map(str::to_owned);
        assert_eq!(options.chosen(&known).unwrap(), ["config", "gguf"]);
        let all = Options::read(&["node", "1"]).unwrap();
        assert_eq!(all.chosen(&known).unwrap(), known);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (arguments, named) in [
            (&["protocol"][..], "usage"),
            (&["simulations", "60"], "`simulations` has no fuzz targets"),
            (&["protocol", "long"], "`long` is no number"),
            (&["protocol", "0"], "at least one second"),
            (&["protocol", "60", "--forever"], "`--forever` is not known"),
            (&["protocol", "60", "--sanitizer"], "`--sanitizer ` is not known"),
        ] {
            let error = format!("{:#}", Options::read(arguments).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
        let options = Options::read(&["protocol", "60", "invites"]).unwrap();
        let error = options.chosen(&["invite".to_owned()]).unwrap_err().to_string();
        assert!(error.contains("no target `invites`; it has: invite"), "{error}");
    }
}
