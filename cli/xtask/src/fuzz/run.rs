//! Runs one target, and reads what libFuzzer says of it.

use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// What one input may take, in seconds. Each is a few kilobytes and takes less than a millisecond; but the alarm runs on
/// while a busy machine, or a person, lets the target wait.
const INPUT_SECONDS_MAX: u32 = 120;

/// Memory of one target, in MiB: an input that makes a decoder take more than it justifies ends the run.
const MEMORY_MIB_MAX: u32 = 1_024;

/// Between two lines about a target that runs.
const PROGRESS_EVERY: Duration = Duration::from_secs(30);

/// What a target gets to end by itself after Ctrl-C.
const STOPPING_TIME_MAX: Duration = Duration::from_secs(3);

/// Lines that are shown of a target that fails: the panic, and libFuzzer's trace.
const LINES_SHOWN: usize = 40;

/// How a target ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Its time was over.
    InTime,
    /// By Ctrl-C.
    Interrupted,
    /// On an input, which was kept, with its last words.
    Failed { input: Option<PathBuf>, words: String },
}

/// What a target has done.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) ended: Ended,
    pub(super) executions: u64,
    seconds: u64,
    /// Edges reached by the inputs that it began with, and in the end.
    coverage: (u64, u64),
    /// Inputs that it began with, and in the end.
    inputs: (u64, u64),
    /// An input that took more than ten seconds.
    pub(super) slow: Option<PathBuf>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (coverage, inputs) = (self.coverage, self.inputs);
        let ended = match &self.ended {
            Ended::InTime => "no failure",
            Ended::Interrupted => "interrupted",
            Ended::Failed { .. } => "FAILED",
        };
        write!(
            f,
            "{} inputs in {} s, coverage {} to {}, corpus {} to {}, {ended}",
            self.executions, self.seconds, coverage.0, coverage.1, inputs.0, inputs.1
        )
    }
}

