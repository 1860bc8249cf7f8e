//! Where a charter says that one may begin.

use alloc::collections::BTreeSet;

use super::CharterError;
use crate::invite::{DOOR_ADDRESSES_MAX, Door};

/// The most doors that one charter names: two of each institution of a large federation's first thirty. Members tell of
/// all others.
pub const CHARTER_DOORS_MAX: usize = 64;

/// The longest address of a door: a name of 253 letters and what stands around it.
pub const DOOR_ADDRESS_BYTES_MAX: usize = 320;

/// Doors are few, each is named once and has an address.
pub(super) fn check(doors: &[Door]) -> Result<(), CharterError> {
    let at_most = |what, count, limit| match count > limit {
        true => Err(CharterError::TooMany { what, count, limit }),
        false => Ok(()),
    };
    at_most("doors", doors.len(), CHARTER_DOORS_MAX)?;
    let mut seen = BTreeSet::new();
    for door in doors {
        let addresses = door.control.len().max(door.data.len());
        at_most("addresses of a door", addresses, DOOR_ADDRESSES_MAX)?;
        for address in &door.control {
            at_most("bytes of address", address.len(), DOOR_ADDRESS_BYTES_MAX)?;
        }
        if door.control.is_empty() || !seen.insert(door.node) {
            return Err(CharterError::Door(door.node));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::charter::tests::{charter, key};
    use crate::charter::{Charter, Charters, SignedCharter};
    use crate::hash::NodeId;
    use alloc::string::{String, ToString};
    use alloc::vec;
    use alloc::vec::Vec;

    fn door(node: u8, addresses: usize) -> Door {
        Door {
            node: NodeId([node; 32]),
            control: vec!["/dns4/gateway.example.org/tcp/4001".to_string(); addresses],
            data: Vec::new(),
        }
    }

    fn with(doors: Vec<Door>) -> Charter {
        Charter {
            version: Charter::version_for(&doors),
            doors,
            ..charter()
        }
    }

    #[test]
    fn doors_are_signed_with_everything_else_and_amended_by_the_same_rule() {
        let mut first = SignedCharter::new(&charter());
        first.sign(&key(1));
        let mut charters = Charters::new(vec![first]).unwrap();
        let next = Charter {
            previous: Some(charters.hash()),
            ..with(vec![door(7, 2)])
        };
        let mut signed = SignedCharter::new(&next);
        assert!(matches!(
            charters.extend(signed.clone()),
            Err(CharterError::Unsigned { .. })
        ));
        signed.sign(&key(1));
        charters.extend(signed).unwrap();
        let read = Charters::from_bytes(&charters.to_bytes()).unwrap();
        assert_eq!(read.current().doors, [door(7, 2)]);
        assert_eq!(read.federation(), charters.federation());
    }

    #[test]
    fn a_charter_without_doors_is_written_as_it_always_was() {
        let charter = with(Vec::new());
        let fields = (
            (charter.version, &charter.name, charter.previous, &charter.founders),
            (charter.threshold, &charter.institutions, &charter.models),
            (&charter.policies, charter.created),
        );
        assert_eq!(charter.to_bytes(), postcard::to_allocvec(&fields).unwrap());
    }

    #[test]
    fn doors_without_number_address_or_end_are_refused() {
        let long = Door {
            control: vec![String::from_utf8(vec![b'a'; DOOR_ADDRESS_BYTES_MAX + 1]).unwrap()],
            ..door(1, 0)
        };
        let many = (0..=CHARTER_DOORS_MAX).map(|node| door(node as u8, 1)).collect();
        for wrong in [
            vec![door(1, 0)],
            vec![door(1, 1), door(1, 1)],
            vec![door(1, DOOR_ADDRESSES_MAX + 1)],
            vec![long],
            many,
        ] {
            let signed = SignedCharter::new(&with(wrong));
            let error = signed.charter().unwrap_err();
            assert!(
                matches!(error, CharterError::Door(_) | CharterError::TooMany { .. }),
                "{error}"
            );
        }
    }
}
