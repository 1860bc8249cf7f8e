//! An invite: one line that a person copies, with everything that a newcomer needs to knock at the right door.
//!
//! `polder1`, then lower-case base 32 (digits 2 to 7, no padding) of a four-byte checksum and postcard bytes. It holds
//! a secret: whoever has the line first is let in, once.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::SocketAddr;
use core::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::charter::NAME_BYTES_MAX;
use crate::hash::{FederationId, InstitutionId, NodeId, digest};
use crate::time::UnixSeconds;

/// What every invite begins with. The digit is the version of its form.
pub const PREFIX: &str = "polder1";

/// The longest invite in characters. An ordinary one has some hundreds.
pub const INVITE_CHARS_MAX: usize = 16 << 10;

/// The most doors that one invite names.
pub const DOORS_MAX: usize = 8;

/// The most addresses of one kind of one door.
pub const DOOR_ADDRESSES_MAX: usize = 16;

/// A gateway where the newcomer may knock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// The gateway's key.
    pub node: NodeId,
    /// Its control addresses, as multiaddresses.
    pub control: Vec<String>,
    /// Its data addresses.
    pub data: Vec<SocketAddr>,
}

/// Everything that a newcomer needs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// Into which federation. The newcomer takes no other.
    pub federation: FederationId,
    /// What people call it.
    pub federation_name: String,
    /// Which institution certifies the newcomer. It takes no other's certificate.
    pub institution: InstitutionId,
    /// Where to knock; the first gateways are those that know the token.
    pub doors: Vec<Door>,
    /// Lets one node in, once.
    pub token: [u8; 32],
    /// Until when.
    pub expires: UnixSeconds,
}

// The token stays out of logs.
impl fmt::Debug for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invite")
            .field("federation", &self.federation)
            .field("federation_name", &self.federation_name)
            .field("institution", &self.institution)
            .field("doors", &self.doors)
            .field("expires", &self.expires)
            .finish_non_exhaustive()
    }
}

/// Why a text is no invite.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each message is its own documentation")]
pub enum InviteError {
    #[error("an invite begins with `{PREFIX}`")]
    Prefix,
    #[error("an invite has no `{0}` in it: was it copied whole, and nothing else?")]
    Letter(char),
    #[error("the invite is damaged: was it copied whole?")]
    Checksum,
    #[error("the invite is malformed: was it made by a newer version of this program?")]
    Malformed,
    #[error("the invite is {chars} characters long, over the limit of {INVITE_CHARS_MAX}")]
    TooLong { chars: usize },
}

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const CHECKSUM_BYTES: usize = 4;

impl fmt::Display for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An invite holds nothing that postcard cannot write.
        let body = postcard::to_allocvec(self).unwrap_or_default();
        let mut bytes = checksum(&body).to_vec();
        bytes.extend(body);
        f.write_str(PREFIX)?;
        f.write_str(&base_32(&bytes))
    }
}

impl FromStr for Invite {
    type Err = InviteError;

    /// Reads an invite. White space does not count, since mail programs break lines.
    fn from_str(text: &str) -> Result<Self, InviteError> {
        let chars = text.len();
        if chars > INVITE_CHARS_MAX {
            return Err(InviteError::TooLong { chars });
        }
        let line: String = text.chars().filter(|letter| !letter.is_whitespace()).collect();
        let bytes = from_base_32(line.strip_prefix(PREFIX).ok_or(InviteError::Prefix)?)?;
        let (sum, body) = bytes.split_at_checked(CHECKSUM_BYTES).ok_or(InviteError::Checksum)?;
        if sum != checksum(body) {
            return Err(InviteError::Checksum);
        }
        let invite: Self = postcard::from_bytes(body).map_err(|_| InviteError::Malformed)?;
        let crowded = |door: &Door| door.control.len().max(door.data.len()) > DOOR_ADDRESSES_MAX;
        let too_much = invite.federation_name.len() > NAME_BYTES_MAX || invite.doors.len() > DOORS_MAX;
        if too_much || invite.doors.iter().any(crowded) {
            return Err(InviteError::Malformed);
        }
        Ok(invite)
    }
}

fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let [a, b, c, d, ..] = digest(body).0;
    [a, b, c, d]
}

fn base_32(bytes: &[u8]) -> String {
    let letter = |bits: u32| {
        let letter = ALPHABET.get(usize::try_from(bits & 31).unwrap_or(0));
        char::from(letter.copied().unwrap_or(b'a'))
    };
    let mut text = String::new();
    let (mut held, mut count) = (0u32, 0u32);
    for byte in bytes {
        // At most 4 bits wait, so 12 bits are held at most.
        held = (held << 8 | u32::from(*byte)) & 0xfff;
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(letter(held >> count));
        }
    }
    if count > 0 {
        text.push(letter(held << (5 - count)));
    }
    text
}

fn from_base_32(text: &str) -> Result<Vec<u8>, InviteError> {
    let mut bytes = Vec::new();
    let (mut held, mut count) = (0u32, 0u32);
    for letter in text.chars() {
        let place = ALPHABET.iter().position(|known| char::from(*known) == letter);
        let bits = place.and_then(|place| u32::try_from(place).ok());
        // At most 7 bits wait, so 12 bits are held at most.
        held = (held << 5 | bits.ok_or(InviteError::Letter(letter))?) & 0xfff;
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.extend(u8::try_from(held >> count & 0xff));
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    #[test]
    fn an_invite_survives_its_line_even_when_a_mail_breaks_it() {
        let line = invite().to_string();
        assert_eq!(line.parse(), Ok(invite()));
        let (first, second) = line.split_at(60);
        assert_eq!(format!("  {first}\r\n {second}\n").parse(), Ok(invite()));
    }

    #[test]
    fn what_is_no_invite_is_said_in_words() {
        assert_eq!("hello".parse::<Invite>(), Err(InviteError::Prefix));
        assert_eq!("polder1a!".parse::<Invite>(), Err(InviteError::Letter('!')));
        let line = invite().to_string();
        let cut = line.get(..line.len() - 3).unwrap();
        assert_eq!(cut.parse::<Invite>(), Err(InviteError::Checksum));
    }

    #[test]
    fn the_token_is_never_printed_for_logs() {
        assert!(!format!("{:?}", invite()).contains("77, 77"));
    }

    proptest! {
        #[test]
        fn a_changed_letter_is_found(place: usize, letter in "[a-z2-7]") {
            let line = invite().to_string();
            let place = PREFIX.len() + place % (line.len() - PREFIX.len() - 1);
            let mut other = line.clone();
            other.replace_range(place..=place, &letter);
            prop_assert!(other == line || other.parse::<Invite>().is_err());
        }

        #[test]
        fn bytes_survive_base_32(bytes: Vec<u8>) {
            prop_assert_eq!(from_base_32(&base_32(&bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            let _ = text.parse::<Invite>();
            let _ = format!("{PREFIX}{text}").parse::<Invite>();
        }
    }

    fn invite() -> Invite {
        Invite {
            federation: FederationId([1; 32]),
            federation_name: "Test".to_string(),
            institution: InstitutionId([2; 32]),
            doors: vec![Door {
                node: NodeId([3; 32]),
                control: vec!["/ip4/192.0.2.1/tcp/4001".to_string()],
                data: vec![SocketAddr::from(([192, 0, 2, 1], 4002))],
            }],
            token: [77; 32],
            expires: UnixSeconds(1_800_000_000),
        }
    }
}
