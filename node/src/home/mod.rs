//! The node's folder: what must not be lost, as plain files.
//!
//! ```text
//! HOME/
//!   config.toml                settings, written by people
//!   lock                       held by the daemon that uses this home
//!   membership.lock            held for a moment by whoever changes charters or revocations
//!   api.json                   where the running daemon answers; for its owner alone
//!   node.key                   the node's secret seed; for its owner alone
//!   charter                    the chain of charters
//!   certificate                the institution's word for this node
//!   revocations                the newest list of every institution
//!   peers.json                 where members were last met
//!   addresses.json             where this node can be reached, as the daemon last saw it; invites name it
//!   institutions/ID.key        an institution's secret seed and name, where this home administers it
//!   tokens/HASH                an enrolment token that may be used, by its hash
//!   tokens/HASH.used           by which node it was used
//! ```
//!
//! Blobs, models and runs have folders of their own beside these. Every file is written whole: to a temporary name,
//! flushed, renamed, and its folder flushed. Whoever is interrupted finds the old file or the new one.

mod file;
mod token;

use std::fs::{self, File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use polder_protocol::charter::{Certificate, CharterError, Charters, Revocation};
use polder_protocol::hash::{InstitutionId, NodeId, hex, parse_hex_32};
use polder_protocol::identity::{KeyPair, Signed, SignedError};
use polder_protocol::invite::Door;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use file::{write_secret, write_whole};
pub use token::{TOKENS_MAX, TokenError, TokenGrant};

use file::{Access, is_absent, make_folder, read_secret, write_whole_as};

/// The most lists of revocations that are read from disk: one for each institution of a charter.
const REVOCATIONS_MAX: usize = polder_protocol::charter::INSTITUTIONS_MAX;

/// The most remembered peers. A dozen at different institutions is enough to come back.
pub const PEERS_MAX: usize = 64;

/// A node's folder.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
}

/// While it lives, no other daemon can use the home.
#[derive(Debug)]
pub struct HomeLock {
    _file: File,
}

/// An institution whose key this home holds.
#[derive(Debug, Clone)]
pub struct Institution {
    /// What people call it.
    pub name: String,
    /// Its key.
    pub key: KeyPair,
}

/// A peer to begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownPeer {
    /// The peer, as hexadecimal digits.
    pub node: String,
    /// Its control addresses, as multiaddresses.
    pub control: Vec<String>,
    /// Its data addresses.
    pub data: Vec<SocketAddr>,
}

/// Why a home cannot be used. Each names the path.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum HomeError {
    #[error("cannot {what} {}", .path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is in use by another daemon: stop that one first (`polder leave`), or use another --home", .path.display())]
    InUse { path: PathBuf },
    #[error("{} is damaged ({reason}): restore it from a copy, or remove it to begin anew", .path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("{} holds a charter that does not hold", .path.display())]
    Charter { path: PathBuf, source: CharterError },
    #[error("{} holds no valid signed statement", .path.display())]
    Signed { path: PathBuf, source: SignedError },
    #[error("this home holds no key of institution {institution}")]
    NoInstitution { institution: String },
    #[error("the operating system gives no random numbers: {reason}")]
    Random { reason: String },
}

