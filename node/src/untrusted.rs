//! What the bytes of peers and of damaged files are put through, for fuzz targets (`node/fuzz`) and the test that replays
//! their corpora. A reader must neither panic nor take memory that its input does not justify; where there is a writer,
//! what was read must be written and read alike. Nothing here is for other programs.

use crate::api::calls;
use crate::control::untrusted as control;
use crate::data::untrusted as data;
use crate::home::KnownPeer;
use crate::mapping::untrusted as mapping;
use crate::{daemon, enrol, train};

/// A reader.
pub type Reader = fn(&[u8]);

/// Every reader: its name, which is that of its folder in the corpus, and what it does.
pub const READERS: [(&str, Reader); 13] = [
    ("addresses", control::addresses),
    ("blob_headers", data::blob_headers),
    ("config", daemon::untrusted::config),
    ("control_stream", control::control_stream),
    ("enrolment", enrol::untrusted),
    ("greeting", data::greeting),
    ("journal", train::untrusted_journal),
    ("known_peers", known_peers),
    ("news", daemon::untrusted::news),
    ("packets", data::packets),
    ("proxy_answer", control::proxy_answer),
    ("router_answers", mapping::router_answers),
    ("tool_calls", calls::untrusted),
];

/// The peers of the invite, those of the index, this node's own addresses, and what its local interface says.
fn known_peers(bytes: &[u8]) {
    if let Ok(peers) = serde_json::from_slice::<Vec<KnownPeer>>(bytes) {
        let again = serde_json::to_vec(&peers).expect("text and addresses");
        assert_eq!(
            serde_json::from_slice::<Vec<KnownPeer>>(&again).ok(),
            Some(peers.clone())
        );
        assert!(peers.iter().filter_map(KnownPeer::id).count() <= peers.len());
    }
    daemon::untrusted::kept(bytes);
}

/// What honest peers send and sound files hold: where fuzzing begins.
pub fn honest() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let peers = r#"[{"node":"0707","control":["/ip4/192.0.2.1/tcp/4001"],"data":["192.0.2.1:4002"]}]"#;
    let met = r#"{"peer":{"node":"0707","control":[],"data":["[2001:db8::1]:4002"]},"at":1800000000}"#;
    let config = "listen = \"127.0.0.1\"\ncontrol_port = 4001\nproxy = \"http://proxy.example.org:3128\"\n\
                  upload_bytes_per_second = 1000000\ncap_clock = \"utc\"\n[contribute]\nwindows = [\"19:00-07:30\"]\n\
                  [[cap_windows]]\nwhen = \"mon-fri 08:00-18:00\"\nrelay_bytes_per_second = 2000000\n";
    vec![
        ("addresses", control::honest_addresses()),
        ("blob_headers", data::honest_blob_headers()),
        ("config", vec![config.into()]),
        ("control_stream", control::honest_control_streams()),
        ("enrolment", enrol::honest()),
        ("greeting", data::honest_greetings()),
        ("journal", vec![train::honest_journal()]),
        ("known_peers", vec![peers.into(), met.into()]),
        ("news", vec![daemon::untrusted::honest_news()]),
        ("packets", data::honest_packets()),
        ("proxy_answer", control::honest_proxy_answers()),
        ("router_answers", mapping::honest_router_answers()),
        ("tool_calls", calls::honest()),
    ]
}
