//! Which target a fuzz program runs: its name says it. All packages' fuzz programs share this file.

/// A target.
pub(crate) type Target = fn(&[u8]);

/// The target that this program is named after.
pub(crate) fn named_target(all: &[(&str, Target)]) -> Target {
    let program = std::env::args().next().unwrap_or_default();
    let name = program.rsplit(['/', '\\']).next().unwrap_or_default();
    let known = all.iter().find(|(known, _)| *known == name);
    known.expect("the program is named after a target").1
}
