//! Texts of this institution, by name: which files a training run may read here. Only names ever leave this node.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::durable;

/// Data sets of one node. A list longer than this is a mistake.
const SETS_MAX: usize = 4_096;
/// Files of one folder.
const FILES_MAX: usize = 65_536;
/// So many bytes at the beginning of a file are looked into when it is registered.
const LOOKED_INTO: u64 = 64 << 10;

/// One data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSet {
    /// A text file, or a folder of `.txt` files. Absolute.
    pub path: PathBuf,
    /// The language's code, where it is one language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
}

/// The registered data sets, in `data.toml`.
#[derive(Debug, Clone)]
pub struct DataSets {
    file: PathBuf,
    sets: BTreeMap<String, DataSet>,
}

/// Why a data set is not there, or not to be had.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum DataSetError {
    #[error("`{name}` is no name for data: use letters, digits, `-`, `_` and `.`, at most 64")]
    Name { name: String },
    #[error("data `{name}` is registered already, for {path}; remove it first", path = path.display())]
    Taken { name: String, path: PathBuf },
    #[error("there is no data named `{name}`; `polder data list` shows what there is")]
    Unknown { name: String },
    #[error("more than {SETS_MAX} data sets")]
    TooMany,
    #[error("{path} is no text file and no folder with .txt files", path = path.display())]
    NoText { path: PathBuf },
    #[error("{path} is no text in UTF-8 (byte {at}): convert it first, for instance with iconv", path = path.display())]
    NotUtf8 { path: PathBuf, at: usize },
    #[error("`{language}` is no language's code: write it as `de` or `de-CH`")]
    Language { language: String },
    #[error("cannot read or write {path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{path} is damaged: {reason}", path = path.display())]
    Damaged { path: PathBuf, reason: String },
}

impl DataSets {
    /// Reads the list; a file that is not there is an empty list.
    ///
    /// # Errors
    ///
    /// [`DataSetError::File`] and [`DataSetError::Damaged`].
    pub fn open(file: PathBuf) -> Result<Self, DataSetError> {
        let sets = match fs::read_to_string(&file) {
            Ok(text) => toml::from_str(&text).map_err(|error| DataSetError::Damaged {
                path: file.clone(),
                reason: error.to_string(),
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => return Err(DataSetError::File { path: file, source }),
        };
        Ok(Self { file, sets })
    }

    /// All data sets by name.
    pub fn list(&self) -> &BTreeMap<String, DataSet> {
        &self.sets
    }

    /// Registers a file or folder of this machine. Nothing is copied.
    ///
    /// # Errors
    ///
    /// [`DataSetError`] for a bad or taken name, or a path without text. Nothing is changed then.
    pub fn add(&mut self, name: &str, path: &Path, language: Option<String>) -> Result<(), DataSetError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
            return Err(DataSetError::Name { name: name.to_owned() });
        }
        if let Some(set) = self.sets.get(name) {
            return Err(DataSetError::Taken {
                name: name.to_owned(),
                path: set.path.clone(),
            });
        }
        if self.sets.len() >= SETS_MAX {
            return Err(DataSetError::TooMany);
        }
        let of_code = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if let Some(language) = language
            .as_ref()
            .filter(|code| code.is_empty() || !code.chars().all(of_code))
        {
            return Err(DataSetError::Language {
                language: language.clone(),
            });
        }
        let path = fs::canonicalize(path).map_err(|source| DataSetError::File {
            path: path.to_owned(),
            source,
        })?;
        let set = DataSet { path, language };
        for file in set.files()? {
            look_into(&file)?;
        }
        let mut sets = self.sets.clone();
        sets.insert(name.to_owned(), set);
        self.save(sets)
    }

    /// Forgets a data set; its files stay.
    ///
    /// # Errors
    ///
    /// [`DataSetError::Unknown`], and what keeps the list from being written.
    pub fn remove(&mut self, name: &str) -> Result<(), DataSetError> {
        let mut sets = self.sets.clone();
        if sets.remove(name).is_none() {
            return Err(DataSetError::Unknown { name: name.to_owned() });
        }
        self.save(sets)
    }

    /// The files of those of `names` that are registered here, or of everything where `names` is empty.
    ///
    /// # Errors
    ///
    /// [`DataSetError`] for a registered path that cannot be read any more.
    pub fn files_of(&self, names: &[String]) -> Result<Vec<PathBuf>, DataSetError> {
        let wanted = self.wanted(names);
        wanted
            .map(DataSet::files)
            .collect::<Result<Vec<_>, _>>()
            .map(|files| files.concat())
    }

    /// The languages of those of `names` that are registered here, or of everything where `names` is empty.
    pub fn languages_of(&self, names: &[String]) -> Vec<String> {
        let languages: BTreeSet<String> = self.wanted(names).filter_map(|set| set.language.clone()).collect();
        languages.into_iter().collect()
    }

