//! What a peer's bytes are put through. A target must neither panic nor take memory that its input does not justify,
//! whatever the bytes; where a decoder has an encoder, what was read must be written and read alike.

mod identity;
pub(crate) mod serving;
mod stored;
pub(crate) mod training;
mod wire;

/// A target.
type Target = fn(&[u8]);

/// Every target: its name, which is that of its folder in `corpus`, and what it does.
pub(crate) const ALL: [(&str, Target); 21] = [
    ("aggregate_state", stored::aggregate_state),
    ("blob_manifest", stored::blob_manifest),
    ("capabilities", identity::capabilities),
    ("charters", identity::charters),
    ("chunk_set", stored::chunk_set),
    ("control_messages", wire::control_messages),
    ("credentials", identity::credentials),
    ("directory", serving::directory),
    ("epoch", stored::epoch),
    ("frame_header", wire::frame_header),
    ("generation", serving::generation),
    ("invite", identity::invite),
    ("log", training::log),
    ("node", training::node),
    ("policy_window", identity::policy_window),
    ("round_messages", training::round_messages),
    ("run_spec", training::run_spec),
    ("seat", serving::seat),
    ("session_messages", serving::session_messages),
    ("update", training::update),
    ("worker_frames", wire::worker_frames),
];

/// A number for which the input stands, and the rest of the input.
pub(crate) fn byte(bytes: &[u8]) -> (u8, &[u8]) {
    bytes.split_first().map_or((0, bytes), |(first, rest)| (*first, rest))
}

/// Takes a value from the front, as often as the input gives one.
pub(crate) fn each<T: serde::de::DeserializeOwned>(mut bytes: &[u8], mut take: impl FnMut(T)) {
    while let Ok((value, rest)) = postcard::take_from_bytes(bytes) {
        if rest.len() == bytes.len() {
            return;
        }
        bytes = rest;
        take(value);
    }
}
