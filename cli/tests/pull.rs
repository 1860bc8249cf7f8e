//! `polder model pull` against a small hub on loopback that misbehaves as real ones do.

mod hub;

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;

use hub::{COMMIT, Hub, TOKEN, answer, run, sharded_model, single_model, text};
use serde_json::json;

#[test]
fn a_model_in_shards_comes_whole_and_without_what_it_does_not_need() {
    let hub = Hub::start(sharded_model(), |_| {});
    let home = tempfile::tempdir().unwrap();
    let pulled = hub.pull(home.path(), "hf:org/tiny");
    assert_eq!(
        (pulled["name"].as_str(), pulled["parts"].as_u64()),
        (Some("tiny"), Some(5))
    );
    assert!(!home.path().join("pulls").exists());
    let asked = hub.asked();
    assert!(
        asked
            .iter()
            .any(|line| line.contains("model-00002-of-00002.safetensors"))
    );
    assert!(
        !asked
            .iter()
            .any(|line| line.contains("README") || line.contains("pytorch"))
    );

    // The same model from its folder is the same epoch.
    let folder = home.path().join("tiny");
    fs::create_dir(&folder).unwrap();
    for (name, bytes) in sharded_model() {
        fs::write(folder.join(name), bytes).unwrap();
    }
    let imported = run(home.path(), &["model", "import", folder.to_str().unwrap()], &[]);
    assert_eq!(answer(&imported)["id"], pulled["id"]);
}

#[test]
fn a_broken_connection_is_resumed_where_it_broke() {
    let hub = Hub::start(single_model(), |faults| faults.break_after = vec![60_000, 60_000]);
    let home = tempfile::tempdir().unwrap();
    let pulled = hub.pull(home.path(), "hf:org/tiny@v1");
    assert_eq!(pulled["parts"], 5);
    let asked = hub.asked();
    assert!(
        asked.iter().any(|line| line.contains("range: bytes=60000-")),
        "{asked:?}"
    );
    assert!(
        asked.iter().any(|line| line.contains("range: bytes=120000-")),
        "{asked:?}"
    );
    assert!(asked.iter().any(|line| line.contains("/revision/v1")));
}

#[test]
fn a_command_that_ended_halfway_goes_on_when_it_is_run_again() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(single_model(), |faults| faults.break_after = vec![50_000, 0, 0, 0, 0]);
    let failed = hub.run(home.path(), "hf:org/tiny");
    assert_eq!(failed.status.code(), Some(1));
    let error = text(&failed.stderr);
    assert!(
        error.contains("broke off at 50000 of") && error.contains("run the same command again"),
        "{error}"
    );
    let part = home
        .path()
        .join(format!("pulls/org/tiny/{COMMIT}/tiny/model.safetensors.part"));
    assert_eq!(fs::metadata(&part).unwrap().len(), 50_000);
    let asked_before = hub.asked().len();
    hub.pull(home.path(), "hf:org/tiny");
    let asked = hub.asked().split_off(asked_before);
    let bodies: Vec<_> = asked
        .iter()
        .filter(|line| line.starts_with("GET") && line.contains("/resolve/"))
        .collect();
    assert_eq!(bodies.len(), 1, "only the rest of one file is left: {bodies:?}");
    assert!(bodies[0].contains("range: bytes=50000-"));
}

#[test]
fn a_server_without_ranges_is_asked_from_the_beginning() {
    let hub = Hub::start(single_model(), |faults| {
        faults.break_after = vec![60_000];
        faults.no_ranges = true;
    });
    let home = tempfile::tempdir().unwrap();
    assert_eq!(hub.pull(home.path(), "hf:org/tiny")["parts"], 5);
}