impl Home {
    /// Opens the folder, and makes it where it is absent, for its owner alone.
    ///
    /// # Errors
    ///
    /// [`HomeError::File`] where the folder cannot be made.
    pub fn open(root: &Path) -> Result<Self, HomeError> {
        make_folder(root)?;
        Ok(Self {
            root: root.to_path_buf(),
        })
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the home for one daemon. The operating system gives it back when the process ends, however it ends.
    ///
    /// # Errors
    ///
    /// [`HomeError::InUse`] while another process holds it.
    pub fn lock(&self) -> Result<HomeLock, HomeError> {
        let path = self.root.join("lock");
        let file = lock_file(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(HomeLock { _file: file }),
            Err(TryLockError::WouldBlock) => Err(HomeError::InUse {
                path: self.root.clone(),
            }),
            Err(TryLockError::Error(source)) => Err(cannot_lock(&path, source)),
        }
    }

    /// Waits until nobody else changes charters or revocations, and keeps others from it until the answer is dropped.
    /// Whoever reads one of them, changes it and writes it holds this meanwhile, so that no change is lost.
    ///
    /// # Errors
    ///
    /// [`HomeError::File`] where files cannot be locked.
    pub fn lock_membership(&self) -> Result<HomeLock, HomeError> {
        let path = self.root.join("membership.lock");
        let file = lock_file(&path)?;
        file.lock().map_err(|source| cannot_lock(&path, source))?;
        Ok(HomeLock { _file: file })
    }

    /// The node's key, drawn on first use.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read or written, or is no key.
    pub fn node_key(&self) -> Result<KeyPair, HomeError> {
        let path = self.root.join("node.key");
        if let Some(text) = read_secret(&path)? {
            return parse_key(&path, &text).map(|(key, _)| key);
        }
        let key = KeyPair::from_seed(&random_32()?);
        write_whole_as(&path, key_text(&key, "").as_bytes(), Access::Owner)?;
        Ok(key)
    }

    /// The charters, where there are any.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read, or a chain that does not hold.
    pub fn charters(&self) -> Result<Option<Charters>, HomeError> {
        let path = self.charter_path();
        let Some(bytes) = read(&path)? else { return Ok(None) };
        Charters::from_bytes(&bytes)
            .map(Some)
            .map_err(|source| HomeError::Charter { path, source })
    }

    /// Keeps charters.
    ///
    /// # Errors
    ///
    /// [`HomeError::File`]; the old file is as it was.
    pub fn save_charters(&self, charters: &Charters) -> Result<(), HomeError> {
        write_whole(&self.charter_path(), &charters.to_bytes())
    }

    /// Where the charters are kept.
    pub fn charter_path(&self) -> PathBuf {
        self.root.join("charter")
    }

    /// This node's certificate, where it has one. Its signature is checked when it is shown.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read or is malformed.
    pub fn certificate(&self) -> Result<Option<Signed<Certificate>>, HomeError> {
        let path = self.root.join("certificate");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        Signed::from_bytes(&bytes)
            .map(Some)
            .map_err(|source| HomeError::Signed { path, source })
    }

    /// Keeps this node's certificate.
    ///
    /// # Errors
    ///
    /// [`HomeError::File`]; the old file is as it was.
    pub fn save_certificate(&self, certificate: &Signed<Certificate>) -> Result<(), HomeError> {
        write_whole(&self.root.join("certificate"), &certificate.to_bytes())
    }

    /// The newest known list of revocations of every institution.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read or is malformed.
    pub fn revocations(&self) -> Result<Vec<Signed<Revocation>>, HomeError> {
        let path = self.root.join("revocations");
        let Some(bytes) = read(&path)? else {
            return Ok(Vec::new());
        };
        let lists: Vec<Signed<Revocation>> = postcard::from_bytes(&bytes).map_err(|error| damaged(&path, &error))?;
        if lists.len() > REVOCATIONS_MAX {
            return Err(damaged(&path, &"too many lists"));
        }
        Ok(lists)
    }

    /// Keeps lists of revocations.
    ///
    /// # Errors
    ///
    /// [`HomeError::File`]; the old file is as it was.
    pub fn save_revocations(&self, lists: &[Signed<Revocation>]) -> Result<(), HomeError> {
        let path = self.root.join("revocations");
        let bytes = postcard::to_allocvec(lists).map_err(|error| damaged(&path, &error))?;
        write_whole(&path, &bytes)
    }

    /// Peers to begin with: those of the invite, and those met since.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read or is malformed.
    pub fn peers(&self) -> Result<Vec<KnownPeer>, HomeError> {
        let path = self.root.join("peers.json");
        let Some(bytes) = read(&path)? else {
            return Ok(Vec::new());
        };
        let mut peers: Vec<KnownPeer> = serde_json::from_slice(&bytes).map_err(|error| damaged(&path, &error))?;
        peers.truncate(PEERS_MAX);
        Ok(peers)
    }

    /// Keeps peers to begin with, at most [`PEERS_MAX`].
    ///
    /// # Errors
    ///
    /// [`HomeError::File`]; the old file is as it was.
    pub fn save_peers(&self, peers: &[KnownPeer]) -> Result<(), HomeError> {
        let path = self.root.join("peers.json");
        let kept = peers.get(..PEERS_MAX).unwrap_or(peers);
        let text = serde_json::to_vec_pretty(kept).map_err(|error| damaged(&path, &error))?;
        write_whole(&path, &text)
    }

    /// Where this node can be reached, as its daemon last saw it.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read or is malformed.
    pub fn addresses(&self) -> Result<Option<KnownPeer>, HomeError> {
        let path = self.root.join("addresses.json");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let own = serde_json::from_slice(&bytes).map_err(|error| damaged(&path, &error))?;
        Ok(Some(own))
    }

    /// Keeps where this node can be reached. The daemon calls it when it listens, and when that changes.
    ///
    /// # Errors
    ///
    /// [`HomeError::File`]; the old file is as it was.
    pub fn save_addresses(&self, own: &KnownPeer) -> Result<(), HomeError> {
        let path = self.root.join("addresses.json");
        let text = serde_json::to_vec_pretty(own).map_err(|error| damaged(&path, &error))?;
        write_whole(&path, &text)
    }

    /// Models and checkpoints by their hash.
    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// Published models.
    pub fn epochs(&self) -> PathBuf {
        self.root.join("epochs")
    }

    /// Training runs: log and checkpoints.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// What can be rebuilt.
    pub fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    /// The institutions whose keys this home holds, in the order of their ids.
    ///
    /// # Errors
    ///
    /// [`HomeError`] for a file that cannot be read or is no key.
    pub fn institutions(&self) -> Result<Vec<Institution>, HomeError> {
        let folder = self.root.join("institutions");
        let failed = |source| HomeError::File {
            what: "list",
            path: folder.clone(),
            source,
        };
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "key") {
                paths.push(path);
            }
        }
        paths.sort();
        let mut institutions = Vec::new();
        for path in paths {
            if let Some(text) = read_secret(&path)? {
                let (key, name) = parse_key(&path, &text)?;
                institutions.push(Institution { name, key });
            }
        }
        Ok(institutions)
    }

    /// The institution with this key, if this home holds it.
    ///
    /// # Errors
    ///
    /// As [`Self::institutions`].
    pub fn institution(&self, id: InstitutionId) -> Result<Option<Institution>, HomeError> {
        let institutions = self.institutions()?;
        Ok(institutions.into_iter().find(|one| one.key.institution() == id))
    }

    /// Draws and keeps the key of a new institution.
    ///
    /// # Errors
    ///
    /// [`HomeError`] where it cannot be written.
    pub fn new_institution(&self, name: &str) -> Result<Institution, HomeError> {
        let institution = Institution::draw(name)?;
        self.keep_institution(&institution)?;
        Ok(institution)
    }

    /// Keeps the key of an institution.
    ///
    /// # Errors
    ///
    /// [`HomeError`] where it cannot be written.
    pub fn keep_institution(&self, institution: &Institution) -> Result<(), HomeError> {
        let folder = self.root.join("institutions");
        make_folder(&folder)?;
        let path = folder.join(format!("{}.key", institution.key.institution()));
        let text = key_text(&institution.key, &institution.name);
        write_whole_as(&path, text.as_bytes(), Access::Owner)
    }
}

