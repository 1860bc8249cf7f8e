//! How programs on this machine find the daemon: `api.json` in its folder, readable by its owner alone.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where the daemon's local HTTP interface is, and the token that its administration asks for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApi {
    /// The address.
    pub address: SocketAddr,
    /// Sent as `Authorization: Bearer …`. Whoever can read the file may administer the node.
    pub token: String,
    /// The daemon's process.
    pub process: u32,
}

// The token stays out of logs.
impl std::fmt::Debug for LocalApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalApi")
            .field("address", &self.address)
            .field("process", &self.process)
            .finish_non_exhaustive()
    }
}

impl LocalApi {
    /// The file's place in `home`.
    pub fn path(home: &Path) -> PathBuf {
        home.join("api.json")
    }

    /// Reads the file of a running daemon; `None` where there is none.
    ///
    /// # Errors
    ///
    /// What the file system says, or that the file is not what it should be.
    pub fn read(home: &Path) -> io::Result<Option<Self>> {
        match fs::read(Self::path(home)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes the file, for its owner alone.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn write(&self, home: &Path) -> io::Result<()> {
        let temporary = home.join("api.json.new");
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            options.mode(0o600);
        }
        let mut file = options.open(&temporary)?;
        serde_json::to_writer(&mut file, self)?;
        fs::rename(&temporary, Self::path(home))
    }

    /// Removes the file: the daemon has ended.
    pub fn remove(home: &Path) {
        // Where it cannot be removed, readers find that nobody answers at its address.
        let _ = fs::remove_file(Self::path(home));
    }
}
