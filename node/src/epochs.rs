//! The epochs that this node knows: one file each, `HOME/epochs/ID`.
//!
//! An epoch names its blobs but does not hold them: a node that serves a stage has the blobs of that stage alone.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use polder_protocol::epoch::Epoch;
use polder_protocol::hash::{BlobId, EpochId};
use thiserror::Error;

use crate::home::{HomeError, write_whole};

/// The configuration of the largest models and their chat templates take a hundredth of this; part lists the rest.
const EPOCH_BYTES_MAX: u64 = 16 << 20;
/// The shortest beginning of an id that names it.
const PREFIX_DIGITS_MIN: usize = 4;

/// The longest name of a model, in characters.
const NAME_MAX: usize = 128;

/// Reads what a person wants to call a model: something that can be typed and shown again.
///
/// # Errors
///
/// What is wrong with it, for people.
pub fn model_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text != text.trim() || text.chars().any(char::is_control) {
        return Err("a model's name is not empty, and has neither space around it nor control characters".to_owned());
    }
    if text.chars().count() > NAME_MAX {
        return Err(format!("a model's name has at most {NAME_MAX} characters"));
    }
    Ok(text.to_owned())
}

/// Why an epoch cannot be had.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum EpochsError {
    #[error("cannot {action} {}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot keep the epoch")]
    Write(#[from] HomeError),
    #[error("{} is not the epoch that its name says", path.display())]
    Damaged { path: PathBuf },
    #[error("there is no model `{wanted}` here")]
    Unknown { wanted: String },
    #[error("`{wanted}` may be any of {}", list(among))]
    Ambiguous { wanted: String, among: Vec<EpochId> },
}

/// The folder of epochs.
#[derive(Debug, Clone)]
pub struct Epochs {
    folder: PathBuf,
}

impl Epochs {
    /// The epochs of a home. The folder is made when the first is kept.
    pub fn of(home: &Path) -> Self {
        Self {
            folder: home.join("epochs"),
        }
    }

    /// Keeps an epoch. When it returns it is on disk.
    ///
    /// # Errors
    ///
    /// [`EpochsError::File`] or [`EpochsError::Write`]; nothing is kept then.
    pub fn save(&self, epoch: &Epoch) -> Result<EpochId, EpochsError> {
        let id = epoch.id();
        fs::create_dir_all(&self.folder).map_err(file("make", &self.folder))?;
        write_whole(&self.path(id), &epoch.to_bytes())?;
        Ok(id)
    }

    /// Whether the epoch is known.
    pub fn has(&self, id: EpochId) -> bool {
        self.path(id).is_file()
    }

