//! Runs all fuzz targets of a package, one after another, for so many seconds each.
//!
//! libFuzzer wants instructions that only a nightly compiler offers by that name; `RUSTC_BOOTSTRAP` lets the stable one
//! offer them too. Findings beyond the committed corpus stay in `target/fuzz`, so that the next run goes on from them.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};

/// What one input may take, in seconds: each is a few kilobytes, and a debugger's patience on a busy machine.
const INPUT_SECONDS_MAX: u32 = 25;

/// Memory of one target, in MiB: an input that makes a decoder take more than it justifies ends the run.
const MEMORY_MIB_MAX: u32 = 2_048;

/// Runs `folder/fuzz` under `root`; answers with what it has done.
pub(crate) fn run(root: &Path, package: &str, seconds: u64) -> anyhow::Result<String> {
    let folder = root.join(package).join("fuzz");
    let corpus = folder.join("corpus");
    let mut targets: Vec<String> = fs::read_dir(&corpus)
        .with_context(|| format!("{} has no fuzz targets", root.join(package).display()))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    targets.sort();
    let built = Command::new("cargo")
        .args(["fuzz", "build", "--sanitizer", "none"])
        .current_dir(root.join(package))
        .env("RUSTC_BOOTSTRAP", "1")
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        bail!("the targets are not built: is cargo-fuzz installed? `cargo install cargo-fuzz`");
    }
    let release = fs::read_dir(folder.join("target"))
        .context("nothing was built")?
        .filter_map(|entry| Some(entry.ok()?.path().join("release")))
        .find(|folder| targets.first().is_some_and(|target| folder.join(target).exists()))
        .context("the built targets are not found")?;
    let began = Instant::now();
    let mut executions = 0;
    for target in &targets {
        let found = root.join("target/fuzz").join(package).join(target);
        fs::create_dir_all(&found)?;
        let mut child = Command::new(release.join(target))
            .arg(&found)
            .arg(corpus.join(target))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
            .arg(format!("-artifact_prefix={}/crash-", found.display()))
            .arg("-print_final_stats=1")
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {target}"))?;
        let mut words = String::new();
        if let Some(mut told) = child.stderr.take() {
            let mut bytes = Vec::new();
            told.read_to_end(&mut bytes)?;
            words = String::from_utf8_lossy(&bytes).into_owned();
        }
        if !child.wait()?.success() {
            let tail: Vec<&str> = words.lines().rev().take(40).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("{target} has failed:\n{}", tail.join("\n"));
        }
        let count = words
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
            .and_then(|count| count.trim().parse::<u64>().ok())
            .unwrap_or_default();
        executions += count;
        println!("{package}/{target}: {count} inputs in {seconds} s, no failure");
    }
    Ok(format!(
        "{} targets of {package}: {executions} inputs in {} s, no failure",
        targets.len(),
        began.elapsed().as_secs()
    ))
}
