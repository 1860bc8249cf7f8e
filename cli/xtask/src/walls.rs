//! The walls between packages: which may import which, and what `protocol` must never contain.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// One package, the own packages that it may import, and foreign ones that it must not. Its tests may import further ones.
struct Wall {
    folder: &'static str,
    package: &'static str,
    may_import: &'static [&'static str],
    may_import_in_tests: &'static [&'static str],
    never: &'static [&'static str],
}

/// The table of `docs/src/architecture.md`.
const WALLS: &[Wall] = &[
    Wall {
        folder: "protocol",
        package: "polder-protocol",
        may_import: &[],
        may_import_in_tests: &[],
        never: &["tokio", "libp2p", "quinn", "burn", "std", "sled"],
    },
    Wall {
        folder: "kernels/reference",
        package: "polder-reference",
        may_import: &[],
        may_import_in_tests: &[],
        never: &["burn", "tokio"],
    },
    Wall {
        folder: "kernels",
        package: "polder-kernels",
        may_import: &["polder-protocol"],
        may_import_in_tests: &["polder-reference"],
        never: &["tokio", "libp2p", "quinn", "sled"],
    },
    Wall {
        folder: "node/worker",
        package: "polder-worker",
        may_import: &["polder-protocol", "polder-kernels"],
        may_import_in_tests: &[],
        never: &["libp2p", "quinn", "sled"],
    },
    Wall {
        folder: "node",
        package: "polder-node",
        may_import: &["polder-protocol"],
        may_import_in_tests: &[],
        never: &["burn", "cubecl"],
    },
    Wall {
        folder: "simulations",
        package: "polder-simulations",
        may_import: &["polder-protocol", "polder-reference"],
        may_import_in_tests: &[],
        never: &["tokio", "libp2p", "quinn", "burn"],
    },
    Wall {
        folder: "cli",
        package: "polder",
        may_import: &["polder-protocol", "polder-node", "polder-worker"],
        // Whoever attacks a daemon in a test speaks to its sockets, not through its library.
        may_import_in_tests: &["libp2p", "libp2p-stream", "quinn"],
        never: &["burn", "libp2p", "quinn"],
    },
    Wall {
        folder: "cli/xtask",
        package: "xtask",
        may_import: &[],
        may_import_in_tests: &[],
        never: &[],
    },
];

/// Checks every package's manifest, and the sources of `protocol`.
///
/// # Errors
///
/// Names the package and the import that breaks a wall.
pub(crate) fn check(root: &Path) -> Result<String> {
    for wall in WALLS {
        let manifest = read_manifest(&root.join(wall.folder))?;
        check_imports(wall, &manifest, "dependencies", wall.may_import)?;
        check_imports(wall, &manifest, "build-dependencies", wall.may_import)?;
        let in_tests: Vec<_> = wall
            .may_import
            .iter()
            .chain(wall.may_import_in_tests)
            .copied()
            .collect();
        check_imports(wall, &manifest, "dev-dependencies", &in_tests)?;
    }
    check_members(root)?;
    let files = check_protocol_sources(&root.join("protocol/src"))?;
    Ok(format!(
        "{} packages keep their walls; {files} files of protocol stay without std",
        WALLS.len()
    ))
}

fn read_manifest(folder: &Path) -> Result<toml::Table> {
    let path = folder.join("Cargo.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.parse().with_context(|| format!("{} is not TOML", path.display()))
}

fn check_imports(wall: &Wall, manifest: &toml::Table, section: &str, allowed: &[&str]) -> Result<()> {
    let Some(imports) = manifest.get(section).and_then(toml::Value::as_table) else {
        return Ok(());
    };
    let own: BTreeMap<_, _> = WALLS.iter().map(|wall| (wall.package, wall.folder)).collect();
    for import in imports.keys().map(String::as_str) {
        ensure!(
            !own.contains_key(import) || allowed.contains(&import),
            "{} must not import {import} (in [{section}] of {}/Cargo.toml)",
            wall.package,
            wall.folder
        );
        ensure!(
            allowed.contains(&import)
                || !wall
                    .never
                    .iter()
                    .any(|never| import == *never || import.starts_with(&format!("{never}-"))),
            "{} must never import {import} (in [{section}] of {}/Cargo.toml)",
            wall.package,
            wall.folder
        );
    }
    Ok(())
}

/// A package that is not in the table has no walls, so there is none.
fn check_members(root: &Path) -> Result<()> {
    let manifest = read_manifest(root)?;
    let members = manifest
        .get("workspace")
        .and_then(|workspace| workspace.get("members"))
        .and_then(toml::Value::as_array)
        .context("the root Cargo.toml names no members")?;
    for member in members.iter().filter_map(toml::Value::as_str) {
        ensure!(
            WALLS.iter().any(|wall| wall.folder == member),
            "{member} has no row in the table of walls"
        );
    }
    Ok(())
}

/// `#![no_std]` already refuses clocks, files and threads; this refuses the ways around it.
fn check_protocol_sources(folder: &Path) -> Result<usize> {
    let root = fs::read_to_string(folder.join("lib.rs")).context("cannot read protocol/src/lib.rs")?;
    ensure!(root.contains("#![no_std]"), "protocol/src/lib.rs lost its #![no_std]");
    let mut files = Vec::new();
    collect(folder, &mut files)?;
    for path in &files {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let before_tests = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        for (number, line) in before_tests.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("std::") && !code.contains("core::") && !code.contains("no_std") {
                bail!(
                    "{}:{} uses std outside its tests: {}",
                    path.display(),
                    number + 1,
                    line.trim()
                );
            }
        }
    }
    Ok(files.len())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            collect(&path, files)?;
        } else if name.ends_with(".rs") && name != "tests.rs" {
            files.push(path);
        }
    }
    Ok(())
}
