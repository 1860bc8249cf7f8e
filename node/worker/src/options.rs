//! What a worker is told when it starts: how many threads, which device.

use polder_kernels::device::{Choice, UnknownDevice};
use thiserror::Error;

/// What a worker is told when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Threads that compute; `None` for one per core.
    pub threads: Option<usize>,
    /// Which device.
    pub device: Choice,
}

/// What a worker was told makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OptionsError {
    /// A device that does not exist.
    #[error(transparent)]
    Device(#[from] UnknownDevice),
    /// No number of threads.
    #[error("`{0}` is not a number of threads from 1 to {THREADS_MAX}")]
    Threads(String),
    /// An argument without its value.
    #[error("`{0}` needs a value")]
    Value(String),
    /// An argument that does not exist.
    #[error("`{0}` is not an option of a worker: expected `--threads` or `--device`")]
    Unknown(String),
}

/// More threads than the largest machines have cores.
const THREADS_MAX: usize = 4096;

impl Options {
    /// Reads `POLDER_WORKER_THREADS` and `POLDER_WORKER_DEVICE` through `variable`, then `--threads` and `--device`,
    /// which win.
    ///
    /// # Errors
    ///
    /// [`OptionsError`] names what makes no sense.
    pub fn read(
        variable: impl Fn(&str) -> Option<String>,
        arguments: impl IntoIterator<Item = String>,
    ) -> Result<Self, OptionsError> {
        let mut options = Self::default();
        if let Some(threads) = variable("POLDER_WORKER_THREADS") {
            options.threads = Some(parse_threads(&threads)?);
        }
        if let Some(device) = variable("POLDER_WORKER_DEVICE") {
            options.device = device.parse()?;
        }
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument, arguments.next()),
            };
            if name != "--threads" && name != "--device" {
                return Err(OptionsError::Unknown(name));
            }
            let Some(value) = value else {
                return Err(OptionsError::Value(name));
            };
            if name == "--threads" {
                options.threads = Some(parse_threads(&value)?);
            } else {
                options.device = value.parse()?;
            }
        }
        Ok(options)
    }
}

fn parse_threads(text: &str) -> Result<usize, OptionsError> {
    match text.parse() {
        Ok(threads) if (1..=THREADS_MAX).contains(&threads) => Ok(threads),
        _ => Err(OptionsError::Threads(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_win_over_variables() {
        let variable = |name: &str| (name == "POLDER_WORKER_THREADS").then(|| "8".to_owned());
        let arguments = ["--threads=2", "--device", "cpu"].map(str::to_owned);
        assert_eq!(
            Options::read(variable, arguments),
            Ok(Options {
                threads: Some(2),
                device: Choice::Cpu
            })
        );
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let read = |arguments: &[&str]| Options::read(|_| None, arguments.iter().map(|text| (*text).to_owned()));
        let text = "tpu".to_owned();
        assert_eq!(
            read(&["--device", "tpu"]),
            Err(OptionsError::Device(UnknownDevice { text }))
        );
        assert_eq!(read(&["--threads", "0"]), Err(OptionsError::Threads("0".to_owned())));
        assert_eq!(read(&["--threads"]), Err(OptionsError::Value("--threads".to_owned())));
        assert_eq!(read(&["--fast"]), Err(OptionsError::Unknown("--fast".to_owned())));
    }
}
