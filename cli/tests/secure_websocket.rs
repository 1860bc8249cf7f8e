//! A gateway behind a TLS terminator: all that a campus lets out is HTTPS, so that is what its nodes seem to speak.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use futures::future::Either;
use futures::{AsyncReadExt, io};
use futures_rustls::TlsAcceptor;
use libp2p::tcp::tokio::TcpStream;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use support::Node;

#[test]
fn a_node_joins_over_tls_under_a_root_of_its_campus() {
    let root = tempfile::tempdir().unwrap();
    let inside = support::free_port();
    let terminator = Terminator::start(inside);
    for (kind, host) in [("name", "/dns4/localhost"), ("address", "/ip4/127.0.0.1")] {
        let outside = format!("{host}/tcp/{}/wss", terminator.port);
        let behind = format!("listen_also = [\"/ip4/127.0.0.1/tcp/{inside}/ws\"]\nexternal = [\"{outside}\"]\n");
        let mut gateway = Node::prepare(root.path(), &format!("gateway-{kind}"), &behind);
        gateway.verb(&["charter", "new", "Test", "--institution", "Leiden"]);
        gateway.start(&[]);
        let told = gateway.verb(&["invite", "--institution", "Leiden", "--address", &outside]);
        let invite = told["invite"].as_str().unwrap();

        // Browsers do not know the campus's root, so neither does a node that nobody has told of it.
        let stranger = Node::prepare(root.path(), &format!("stranger-{kind}"), "");
        let found = finding(&stranger, &["--invite", invite], "WebSocket");
        println!("{found}");
        assert_eq!(found["health"], "bad", "{found}");
        assert!(found["words"].as_str().unwrap().contains("certificate"), "{found}");

        let trust = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/tls/root.pem");
        let mut node = Node::prepare(
            root.path(),
            &format!("node-{kind}"),
            &format!("tls_roots = {trust:?}\n"),
        );
        let found = finding(&node, &["--invite", invite], "WebSocket");
        println!("{found}");
        assert_eq!(found["health"], "good", "{found}");
        let before = terminator.connections();
        node.start(&[invite]);
        let peers = node.verb(&["peers"]);
        assert!(
            terminator.connections() > before,
            "it has not come through the terminator"
        );
        println!("{peers}");
    }
}

fn finding(node: &Node, arguments: &[&str], what: &str) -> serde_json::Value {
    let answer = node.doctor(arguments);
    let findings = answer["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["what"] == what);
    found.cloned().unwrap_or_else(|| panic!("nothing of {what}: {answer}"))
}

/// What a web server does before a gateway: takes TLS off and passes the rest on. It ends with this process.
struct Terminator {
    port: u16,
    connections: Arc<AtomicUsize>,
}

impl Terminator {
    fn start(inside: u16) -> Self {
        let certificate = CertificateDer::from_pem_slice(include_bytes!("support/tls/certificate.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("support/tls/key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let settings = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(settings));
        let connections = Arc::new(AtomicUsize::new(0));
        let (bound, port) = mpsc::channel();
        let counter = Arc::clone(&connections);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                bound.send(listener.local_addr().unwrap().port()).unwrap();
                while let Ok((stream, _)) = listener.accept().await {
                    let (acceptor, counter) = (acceptor.clone(), Arc::clone(&counter));
                    tokio::spawn(async move {
                        // Whoever does not trust the certificate ends the handshake.
                        let Ok(outside) = acceptor.accept(TcpStream(stream)).await else {
                            return;
                        };
                        let Ok(within) = tokio::net::TcpStream::connect(("127.0.0.1", inside)).await else {
                            return;
                        };
                        counter.fetch_add(1, Ordering::Relaxed);
                        let (from_outside, mut to_outside) = outside.split();
                        let (from_within, mut to_within) = TcpStream(within).split();
                        let inwards = io::copy(from_outside, &mut to_within);
                        let outwards = io::copy(from_within, &mut to_outside);
                        futures::pin_mut!(inwards, outwards);
                        // When one side ends, both do.
                        match futures::future::select(inwards, outwards).await {
                            Either::Left(_) | Either::Right(_) => {}
                        }
                    });
                }
            });
        });
        Self {
            port: port.recv().unwrap(),
            connections,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}
