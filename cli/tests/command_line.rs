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

#[test]
fn a_folder_without_a_model_is_named_and_not_taken_for_a_name() {
    let folder = tempfile::tempdir().unwrap();
    let output = polder(&["model", "verify", folder.path().to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains("cannot verify") && error.contains("config.json"),
        "{error}"
    );
}
