//! A small hub on loopback, with TLS or without, that misbehaves as real ones do.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use aws_lc_rs::digest;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const TOKEN: &str = "hf_secretSecretSECRET";
const PULL_TIME_MAX: Duration = Duration::from_secs(120);

/// How a hub misbehaves.
#[derive(Default)]
pub(crate) struct Faults {
    /// The next downloads of `model.safetensors` end after so many bytes.
    pub(crate) break_after: Vec<usize>,
    pub(crate) no_ranges: bool,
    /// Comes with one byte changed.
    pub(crate) spoilt: Option<&'static str>,
    /// Only for whoever has the token.
    pub(crate) gated: bool,
    /// Where downloads of large files are sent.
    pub(crate) large_files_at: Option<String>,
    /// The repository's former name.
    pub(crate) renamed_from: Option<&'static str>,
    /// So many answers are 503.
    pub(crate) busy: usize,
}

pub(crate) struct Hub {
    pub(crate) address: String,
    state: Arc<State>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    faults: Mutex<Faults>,
    asked: Mutex<Vec<String>>,
}

impl Hub {
    pub(crate) fn start(files: BTreeMap<String, Vec<u8>>, settle: impl FnOnce(&mut Faults)) -> Self {
        Self::with(files, settle, None)
    }

    /// Speaks HTTPS as `localhost`, with a certificate that its own root signed. The root, in PEM, comes with it.
    pub(crate) fn start_tls(files: BTreeMap<String, Vec<u8>>, settle: impl FnOnce(&mut Faults)) -> (Self, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut root = rcgen::CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = root.self_signed(&key).unwrap();
        let own_key = rcgen::KeyPair::generate().unwrap();
        let own = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let own = own.signed_by(&own_key, &root, &key).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let settings = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![own.der().clone()],
                PrivatePkcs8KeyDer::from(own_key.serialize_der()).into(),
            )
            .unwrap();
        (Self::with(files, settle, Some(Arc::new(settings))), root.pem())
    }

    fn with(
        files: BTreeMap<String, Vec<u8>>,
        settle: impl FnOnce(&mut Faults),
        tls: Option<Arc<ServerConfig>>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let address = match &tls {
            None => format!("http://{address}"),
            Some(_) => format!("https://localhost:{}", address.port()),
        };
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
                let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
                // A client may go away.
                let _ = match &tls {
                    None => shared.answer(stream),
                    Some(settings) => {
                        let connection = ServerConnection::new(Arc::clone(settings)).unwrap();
                        shared.answer(StreamOwned::new(connection, stream))
                    }
                };
            }
        });
        Self { address, state }
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        self.state.asked.lock().unwrap().clone()
    }

    pub(crate) fn run(&self, home: &Path, place: &str) -> Output {
        self.run_with(home, place, &[])
    }

    pub(crate) fn run_with(&self, home: &Path, place: &str, environment: &[(&str, &str)]) -> Output {
        let environment = [&[("HF_ENDPOINT", self.address.as_str())], environment].concat();
        run(home, &["model", "pull", place], &environment)
    }

    pub(crate) fn pull(&self, home: &Path, place: &str) -> Value {
        answer(&self.run(home, place))
    }
}

impl State {
    /// Answers one request. The connection is then cut, without a word of farewell.
    fn answer(&self, mut stream: impl Read + Write) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = text(&head);
        let mut lines = head.lines().filter(|line| !line.is_empty());
        let first = lines.next().unwrap_or_default().to_owned();
        let headers: String = lines.map(|line| format!(" {line}")).collect();
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
        if faults.busy > 0 {
            faults.busy -= 1;
            return say("503 Service Unavailable", "retry-after: 0\r\n", b"");
        }
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

pub(crate) fn sharded_model() -> BTreeMap<String, Vec<u8>> {
    model("llama_tied_sharded")
}

pub(crate) fn single_model() -> BTreeMap<String, Vec<u8>> {
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

pub(crate) fn answer(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the binary to its end, which must come in time.
pub(crate) fn run(home: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polder"));
    command.arg("--home").arg(home).arg("--json").args(arguments);
    for name in [
        "HF_TOKEN",
        "HF_ENDPOINT",
        "SSL_CERT_FILE",
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
