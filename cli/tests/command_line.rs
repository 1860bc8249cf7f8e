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

/// As the guide for organisers types it.
#[test]
fn files_are_written_where_the_command_is_typed() {
    let folder = tempfile::tempdir().unwrap();
    let here = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_polder"))
            .args(["--home", "home"])
            .args(arguments)
            .current_dir(folder.path())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), error)
    };
    let (code, error) = here(&[
        "charter",
        "new",
        "Delta",
        "--institution",
        "Leiden",
        "--to",
        "first.charter",
    ]);
    assert_eq!(code, Some(0), "{error}");
    let (code, error) = here(&["charter", "sign", "first.charter"]);
    assert_eq!(code, Some(0), "{error}");
    let gateway = ["--address", "/ip4/192.0.2.1/tcp/4001"];
    let (code, error) = here(&[&["invite", "--to", "line"][..], &gateway].concat());
    assert_eq!(code, Some(0), "{error}");
    assert!(folder.path().join("line").is_file());
    let (code, error) = here(&["invite", "--address", "gateway.example.org"]);
    assert!(code == Some(2) && error.contains("/dns4/"), "{error}");
    // A certificate that goes nowhere would be none.
    let (code, error) = here(&["institution", "certify", &"ab".repeat(32)]);
    assert!(code == Some(1) && error.contains("--to FILE"), "{error}");
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

#[test]
fn a_tokenizer_is_learnt_from_texts_and_never_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = "the pumps turn while the wind blows, and the polder stays dry\n".repeat(40);
    std::fs::write(folder.path().join("text.txt"), &text).unwrap();
    let (text, out) = (place("text.txt"), place("tokenizer.json"));
    let learn = || {
        polder(&[
            "--json",
            "model",
            "tokenizer",
            "train",
            &text,
            "--vocabulary",
            "320",
            "--out",
            &out,
        ])
    };
    let output = learn();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answer["vocabulary"].as_u64().unwrap() <= 320);
    assert!(answer["tokens"].as_u64().unwrap() * 2 < answer["bytes"].as_u64().unwrap());
    let again = learn();
    assert!(String::from_utf8_lossy(&again.stderr).contains("already there"));
    let small = polder(&[
        "model",
        "tokenizer",
        "train",
        &text,
        "--vocabulary",
        "9",
        "--out",
        &place("other.json"),
    ]);
    assert!(String::from_utf8_lossy(&small.stderr).contains("too small"));
}