    fn wanted(&self, names: &[String]) -> impl Iterator<Item = &DataSet> {
        let wanted = self
            .sets
            .iter()
            .filter(move |(name, _)| names.is_empty() || names.contains(name));
        wanted.map(|(_, set)| set)
    }

    fn save(&mut self, sets: BTreeMap<String, DataSet>) -> Result<(), DataSetError> {
        let text = toml::to_string(&sets).map_err(|error| DataSetError::Damaged {
            path: self.file.clone(),
            reason: error.to_string(),
        })?;
        durable::write(&self.file, text.as_bytes()).map_err(|source| DataSetError::File {
            path: self.file.clone(),
            source,
        })?;
        self.sets = sets;
        Ok(())
    }
}

impl DataSet {
    /// Its text files, in the order of their names.
    fn files(&self) -> Result<Vec<PathBuf>, DataSetError> {
        let failed = |source| DataSetError::File {
            path: self.path.clone(),
            source,
        };
        if fs::metadata(&self.path).map_err(failed)?.is_file() {
            return Ok(vec![self.path.clone()]);
        }
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(failed)?.take(FILES_MAX) {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "txt") && path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() {
            return Err(DataSetError::NoText {
                path: self.path.clone(),
            });
        }
        Ok(files)
    }
}

/// Reads the beginning of a file: who names an archive or a text in Latin-1 hears so at once, and not in the middle of a run.
fn look_into(path: &Path) -> Result<(), DataSetError> {
    let failed = |source| DataSetError::File {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(LOOKED_INTO).read_to_end(&mut bytes).map_err(failed)?;
    match std::str::from_utf8(&bytes) {
        // The last character may be cut.
        Err(error) if error.error_len().is_some() => Err(DataSetError::NotUtf8 {
            path: path.to_owned(),
            at: error.valid_up_to(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_refused_at_once() {
        let home = tempfile::tempdir().unwrap();
        let mut sets = DataSets::open(home.path().join("data.toml")).unwrap();
        let (latin, cut) = (home.path().join("latin.txt"), home.path().join("cut.txt"));
        fs::write(&latin, b"Gr\xfc\xdfe aus Delfzijl").unwrap();
        let refused = sets.add("latin", &latin, None).unwrap_err();
        assert!(matches!(refused, DataSetError::NotUtf8 { at: 2, .. }), "{refused}");
        fs::write(&cut, "ü".repeat(LOOKED_INTO as usize)).unwrap();
        assert!(matches!(
            sets.add("cut", &cut, Some("no code".into())),
            Err(DataSetError::Language { .. })
        ));
        sets.add("cut", &cut, Some("de-CH".into())).unwrap();
    }

    #[test]
    fn data_is_found_again_by_name_after_a_restart() {
        let home = tempfile::tempdir().unwrap();
        let texts = home.path().join("texts");
        fs::create_dir(&texts).unwrap();
        fs::write(texts.join("b.txt"), "b").unwrap();
        fs::write(texts.join("a.txt"), "a").unwrap();
        fs::write(texts.join("notes.md"), "-").unwrap();
        let file = home.path().join("data.toml");
        let mut sets = DataSets::open(file.clone()).unwrap();
        sets.add("folder", &texts, Some("de".into())).unwrap();
        sets.add("one", &texts.join("b.txt"), None).unwrap();

        let sets = DataSets::open(file).unwrap();
        let names = |files: Vec<PathBuf>| {
            files
                .iter()
                .map(|path| path.file_name().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(sets.files_of(&["folder".into()]).unwrap()), ["a.txt", "b.txt"]);
        assert_eq!(names(sets.files_of(&[]).unwrap()), ["a.txt", "b.txt", "b.txt"]);
        assert_eq!(sets.languages_of(&[]), ["de"]);
        assert!(sets.files_of(&["other".into()]).unwrap().is_empty());
    }

    #[test]
    fn a_bad_data_set_is_refused_and_changes_nothing() {
        let home = tempfile::tempdir().unwrap();
        let mut sets = DataSets::open(home.path().join("data.toml")).unwrap();
        assert!(matches!(
            sets.add("a b", home.path(), None),
            Err(DataSetError::Name { .. })
        ));
        assert!(matches!(
            sets.add("empty", home.path(), None),
            Err(DataSetError::NoText { .. })
        ));
        assert!(matches!(
            sets.add("gone", &home.path().join("x"), None),
            Err(DataSetError::File { .. })
        ));
        assert!(matches!(sets.remove("gone"), Err(DataSetError::Unknown { .. })));
        assert!(!home.path().join("data.toml").exists());
    }
}
