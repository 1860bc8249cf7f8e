//! Enrolment tokens: 32 random bytes that let one node in, once. Only their hashes are kept.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use polder_protocol::charter::Capabilities;
use polder_protocol::hash::{InstitutionId, NodeId, digest};
use polder_protocol::time::UnixSeconds;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::file::{Access, is_absent, make_folder, options, write_whole_as};
use super::{Home, HomeError, damaged, random_32, read};

/// The most tokens that are kept at once: a term's students, and a limit for a script that runs wild.
pub const TOKENS_MAX: usize = 10_000;

/// For how long a token is kept after its end, so that who comes late hears that it expired: 30 days.
const REMEMBER_SECONDS: u64 = 30 * 24 * 3600;

/// What a token gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenGrant {
    /// Which institution certifies the node.
    pub institution: InstitutionId,
    /// What the node may do.
    pub capabilities: Capabilities,
    /// Until when it can be used.
    pub expires: UnixSeconds,
}

/// Why a token lets nobody in.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum TokenError {
    #[error("the invite's token is not known here: was it made on another gateway?")]
    Unknown,
    #[error("the invite's token expired at {expired} (unix seconds): ask for a new invite")]
    Expired { expired: u64 },
    #[error("the invite was already used by another node: ask for a new one")]
    Used,
    #[error("{count} tokens wait to be used, over the limit of {TOKENS_MAX}")]
    TooMany { count: usize },
    #[error(transparent)]
    Home(#[from] HomeError),
}

impl Home {
    /// Draws a token and keeps its hash.
    ///
    /// # Errors
    ///
    /// [`TokenError::TooMany`], or [`TokenError::Home`] where it cannot be written.
    pub fn new_token(&self, grant: &TokenGrant, now: UnixSeconds) -> Result<[u8; 32], TokenError> {
        let folder = self.root().join("tokens");
        make_folder(&folder)?;
        let count = forget_old(&folder, now)?;
        if count >= TOKENS_MAX {
            return Err(TokenError::TooMany { count });
        }
        let token = random_32()?;
        let path = self.token_path(&token);
        let bytes = postcard::to_allocvec(grant).map_err(|error| damaged(&path, &error))?;
        write_whole_as(&path, &bytes, Access::Owner)?;
        Ok(token)
    }

    /// Uses a token for `node`. The same node may use it again until it expires, since its answer may have been lost.
    ///
    /// # Errors
    ///
    /// [`TokenError`] for a token that is unknown, expired or used by another node.
    pub fn use_token(&self, token: &[u8; 32], node: NodeId, now: UnixSeconds) -> Result<TokenGrant, TokenError> {
        let path = self.token_path(token);
        let bytes = read(&path)?.ok_or(TokenError::Unknown)?;
        let grant: TokenGrant = postcard::from_bytes(&bytes).map_err(|error| damaged(&path, &error))?;
        if now > grant.expires {
            return Err(TokenError::Expired {
                expired: grant.expires.0,
            });
        }
        let used = path.with_extension("used");
        match mark_used(&used, node) {
            Ok(()) => Ok(grant),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match read(&used)? {
                Some(by) if by == node.0 => Ok(grant),
                _ => Err(TokenError::Used),
            },
            Err(source) => Err(TokenError::Home(HomeError::File {
                what: "write",
                path: used,
                source,
            })),
        }
    }

    fn token_path(&self, token: &[u8; 32]) -> PathBuf {
        self.root().join("tokens").join(digest(token).to_string())
    }
}

/// The operating system lets only one process make the file, so a token lets only one node in.
fn mark_used(path: &Path, node: NodeId) -> io::Result<()> {
    let mut file = options(Access::Owner).create_new(true).write(true).open(path)?;
    let written = file.write_all(&node.0).and_then(|()| file.sync_all());
    if written.is_err() {
        // Nobody was let in, so the token stays good; where this fails too, it is spent.
        let _ = fs::remove_file(path);
    }
    written
}

/// Removes tokens that ended long ago; answers how many are left.
fn forget_old(folder: &Path, now: UnixSeconds) -> Result<usize, HomeError> {
    let failed = |source| HomeError::File {
        what: "list",
        path: folder.to_path_buf(),
        source,
    };
    let mut count = 0;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some() {
            continue;
        }
        let grant: Option<TokenGrant> = read(&path)?.and_then(|bytes| postcard::from_bytes(&bytes).ok());
        if grant.is_some_and(|grant| now.0 > grant.expires.0.saturating_add(REMEMBER_SECONDS)) {
            for old in [path.with_extension("used"), path] {
                match fs::remove_file(&old) {
                    Err(error) if !is_absent(&error) => return Err(failed(error)),
                    _ => {}
                }
            }
        } else {
            count += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixSeconds = UnixSeconds(1_800_000_000);

    #[test]
    fn a_token_lets_one_node_in_and_no_other() {
        let (_folder, home) = home();
        let token = home.new_token(&grant(), NOW).unwrap();
        let (first, second) = (NodeId([1; 32]), NodeId([2; 32]));
        assert_eq!(home.use_token(&token, first, NOW).unwrap(), grant());
        assert_eq!(home.use_token(&token, first, NOW).unwrap(), grant());
        assert!(matches!(home.use_token(&token, second, NOW), Err(TokenError::Used)));
    }

    #[test]
    fn a_token_ends() {
        let (_folder, home) = home();
        let token = home.new_token(&grant(), NOW).unwrap();
        let late = UnixSeconds(grant().expires.0 + 1);
        let refused = home.use_token(&token, NodeId([1; 32]), late);
        assert!(matches!(refused, Err(TokenError::Expired { .. })));
    }

    #[test]
    fn a_guess_is_unknown_and_a_token_is_nowhere_on_disk() {
        let (_folder, home) = home();
        let token = home.new_token(&grant(), NOW).unwrap();
        assert!(matches!(
            home.use_token(&[0; 32], NodeId([1; 32]), NOW),
            Err(TokenError::Unknown)
        ));
        for entry in fs::read_dir(home.root().join("tokens")).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            assert!(!bytes.windows(32).any(|window| window == token));
            assert!(!path.to_string_lossy().contains(&polder_protocol::hash::hex(&token)));
        }
    }

    #[test]
    fn old_tokens_are_forgotten() {
        let (_folder, home) = home();
        home.new_token(&grant(), NOW).unwrap();
        home.new_token(&grant(), UnixSeconds(grant().expires.0 + REMEMBER_SECONDS + 1))
            .unwrap();
        assert_eq!(fs::read_dir(home.root().join("tokens")).unwrap().count(), 1);
    }

    fn grant() -> TokenGrant {
        TokenGrant {
            institution: InstitutionId([8; 32]),
            capabilities: Capabilities::ORDINARY,
            expires: UnixSeconds(NOW.0 + 3600),
        }
    }

    fn home() -> (tempfile::TempDir, Home) {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(&folder.path().join("home")).unwrap();
        (folder, home)
    }
}