    /// Reads an epoch and checks that it is the one.
    ///
    /// # Errors
    ///
    /// [`EpochsError::Unknown`], [`EpochsError::Damaged`] or [`EpochsError::File`].
    pub fn load(&self, id: EpochId) -> Result<Epoch, EpochsError> {
        let path = self.path(id);
        let found = match fs::metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(EpochsError::Unknown { wanted: id.to_string() });
            }
            Err(error) => return Err(file("read", &path)(error)),
        };
        if found.len() > EPOCH_BYTES_MAX {
            return Err(EpochsError::Damaged { path });
        }
        let bytes = fs::read(&path).map_err(file("read", &path))?;
        match Epoch::from_bytes(&bytes) {
            Ok(epoch) if epoch.id() == id => Ok(epoch),
            _ => Err(EpochsError::Damaged { path }),
        }
    }

    /// Every epoch, by id. Damaged files are left out: [`Epochs::load`] says so of each.
    ///
    /// # Errors
    ///
    /// [`EpochsError::File`] when the folder cannot be read.
    pub fn list(&self) -> Result<Vec<(EpochId, Epoch)>, EpochsError> {
        let ids = self.ids()?;
        Ok(ids
            .into_iter()
            .filter_map(|id| Some((id, self.load(id).ok()?)))
            .collect())
    }

    /// The epoch that a person means: an id, the beginning of one, or a name. Of several of one name it is the one that
    /// the others led to.
    ///
    /// # Errors
    ///
    /// [`EpochsError::Unknown`] or [`EpochsError::Ambiguous`].
    pub fn find(&self, wanted: &str) -> Result<(EpochId, Epoch), EpochsError> {
        let all = self.list()?;
        let by_id = wanted.len() >= PREFIX_DIGITS_MIN;
        let mut found: Vec<_> = all.iter().filter(|(_, epoch)| epoch.name == wanted).collect();
        if found.is_empty() && by_id {
            found = all
                .iter()
                .filter(|(id, _)| id.to_string().starts_with(wanted))
                .collect();
        }
        let parents: BTreeSet<EpochId> = found.iter().filter_map(|(_, epoch)| epoch.parent).collect();
        found.retain(|(id, _)| !parents.contains(id));
        match found.as_slice() {
            [] => Err(EpochsError::Unknown {
                wanted: wanted.to_owned(),
            }),
            [(id, epoch)] => Ok((*id, epoch.clone())),
            several => Err(EpochsError::Ambiguous {
                wanted: wanted.to_owned(),
                among: several.iter().map(|(id, _)| *id).collect(),
            }),
        }
    }

    /// Every blob that some epoch names.
    ///
    /// # Errors
    ///
    /// [`EpochsError::File`] when the folder cannot be read.
    pub fn blobs(&self) -> Result<BTreeSet<BlobId>, EpochsError> {
        let all = self.list()?;
        Ok(all
            .into_iter()
            .flat_map(|(_, epoch)| epoch.parts.into_iter().chain([epoch.tokenizer]))
            .collect())
    }

    fn ids(&self) -> Result<Vec<EpochId>, EpochsError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(file("read", &self.folder)(error)),
        };
        let mut ids: Vec<EpochId> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    fn path(&self, id: EpochId) -> PathBuf {
        self.folder.join(id.to_string())
    }
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EpochsError {
    let path = path.to_owned();
    move |source| EpochsError::File { action, path, source }
}

fn list(ids: &[EpochId]) -> String {
    ids.iter().map(EpochId::short).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_typed_and_shown_again() {
        assert_eq!(model_name("Ølmo 2/7B").as_deref(), Ok("Ølmo 2/7B"));
        for wrong in ["", " ", " a", "a\u{1b}[31m", "a\nb", &"a".repeat(129)] {
            assert!(model_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn an_epoch_is_found_by_its_name_and_by_the_beginning_of_its_id() {
        let home = tempfile::tempdir().unwrap();
        let epochs = Epochs::of(home.path());
        assert!(epochs.list().unwrap().is_empty());
        let id = epochs.save(&epoch("tiny", None)).unwrap();
        assert_eq!(epochs.find("tiny").unwrap().0, id);
        assert_eq!(epochs.find(&id.short()).unwrap().0, id);
        assert!(matches!(epochs.find("other"), Err(EpochsError::Unknown { .. })));
    }

    #[test]
    fn of_one_name_the_newest_is_meant() {
        let home = tempfile::tempdir().unwrap();
        let epochs = Epochs::of(home.path());
        let first = epochs.save(&epoch("tiny", None)).unwrap();
        let second = epochs.save(&epoch("tiny", Some(first))).unwrap();
        assert_eq!(epochs.find("tiny").unwrap().0, second);
        let mut other = epoch("tiny", Some(first));
        other.context_tokens_max = 7;
        epochs.save(&other).unwrap();
        assert!(matches!(epochs.find("tiny"), Err(EpochsError::Ambiguous { among, .. }) if among.len() == 2));
    }

    #[test]
    fn a_damaged_epoch_is_not_loaded() {
        let home = tempfile::tempdir().unwrap();
        let epochs = Epochs::of(home.path());
        let id = epochs.save(&epoch("tiny", None)).unwrap();
        let path = home.path().join("epochs").join(id.to_string());
        let mut bytes = fs::read(&path).unwrap();
        bytes[2] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(matches!(epochs.load(id), Err(EpochsError::Damaged { .. })));
    }

    fn epoch(name: &str, parent: Option<EpochId>) -> Epoch {
        Epoch {
            version: 1,
            name: name.to_owned(),
            config_json: "{}".to_owned(),
            tokenizer: BlobId([1; 32]),
            chat_template: None,
            end_tokens: vec![2],
            begin_token: None,
            parts: vec![BlobId([2; 32]); 3],
            part_bytes: vec![5; 3],
            context_tokens_max: 64,
            parent,
            trained: None,
            evaluation: std::collections::BTreeMap::new(),
        }
    }
}
