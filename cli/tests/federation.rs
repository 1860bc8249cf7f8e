//! Founding a federation, letting members in and shutting them out, with the real binary.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

#[test]
fn an_organiser_founds_a_federation_and_invites_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("a");
    let shown = json(&home, &["charter", "new", "My federation", "--institution", "TU Delft"]);
    assert_eq!(shown["in_force_here"], true);
    assert_eq!(shown["node_certified"], true);
    assert_eq!(json(&home, &["charter", "show"])["institutions"][0]["name"], "TU Delft");

    let invite = text(&home, &["invite", "--address", "/ip4/127.0.0.1/tcp/4001"]);
    assert_eq!(invite.lines().count(), 1);
    assert!(invite.starts_with("polder1"), "{invite}");
    let other = text(&home, &["invite", "--address", "/ip4/127.0.0.1/tcp/4001"]);
    assert_ne!(invite, other, "every invite has its own token");
}

#[test]
fn a_second_institution_comes_in_with_the_next_charter() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a"), folder.path().join("b"));
    let file = folder.path().join("next.charter");
    let file = file.to_str().unwrap();
    json(&first, &["charter", "new", "Two", "--institution", "Leiden"]);
    let made = json(&second, &["institution", "new", "Uppsala"]);
    let entry = format!("{}=Uppsala", made["key"].as_str().unwrap());
    let next = json(&first, &["charter", "new", "--add-institution", &entry, "--to", file]);
    assert_eq!(
        (&next["number"], &next["complete"]),
        (&Value::from(2), &Value::from(true))
    );
    let taken = json(&second, &["charter", "sign", file]);
    assert_eq!(taken["node_certified"], true);
    assert_eq!(taken["federation"], next["federation"]);
}

#[test]
fn two_founders_must_both_sign() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a"), folder.path().join("b"));
    let file = folder.path().join("first.charter");
    let file = file.to_str().unwrap();
    let made = json(&second, &["institution", "new", "Uppsala"]);
    let entry = format!("{}=Uppsala", made["key"].as_str().unwrap());
    let new = [
        "charter",
        "new",
        "Two",
        "--institution",
        "Leiden",
        "--add-institution",
        &entry,
        "--add-founder",
        "Uppsala",
    ];
    let alone = json(&first, &[&new[..], &["--to", file]].concat());
    assert_eq!(
        (&alone["threshold"], &alone["complete"]),
        (&Value::from(2), &Value::from(false))
    );
    assert_eq!(json(&second, &["charter", "sign", file])["in_force_here"], true);
    assert_eq!(json(&first, &["charter", "sign", file])["node_certified"], true);
}

#[test]
fn a_node_is_certified_by_hand_and_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let (gateway, node) = (folder.path().join("a"), folder.path().join("b"));
    let file = folder.path().join("node.certificate");
    let file = file.to_str().unwrap();
    json(&gateway, &["charter", "new", "One", "--institution", "Leiden"]);
    let id = json(&node, &["institution", "list"])["node"]
        .as_str()
        .unwrap()
        .to_string();
    json(
        &gateway,
        &[
            "institution",
            "certify",
            &id,
            "--capabilities",
            "serve,query",
            "--to",
            file,
        ],
    );
    let taken = json(&node, &["institution", "accept", file]);
    assert_eq!(taken["capabilities"], "serve,query");
    assert_eq!(json(&gateway, &["institution", "revoke", &id])["epoch"], 1);
    assert_eq!(json(&gateway, &["institution", "revoke", &id])["epoch"], 2);
    let again = run(&gateway, &["institution", "certify", &id, "--to", file]);
    assert_eq!(again.status.code(), Some(1));
    let error = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(error.contains("is revoked") && error.contains("hint:"), "{error}");

    let thief = folder.path().join("c");
    let refused = run(&thief, &["institution", "accept", file]);
    assert_eq!(refused.status.code(), Some(1));
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        error.contains("certificate that is for") && error.contains("hint:"),
        "{error}"
    );
}

#[test]
fn a_charter_that_cannot_be_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("a");
    let refused = run(
        &home,
        &["charter", "new", "One", "--institution", "Leiden", "--threshold", "2"],
    );
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(
        json(&home, &["institution", "list"])["institutions"],
        Value::Array(vec![])
    );
}

#[test]
fn what_cannot_be_done_is_said_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["charter", "show"][..],
        &["invite"],
        &["charter", "new", "Nobody's"],
        &["charter", "new"],
    ] {
        let refused = run(&folder.path().join("a"), arguments);
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}");
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            error.starts_with("error: ") && error.contains("  hint: "),
            "{arguments:?}: {error}"
        );
        assert!(refused.stdout.is_empty());
    }
}

fn run(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_polder"))
        .arg("--home")
        .arg(home)
        .args(arguments)
        .output()
        .unwrap()
}

fn text(home: &Path, arguments: &[&str]) -> String {
    let output = run(home, arguments);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(home: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&text(home, &[&["--json"], arguments].concat())).unwrap()
}