#[test]
fn content_of_another_hash_is_removed_and_not_imported() {
    for spoilt in ["model.safetensors", "config.json"] {
        let hub = Hub::start(single_model(), |faults| faults.spoilt = Some(spoilt));
        let home = tempfile::tempdir().unwrap();
        let failed = hub.run(home.path(), "hf:org/tiny");
        assert_eq!(failed.status.code(), Some(1));
        let error = text(&failed.stderr);
        assert!(error.contains(spoilt) && error.contains("another hash"), "{error}");
        let folder = home.path().join(format!("pulls/org/tiny/{COMMIT}/tiny"));
        assert!(!folder.join(spoilt).exists() && !folder.join(format!("{spoilt}.part")).exists());
        assert_eq!(answer(&run(home.path(), &["model", "list"], &[]))["models"], json!([]));
    }
}

#[test]
fn a_token_opens_a_gated_model_and_is_shown_to_nobody_else() {
    let elsewhere = Hub::start(single_model(), |_| {});
    let other = elsewhere.address.clone();
    let hub = Hub::start(single_model(), move |faults| {
        faults.gated = true;
        faults.large_files_at = Some(other);
    });
    let home = tempfile::tempdir().unwrap();
    let refused = hub.run(home.path(), "hf:org/tiny");
    let error = text(&refused.stderr);
    assert!(
        error.contains("401") && error.contains("hint:") && error.contains("HF_TOKEN"),
        "{error}"
    );
    let wrong = hub.run_with(home.path(), "hf:org/tiny", &[("HF_TOKEN", "hf_wrongWrongWRONG")]);
    assert!(!text(&wrong.stderr).contains("hf_wrong"));
    assert_eq!(wrong.status.code(), Some(1));

    let all_logs = [("HF_TOKEN", TOKEN), ("POLDER_LOG", "trace")];
    let pulled = hub.run_with(home.path(), "hf:org/tiny", &all_logs);
    assert!(pulled.status.success(), "{}", text(&pulled.stderr));
    assert!(!text(&pulled.stderr).contains(TOKEN) && !text(&pulled.stdout).contains(TOKEN));
    assert!(hub.asked().iter().any(|line| line.contains(TOKEN)));
    let asked_elsewhere = elsewhere.asked();
    assert!(
        asked_elsewhere.iter().any(|line| line.contains("model.safetensors")),
        "{asked_elsewhere:?}"
    );
    assert!(!asked_elsewhere.iter().any(|line| line.contains(TOKEN)));
}

#[test]
fn a_renamed_repository_is_followed() {
    let hub = Hub::start(single_model(), |faults| faults.renamed_from = Some("old"));
    let home = tempfile::tempdir().unwrap();
    assert_eq!(hub.pull(home.path(), "hf:org/old")["parts"], 5);
}

