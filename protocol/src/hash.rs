//! 32-byte BLAKE3 hashes, and the ids that are made of them.

use alloc::string::String;
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A text that is not 64 hexadecimal digits.
#[derive(Debug, Error, Clone, Copy, Eq, PartialEq)]
#[error("expected 64 hexadecimal digits, found {found} characters that are not")]
pub struct HexError {
    /// Length of the text in characters.
    pub found: usize,
}

/// Writes 32 bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

/// Reads 64 hexadecimal digits.
///
/// # Errors
///
/// [`HexError`] for any other text.
pub fn parse_hex_32(text: &str) -> Result<[u8; 32], HexError> {
    let error = HexError {
        found: text.chars().count(),
    };
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return Err(error);
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
        };
        match pair {
            [high, low] => match (nibble(*high), nibble(*low)) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => return Err(error),
            },
            _ => return Err(error),
        }
    }
    Ok(bytes)
}

macro_rules! id_of_32_bytes {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The first eight digits, for people.
            pub fn short(&self) -> String {
                let [a, b, c, d, ..] = self.0;
                hex(&[a, b, c, d])
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }
        impl FromStr for $name {
            type Err = HexError;
            fn from_str(text: &str) -> Result<Self, HexError> {
                parse_hex_32(text).map(Self)
            }
        }
    };
}

id_of_32_bytes!(
    /// The BLAKE3 hash of some bytes.
    Digest
);
id_of_32_bytes!(
    /// A node: its ed25519 public key.
    NodeId
);
id_of_32_bytes!(
    /// An institution: its ed25519 public key.
    InstitutionId
);
id_of_32_bytes!(
    /// A federation: the hash of its first charter.
    FederationId
);
id_of_32_bytes!(
    /// Content-addressed bytes: the hash of their [`crate::blob::Manifest`].
    BlobId
);
id_of_32_bytes!(
    /// A published version of a model: the hash of its [`crate::epoch::Epoch`].
    EpochId
);
id_of_32_bytes!(
    /// A training run: the hash of its [`crate::run::RunSpec`].
    RunId
);

/// The BLAKE3 hash of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn an_id_survives_its_text() {
        let id = digest(b"polder");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("xyz".parse::<Digest>(), Err(HexError { found: 3 }));
    }
}
