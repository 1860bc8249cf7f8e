//! The real binary, driven as a person would.

use std::process::{Command, Output};

fn polder(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polder"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn misuse_exits_with_2_and_help_with_0() {
    assert_eq!(polder(&["no-such-verb"]).status.code(), Some(2));
    assert_eq!(polder(&["--help"]).status.code(), Some(0));
}

#[test]
fn a_completion_script_names_the_binary() {
    let output = polder(&["completions", "bash"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("polder"));
}
