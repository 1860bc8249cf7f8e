//! Runs the fuzz targets of a package, one after another, for so many seconds each.
//!
//! What is found beyond the committed corpus stays in `target/fuzz`, so that the next run goes on from there. A target that
//! fails does not keep the others from their time.

mod build;
mod options;
mod run;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use std::{fs, thread};

use anyhow::{Context as _, bail, ensure};

pub(crate) use options::{Options, USAGE};
use run::Ended;

/// The folders of a package's fuzz targets.
struct Place {
    /// Where the targets are described, and their corpora are committed.
    fuzz: PathBuf,
    /// Where programs, findings and failures are.
    found: PathBuf,
}

/// Runs targets of `root`'s package; answers with what was done.
///
/// # Errors
///
/// Names what is not built, and each target that failed with the command that repeats it.
pub(crate) fn run(root: &Path, options: &Options) -> anyhow::Result<String> {
    let root = root.canonicalize().context("the repository is not found")?;
    let package = &options.package;
    let place = Place {
        fuzz: root.join(package).join("fuzz"),
        found: root.join("target/fuzz").join(package),
    };
    let known = build::targets(&place.fuzz.join("Cargo.toml"))?;
    let chosen = options.chosen(&known)?;
    without_a_corpus(&place, &known)?;
    println!(
        "{} of {} targets of {package}, {} s each: {} s in all",
        chosen.len(),
        known.len(),
        options.seconds,
        options.seconds.saturating_mul(chosen.len() as u64)
    );
    let program = build::build(&root, &place.fuzz, &known, options.sanitizer)?;
    let stopped = stop_on_interrupt()?;

    let began = Instant::now();
    let (mut executions, mut failed, mut ran) = (0, Vec::new(), 0);
    for (index, target) in chosen.iter().enumerate() {
        if stopped.load(Ordering::Relaxed) {
            break;
        }
        let program = build::named(&program, &place.found, target)?;
        let corpora = [
            place.found.join("corpus").join(target),
            place.fuzz.join("corpus").join(target),
        ];
        let failures = place.found.join("failures").join(format!("{target}-"));
        println!("{package}/{target}: {} of {}", index + 1, chosen.len());
        let report = run::one(&program, &corpora, &failures, options.seconds, &stopped)?;
        executions += report.executions;
        ran += 1;
        println!("{package}/{target}: {report}");
        if let Some(slow) = &report.slow {
            println!("  slow: {} {}", program.display(), slow.display());
        }
        if let Ended::Failed { input, words } = &report.ended {
            println!("{words}");
            failed.push(match input {
                Some(input) => format!("{target}, repeat it with: {} {}", program.display(), input.display()),
                None => format!("{target}, and left no input: {}", program.display()),
            });
        }
    }
    let seconds = began.elapsed().as_secs();
    let done = format!("{ran} targets of {package}: {executions} inputs in {seconds} s");
    ensure!(failed.is_empty(), "{done}; failed:\n  {}", failed.join("\n  "));
    ensure!(!stopped.load(Ordering::Relaxed), "{done}; interrupted");
    Ok(format!("{done}, no failure"))
}

/// Refuses targets without a corpus, and folders of the corpus without a target.
fn without_a_corpus(place: &Place, known: &[String]) -> anyhow::Result<()> {
    let corpus = place.fuzz.join("corpus");
    let folders = fs::read_dir(&corpus).with_context(|| format!("cannot read {}", corpus.display()))?;
    let folders: Vec<String> = folders
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    if let Some(folder) = folders.iter().find(|folder| !known.contains(folder)) {
        bail!("{}/{folder} belongs to no target", corpus.display());
    }
    if let Some(target) = known.iter().find(|target| !folders.contains(target)) {
        bail!("{target} has no folder in {}", corpus.display());
    }
    Ok(())
}

/// Becomes true when the user presses Ctrl-C. A terminal tells the running target too, which then ends by itself.
fn stop_on_interrupt() -> anyhow::Result<Arc<AtomicBool>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot listen for Ctrl-C")?;
    let stopped = Arc::new(AtomicBool::new(false));
    let told = stopped.clone();
    thread::spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            told.store(true, Ordering::Relaxed);
        }
    });
    Ok(stopped)
}

/// Whether a program can be started at all.
fn starts(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    let command = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