/// Runs `program` over two corpora, the first of which grows, and keeps failing inputs under names that begin with
/// `failures`.
pub(super) fn one(
    program: &Path,
    corpora: &[PathBuf; 2],
    failures: &Path,
    seconds: u64,
    stopped: &AtomicBool,
) -> anyhow::Result<Report> {
    for folder in [Some(corpora[0].as_path()), failures.parent()].into_iter().flatten() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let began = Instant::now();
    let mut child = Command::new(program)
        .args(corpora)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-artifact_prefix={}", failures.display()))
        .arg("-print_final_stats=1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut words = Words::default();
    listen(&mut child, &mut words, stopped, began)?;
    let in_time = child.wait()?.success();
    let ended = match (in_time, stopped.load(Ordering::Relaxed)) {
        (_, true) if words.failing.is_none() => Ended::Interrupted,
        (true, _) => Ended::InTime,
        (false, _) => Ended::Failed {
            input: words.failing,
            words: words.latest.into_iter().collect::<Vec<_>>().join("\n"),
        },
    };
    Ok(Report {
        ended,
        executions: words.executions,
        seconds: began.elapsed().as_secs(),
        coverage: words.coverage,
        inputs: words.inputs,
        slow: words.slow,
    })
}

/// Takes in what the target says, until it ends or is stopped.
fn listen(child: &mut Child, words: &mut Words, stopped: &AtomicBool, began: Instant) -> anyhow::Result<()> {
    let told = child.stderr.take().context("the target has no voice")?;
    let (sender, lines) = mpsc::sync_channel(64);
    // It ends with the target, which closes the pipe.
    thread::spawn(move || {
        for line in BufReader::new(told).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    let (mut shown, mut stopping) = (began, None::<Instant>);
    loop {
        match lines.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => words.hear(&line),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        if shown.elapsed() >= PROGRESS_EVERY {
            shown = Instant::now();
            let (coverage, inputs) = (words.coverage.1, words.inputs.1);
            println!(
                "  after {} s: coverage {coverage}, corpus {inputs}",
                began.elapsed().as_secs()
            );
        }
        if stopped.load(Ordering::Relaxed) && stopping.get_or_insert_with(Instant::now).elapsed() >= STOPPING_TIME_MAX {
            // Only this program was told to stop. Findings are on disk already.
            child.kill()?;
        }
    }
}

/// What libFuzzer has said so far.
#[derive(Debug, Default)]
struct Words {
    executions: u64,
    coverage: (u64, u64),
    inputs: (u64, u64),
    failing: Option<PathBuf>,
    slow: Option<PathBuf>,
    latest: VecDeque<String>,
}

impl Words {
    /// Takes in one line.
    fn hear(&mut self, line: &str) {
        // `#4096 INITED cov: 812 ft: 1204 corp: 43/12Kb exec/s: 0 rss: 41Mb`, and the like for each new input.
        if let Some(counts) = line.strip_prefix('#') {
            let mut fields = counts.split_whitespace();
            if let Some(count) = fields.next().and_then(|count| count.parse().ok()) {
                self.executions = count;
            }
            let is_beginning = fields.next() == Some("INITED");
            while let Some(field) = fields.next() {
                let number = |text: &str| text.split('/').next()?.parse().ok();
                let place = match field {
                    "cov:" => &mut self.coverage,
                    "corp:" => &mut self.inputs,
                    _ => continue,
                };
                if let Some(number) = fields.next().and_then(number) {
                    place.1 = number;
                    if is_beginning {
                        place.0 = number;
                    }
                }
            }
            return;
        }
        if let Some(count) = line.strip_prefix("stat::number_of_executed_units:") {
            self.executions = count.trim().parse().unwrap_or(self.executions);
        }
        if let Some((_, path)) = line.split_once("Test unit written to ") {
            let path = PathBuf::from(path.trim());
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            // Slow is not wrong yet; the run goes on.
            let place = match name.contains("-slow-unit-") {
                true => &mut self.slow,
                false => &mut self.failing,
            };
            *place = Some(path);
        }
        if self.latest.len() == LINES_SHOWN {
            self.latest.pop_front();
        }
        self.latest.push_back(line.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_what_libfuzzer_says() {
        let mut words = Words::default();
        for line in [
            "INFO: seed corpus: files: 4 min: 3b max: 36b total: 91b rss: 40Mb",
            "#5\tINITED cov: 330 ft: 480 corp: 4/91b exec/s: 0 rss: 41Mb",
            "#10\tNEW    cov: 331 ft: 482 corp: 5/1024b lim: 4 exec/s: 0 rss: 42Mb L: 14/36 MS: 1 EraseBytes-",
            "#524288\tpulse  cov: 340 ft: 512 corp: 9/301Kb lim: 4096 exec/s: 262144 rss: 80Mb",
            "stat::number_of_executed_units: 600001",
        ] {
            words.hear(line);
        }
        assert_eq!(words.executions, 600_001);
        assert_eq!((words.coverage, words.inputs), ((330, 340), (4, 9)));
        assert_eq!((words.failing, words.slow), (None, None));
    }

    #[test]
    fn a_failing_input_is_told_from_a_slow_one() {
        let mut words = Words::default();
        words.hear("Slowest unit: 11 s:");
        words.hear("artifact_prefix='failures/gguf-'; Test unit written to failures/gguf-slow-unit-00");
        assert_eq!(words.failing, None);
        words.hear("thread '<unnamed>' panicked at targets/mod.rs:7:5:");
        words.hear("artifact_prefix='failures/gguf-'; Test unit written to failures/gguf-crash-11");
        assert_eq!(words.failing, Some(PathBuf::from("failures/gguf-crash-11")));
        assert_eq!(words.slow, Some(PathBuf::from("failures/gguf-slow-unit-00")));
        assert_eq!(words.latest.len(), 4);
    }
}
