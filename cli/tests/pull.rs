//! `polder model pull` against a small hub on loopback that misbehaves as real ones do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use aws_lc_rs::digest;
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secretSecretSECRET";
const PULL_TIME_MAX: Duration = Duration::from_secs(120);

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

/// How a hub misbehaves.
#[derive(Default)]
struct Faults {
    /// The next downloads of `model.safetensors` end after so many bytes.
    break_after: Vec<usize>,
    no_ranges: bool,
    /// Comes with one byte changed.
    spoilt: Option<&'static str>,
    /// Only for whoever has the token.
    gated: bool,
    /// Where downloads of large files are sent.
    large_files_at: Option<String>,
    /// The repository's former name.
    renamed_from: Option<&'static str>,
}

struct Hub {
    address: String,
    state: Arc<State>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    faults: Mutex<Faults>,
    asked: Mutex<Vec<String>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>, settle: impl FnOnce(&mut Faults)) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let mut faults = Faults::default();
        settle(&mut faults);
        let state = Arc::new(State {
            files,
            faults: Mutex::new(faults),
            asked: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = shared.answer(stream); // A client may go away.
            }
        });
        Self { address, state }
    }

    fn asked(&self) -> Vec<String> {
        self.state.asked.lock().unwrap().clone()
    }

    fn run(&self, home: &Path, place: &str) -> Output {
        self.run_with(home, place, &[])
    }

    fn run_with(&self, home: &Path, place: &str, environment: &[(&str, &str)]) -> Output {
        let environment = [&[("HF_ENDPOINT", self.address.as_str())], environment].concat();
        run(home, &["model", "pull", place], &environment)
    }

    fn pull(&self, home: &Path, place: &str) -> Value {
        answer(&self.run(home, place))
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        let mut headers = String::new();
        for line in lines {
            match line? {
                line if line.is_empty() => break,
                line => headers += &format!(" {line}"),
            }
        }
        let headers = lower_names(&headers);
        self.asked.lock().unwrap().push(format!("{first}{headers}"));
        let mut words = first.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let faults = &mut *self.faults.lock().unwrap();
        let mut say = |status: &str, more: &str, body: &[u8]| {
            write!(stream, "HTTP/1.1 {status}\r\nconnection: close\r\n{more}")?;
            if !more.contains("content-length") {
                write!(stream, "content-length: {}\r\n", body.len())?;
            }
            stream.write_all(b"\r\n")?;
            if method == "GET" {
                stream.write_all(body)?;
            }
            stream.flush()
        };
        if faults.gated && !headers.contains(&format!("Bearer {TOKEN}")) {
            return say("401 Unauthorized", "", b"");
        }
        if let Some(old) = faults.renamed_from
            && path.contains(&format!("org/{old}/"))
        {
            let new = path.replacen(&format!("org/{old}/"), "org/tiny/", 1);
            return say("307 Temporary Redirect", &format!("location: {new}\r\n"), b"");
        }
        if path.starts_with("/api/models/org/tiny/revision/") {
            let siblings: Vec<Value> = self.files.keys().map(|file| json!({"rfilename": file})).collect();
            return say(
                "200 OK",
                "",
                json!({"sha": COMMIT, "siblings": siblings}).to_string().as_bytes(),
            );
        }
        let file = path
            .strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/"))
            .unwrap_or_default();
        let Some(content) = self.files.get(file) else {
            return say("404 Not Found", "", b"Repository not found");
        };
        let tag = etag(file, content);
        let large = file.ends_with(".safetensors");
        if let (true, Some(elsewhere)) = (large, &faults.large_files_at) {
            let length = content.len();
            let more = format!("location: {elsewhere}{path}\r\nx-linked-etag: {tag}\r\nx-linked-size: {length}\r\n");
            return say("302 Found", &more, b"");
        }
        let mut content = content.clone();
        if faults.spoilt == Some(file) {
            content[7] ^= 1;
        }
        let range = headers
            .split(" range: bytes=")
            .nth(1)
            .and_then(|rest| rest.split('-').next()?.parse().ok());
        let start: usize = range.filter(|_| !faults.no_ranges).unwrap_or(0);
        let whole = content.len();
        let body = &content[start..];
        let mut more = format!("etag: {tag}\r\ncontent-length: {}\r\n", body.len());
        let mut status = "200 OK";
        if start > 0 {
            status = "206 Partial Content";
            more += &format!("content-range: bytes {start}-{}/{whole}\r\n", whole - 1);
        }
        match large && method == "GET" && !faults.break_after.is_empty() {
            true => say(status, &more, &body[..faults.break_after.remove(0)]),
            false => say(status, &more, body),
        }
    }
}

/// Names of headers are in any case; what they hold stays as it is.
fn lower_names(headers: &str) -> String {
    let words = headers.split(' ').map(|word| match word.strip_suffix(':') {
        Some(name) => format!("{}:", name.to_ascii_lowercase()),
        None => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// As the hub's: SHA-256 of large files, git's hash of small ones.
fn etag(file: &str, content: &[u8]) -> String {
    let hash = match file.ends_with(".safetensors") || file.ends_with(".gguf") {
        true => digest::digest(&digest::SHA256, content),
        false => {
            let blob = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
            digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob)
        }
    };
    let digits: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("\"{digits}\"")
}

fn sharded_model() -> BTreeMap<String, Vec<u8>> {
    model("llama_tied_sharded")
}

fn single_model() -> BTreeMap<String, Vec<u8>> {
    model("llama_rope_llama3")
}

fn model(case: &str) -> BTreeMap<String, Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../kernels/tests/golden")
        .join(case);
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] },
    });
    let mut files = BTreeMap::from([
        ("tokenizer.json".to_owned(), tokenizer.to_string().into_bytes()),
        ("README.md".to_owned(), b"# Tiny".to_vec()),
        ("pytorch_model.bin".to_owned(), vec![0; 99]),
    ]);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "config.json" || name.starts_with("model") {
            files.insert(name, fs::read(path).unwrap());
        }
    }
    files
}

fn answer(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the binary to its end, which must come in time.
fn run(home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.arg("--home").arg(home).arg("--json").args(arguments);
    for name in [
        "HF_TOKEN",
        "HF_ENDPOINT",
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    command.envs(environment.iter().copied());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let process = child.id();
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    match end.recv_timeout(PULL_TIME_MAX) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            let _ = Command::new("kill").args(["-KILL", &process.to_string()]).status();
            panic!("polder {arguments:?} does not end")
        }
    }
}
