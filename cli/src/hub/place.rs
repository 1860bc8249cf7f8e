//! Where a model is published: `hf:ORG/NAME`, `hf:ORG/NAME@REVISION`, `hf:ORG/NAME/FILE.gguf`.

use std::str::FromStr;

use anyhow::{anyhow, bail};

/// A repository at a revision, and the one file that is wanted of it, if it is one.
///
/// Every piece is safe as a file's name and in an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The organisation or person.
    pub(crate) organisation: String,
    /// The repository.
    pub(crate) name: String,
    /// A branch, a tag or a commit.
    pub(crate) revision: String,
    /// A GGUF file within the repository.
    pub(crate) file: Option<String>,
}

/// Longer than any name on the hub.
const PIECE_BYTES_MAX: usize = 128;

impl FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let rest = text
            .strip_prefix("hf:")
            .ok_or_else(|| anyhow!("`{text}` does not begin with `hf:`"))?;
        let (path, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let mut pieces = path.splitn(3, '/');
        let (Some(organisation), Some(name)) = (pieces.next(), pieces.next()) else {
            bail!("`{text}` does not name an organisation and a model");
        };
        let file = pieces.next();
        for piece in [organisation, name].into_iter().chain(revision.split('/')) {
            if !is_piece(piece) {
                bail!("`{piece}` in `{text}` is not a name on a hub");
            }
        }
        if let Some(file) = file {
            if !is_path(file) {
                bail!("`{file}` is not a file of a repository");
            }
            if !file.ends_with(".gguf") {
                bail!("`{file}` is not a GGUF file; of other models the whole repository is named");
            }
            if is_split(file) {
                bail!("`{file}` is a piece of a GGUF file in several pieces, which are not read");
            }
        }
        Ok(Self {
            organisation: organisation.to_owned(),
            name: name.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

/// Whether every step of a path within a repository is a plain name. Listings come from a server.
pub(super) fn is_path(path: &str) -> bool {
    path.split('/').all(is_piece)
}

fn is_piece(piece: &str) -> bool {
    let letter = |letter: char| letter.is_ascii_alphanumeric() || "-_.+".contains(letter);
    !piece.is_empty() && piece.len() <= PIECE_BYTES_MAX && !piece.starts_with('.') && piece.chars().all(letter)
}

/// Whether a name ends as `-00001-of-00003.gguf` does.
fn is_split(file: &str) -> bool {
    let Some((rest, last)) = file.strip_suffix(".gguf").and_then(|stem| stem.rsplit_once("-of-")) else {
        return false;
    };
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits(last) && rest.rsplit_once('-').is_some_and(|(_, first)| digits(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_a_repository_a_revision_and_perhaps_a_file() {
        let place: Place = "hf:HuggingFaceTB/SmolLM2-135M".parse().unwrap();
        assert_eq!(
            (place.organisation.as_str(), place.name.as_str()),
            ("HuggingFaceTB", "SmolLM2-135M")
        );
        assert_eq!((place.revision.as_str(), place.file), ("main", None));
        let place: Place = "hf:org/name/sub/model-q8_0.gguf@refs/pr/1".parse().unwrap();
        assert_eq!(place.revision, "refs/pr/1");
        assert_eq!(place.file.as_deref(), Some("sub/model-q8_0.gguf"));
    }

    #[test]
    fn what_is_no_place_is_refused() {
        for text in [
            "org/name",
            "hf:name",
            "hf:org/",
            "hf:../name",
            "hf:org/name@",
            "hf:org/name@a/../b",
            "hf:org/name?x",
            "hf:org/name/weights.bin",
            "hf:org/name/../x.gguf",
            "hf:org/name/big-00001-of-00003.gguf",
        ] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
