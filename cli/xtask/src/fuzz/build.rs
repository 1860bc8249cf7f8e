//! Builds a package's fuzz targets.
//!
//! All targets of a package are one program that does what its name says, so one is built and the others are links to it:
//! the code of twenty targets is compiled and linked once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use super::options::Sanitizer;
use super::starts;

/// The names of the programs in a package's `fuzz/Cargo.toml`.
pub(super) fn targets(manifest: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let manifest: toml::Table = text.parse().context("the manifest is malformed")?;
    let programs = manifest.get("bin").and_then(|programs| programs.as_array());
    let name = |program: &toml::Value| program.get("name")?.as_str().map(str::to_owned);
    let mut names: Vec<String> = programs.into_iter().flatten().filter_map(name).collect();
    ensure!(!names.is_empty(), "there are no fuzz targets");
    names.sort();
    Ok(names)
}

/// Builds one of `known`, and answers with its program.
pub(super) fn build(root: &Path, fuzz: &Path, known: &[String], sanitizer: Sanitizer) -> anyhow::Result<PathBuf> {
    let target = known.first().context("there are no fuzz targets")?;
    ensure!(
        starts("cargo", &["fuzz", "--version"]),
        "cargo-fuzz is not installed: `cargo install cargo-fuzz`"
    );
    // The versions that are shipped; what only fuzzing needs is added to them.
    let lock = fuzz.join("Cargo.lock");
    if !lock.exists() {
        fs::copy(root.join("Cargo.lock"), &lock).context("cannot copy Cargo.lock")?;
    }
    let mut command = Command::new("cargo");
    let folder = match sanitizer {
        // libFuzzer wants instructions that only a nightly compiler offers by that name; so does the stable one.
        Sanitizer::None => {
            command
                .env("RUSTC_BOOTSTRAP", "1")
                .args(["fuzz", "build", "--sanitizer", "none"]);
            fuzz.join("target")
        }
        Sanitizer::Address => {
            ensure!(
                starts("cargo", &["+nightly", "--version"]),
                "the address sanitizer needs a nightly compiler: `rustup toolchain install nightly`"
            );
            // The toolchain of whoever runs this is in the environment, and would win.
            command
                .env_remove("RUSTUP_TOOLCHAIN")
                .env_remove("RUSTC")
                .env_remove("CARGO");
            command.args(["+nightly", "fuzz", "build", "--sanitizer", "address"]);
            fuzz.join("target/address")
        }
    };
    let built = command
        .args(["--codegen-units", "16", "--target-dir"])
        .arg(&folder)
        .arg(target)
        .current_dir(fuzz.parent().unwrap_or(root))
        .status();
    if !built.context("cannot run cargo")?.success() {
        bail!("the targets are not built");
    }
    let found = fs::read_dir(&folder).context("nothing was built")?;
    let found = found.filter_map(|entry| Some(entry.ok()?.path().join("release").join(target)));
    found
        .into_iter()
        .find(|program| program.is_file())
        .context("the built program is not found")
}

/// The same program under the name of a target.
pub(super) fn named(program: &Path, found: &Path, target: &str) -> anyhow::Result<PathBuf> {
    let folder = found.join("programs");
    fs::create_dir_all(&folder)?;
    let named = folder.join(target);
    if named.exists() {
        fs::remove_file(&named)?;
    }
    if fs::hard_link(program, &named).is_err() {
        fs::copy(program, &named).with_context(|| format!("cannot make {}", named.display()))?;
    }
    Ok(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_names_its_targets() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for (package, target) in [("protocol", "invite"), ("kernels", "gguf"), ("node", "greeting")] {
            let targets = targets(&root.join(package).join("fuzz/Cargo.toml")).unwrap();
            assert!(targets.iter().any(|known| known == target), "{package}: {targets:?}");
        }
    }
}