#[test]
fn what_is_not_there_is_said_with_what_to_try() {
    let hub = Hub::start(single_model(), |_| {});
    let home = tempfile::tempdir().unwrap();
    let refused = |hub: &Hub, place: &str, words: &[&str]| {
        let output = hub.run(home.path(), place);
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        for word in words {
            assert!(error.contains(word), "`{word}` is missing from: {error}");
        }
    };
    refused(&hub, "hf:org/absent", &["404", "hint:", "spelling"]);
    refused(
        &hub,
        "hf:org/tiny/absent.gguf",
        &["absent.gguf", "not in the repository"],
    );
    refused(&hub, "hf:tiny", &["organisation", "hint:"]);
    let only_gguf = Hub::start(BTreeMap::from([("tiny-q8_0.gguf".to_owned(), vec![0; 64])]), |_| {});
    refused(&only_gguf, "hf:org/tiny", &["no config.json", "tiny-q8_0.gguf"]);
    // Fetched, whole, and no model.
    refused(&only_gguf, "hf:org/tiny/tiny-q8_0.gguf", &["GGUF"]);
    drop(hub);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{nobody}");
    let output = run(
        home.path(),
        &["model", "pull", "hf:org/tiny"],
        &[("HF_ENDPOINT", &endpoint)],
    );
    assert!(
        text(&output.stderr).contains("does not answer"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_hub_that_is_busy_is_asked_again() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::start(single_model(), |faults| faults.busy = 3);
    assert_eq!(hub.pull(home.path(), "hf:org/tiny")["parts"], 5);
    let hub = Hub::start(single_model(), |faults| faults.busy = usize::MAX);
    let failed = hub.run(home.path(), "hf:org/other");
    let error = text(&failed.stderr);
    assert!(error.contains("503") && error.contains("try again later"), "{error}");
    assert_eq!(hub.asked().len(), 5);
}

#[test]
fn over_tls_a_download_is_resumed_and_checked() {
    let home = tempfile::tempdir().unwrap();
    let (hub, root) = Hub::start_tls(single_model(), |faults| faults.break_after = vec![60_000, 60_000]);
    let roots = home.path().join("roots.pem");
    // As an institution's file of several roots has it: some are not understood.
    fs::write(&roots, format!("# proxy\n{BROKEN}{root}")).unwrap();
    let trusted = [("SSL_CERT_FILE", roots.to_str().unwrap())];
    let pulled = answer(&hub.run_with(home.path(), "hf:org/tiny", &trusted));
    assert_eq!(pulled["parts"], 5);
    // A connection that was cut is not the end of a file.
    assert!(hub.asked().iter().any(|line| line.contains("range: bytes=60000-")));

    let (hub, root) = Hub::start_tls(single_model(), |faults| faults.spoilt = Some("model.safetensors"));
    fs::write(&roots, root).unwrap();
    let other = tempfile::tempdir().unwrap();
    let failed = hub.run_with(other.path(), "hf:org/tiny", &trusted);
    assert!(
        text(&failed.stderr).contains("another hash"),
        "{}",
        text(&failed.stderr)
    );
}

#[test]
fn over_tls_only_trusted_hubs_get_the_token() {
    let home = tempfile::tempdir().unwrap();
    let (hub, root) = Hub::start_tls(single_model(), |faults| faults.gated = true);
    // Browsers do not know this root.
    let refused = hub.run_with(home.path(), "hf:org/tiny", &[("HF_TOKEN", TOKEN)]);
    let error = text(&refused.stderr);
    assert!(
        error.contains("certificate") && error.contains("SSL_CERT_FILE"),
        "{error}"
    );
    assert_eq!(hub.asked(), Vec::<String>::new());

    // Nor does another hub's root vouch for this one.
    let (_other, other_root) = Hub::start_tls(single_model(), |_| {});
    let roots = home.path().join("roots.pem");
    let trusted = [("SSL_CERT_FILE", roots.to_str().unwrap()), ("HF_TOKEN", TOKEN)];
    fs::write(&roots, other_root).unwrap();
    assert!(!hub.run_with(home.path(), "hf:org/tiny", &trusted).status.success());
    assert_eq!(hub.asked(), Vec::<String>::new());

    fs::write(&roots, root).unwrap();
    let without = hub.run_with(home.path(), "hf:org/tiny", &trusted[..1]);
    assert!(text(&without.stderr).contains("401"), "{}", text(&without.stderr));
    assert_eq!(answer(&hub.run_with(home.path(), "hf:org/tiny", &trusted))["parts"], 5);
    assert!(text(&hub.run_with(home.path(), "hf:org/absent", &trusted).stderr).contains("404"));

    for (content, words) in [
        (Some("no certificate"), "no root certificate"),
        (None, "cannot be read"),
    ] {
        let _ = fs::remove_file(&roots);
        if let Some(content) = content {
            fs::write(&roots, content).unwrap();
        }
        let error = text(&hub.run_with(home.path(), "hf:org/tiny", &trusted).stderr);
        assert!(error.contains("SSL_CERT_FILE") && error.contains(words), "{error}");
    }
}

/// Base64 of nothing that is a certificate.
const BROKEN: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