impl Institution {
    /// Draws the key of a new institution, which is not kept anywhere yet.
    ///
    /// # Errors
    ///
    /// [`HomeError::Random`].
    pub fn draw(name: &str) -> Result<Self, HomeError> {
        Ok(Self {
            name: one_line(name),
            key: KeyPair::from_seed(&random_32()?),
        })
    }
}

fn lock_file(path: &Path) -> Result<File, HomeError> {
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    options.open(path).map_err(|source| cannot_lock(path, source))
}

fn cannot_lock(path: &Path, source: io::Error) -> HomeError {
    HomeError::File {
        what: "lock",
        path: path.to_path_buf(),
        source,
    }
}

/// 32 bytes from the operating system's random numbers.
///
/// # Errors
///
/// [`HomeError::Random`] where it has none to give.
pub fn random_32() -> Result<[u8; 32], HomeError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| HomeError::Random {
        reason: error.to_string(),
    })?;
    Ok(bytes)
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, HomeError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(source) => Err(HomeError::File {
            what: "read",
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn damaged(path: &Path, reason: &dyn std::fmt::Display) -> HomeError {
    HomeError::Damaged {
        path: path.to_path_buf(),
        reason: reason.to_string(),
    }
}

/// A key file: what it is, the secret seed, and a name.
fn key_text(key: &KeyPair, name: &str) -> String {
    format!("polder secret key 1\n{}\n{}\n", hex(&key.seed()), one_line(name))
}

fn one_line(name: &str) -> String {
    name.chars().filter(|letter| !letter.is_control()).collect()
}

fn parse_key(path: &Path, text: &str) -> Result<(KeyPair, String), HomeError> {
    let mut lines = text.lines();
    if lines.next() != Some("polder secret key 1") {
        return Err(damaged(path, &"not a key file"));
    }
    // The reason must not repeat the text, which is secret.
    let seed = parse_hex_32(lines.next().unwrap_or_default()).map_err(|error| damaged(path, &error))?;
    Ok((KeyPair::from_seed(&seed), lines.next().unwrap_or_default().to_string()))
}

impl From<&Door> for KnownPeer {
    fn from(door: &Door) -> Self {
        Self {
            node: door.node.to_string(),
            control: door.control.clone(),
            data: door.data.clone(),
        }
    }
}

impl KnownPeer {
    /// The peer's id, if the text is one.
    pub fn id(&self) -> Option<NodeId> {
        self.node.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_key_is_drawn_once() {
        let (_folder, home) = home();
        let first = home.node_key().unwrap();
        assert_eq!(home.node_key().unwrap().node(), first.node());
    }

    #[test]
    fn two_daemons_cannot_share_a_home() {
        let (_folder, home) = home();
        let held = home.lock().unwrap();
        assert!(matches!(home.lock(), Err(HomeError::InUse { .. })));
        drop(held);
        assert!(home.lock().is_ok());
    }

    #[test]
    fn an_institution_is_found_again_with_its_name() {
        let (_folder, home) = home();
        assert!(home.institutions().unwrap().is_empty());
        let made = home.new_institution("TU Delft").unwrap();
        let found = home.institution(made.key.institution()).unwrap().unwrap();
        assert_eq!(found.name, "TU Delft");
        assert_eq!(found.key.public(), made.key.public());
    }

    #[test]
    fn a_damaged_key_is_named_and_not_repeated() {
        let (_folder, home) = home();
        fs::write(home.root().join("node.key"), "polder secret key 1\n1234secret\n").unwrap();
        let error = home.node_key().unwrap_err().to_string();
        assert!(error.contains("node.key") && !error.contains("1234secret"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_could_read_is_closed_to_them() {
        use std::os::unix::fs::PermissionsExt;
        let (_folder, home) = home();
        home.node_key().unwrap();
        let path = home.root().join("node.key");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        home.node_key().unwrap();
        assert_eq!(mode(), 0o600);
    }

    #[test]
    fn peers_survive_their_file() {
        let (_folder, home) = home();
        let peer = KnownPeer {
            node: NodeId([3; 32]).to_string(),
            control: vec!["/ip4/10.0.0.1/tcp/4001".into()],
            data: vec!["10.0.0.1:4002".parse().unwrap()],
        };
        home.save_peers(std::slice::from_ref(&peer)).unwrap();
        assert_eq!(home.peers().unwrap(), [peer]);
    }

    fn home() -> (tempfile::TempDir, Home) {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(&folder.path().join("home")).unwrap();
        (folder, home)
    }
}
