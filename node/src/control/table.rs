//! Who may enter the routing table: members only, and few of one network or one institution in each bucket.
//!
//! A bucket that one party fills answers every question about its part of the key space, so no party may fill one.

use polder_protocol::hash::InstitutionId;

use crate::neighbourhood::Neighbourhood;

/// Members of one /24 or /48 in a bucket of twenty. Addresses of private networks are not counted: who has them is of
/// this network, and a whole campus may be.
const NEIGHBOURS_MAX: usize = 2;

/// Members of one institution in a bucket of twenty: four institutions can fill it. An eighth would leave the tables of
/// small federations empty.
const COLLEAGUES_MAX: usize = 5;

/// What counts of a member: where it is seen, if that is public, and who certified it.
pub(super) type Origin = (Option<Neighbourhood>, InstitutionId);

/// Whether one more of `origin` may enter a bucket that holds these.
pub(super) fn has_room(bucket: &[Origin], origin: &Origin) -> bool {
    let (neighbourhood, institution) = origin;
    let neighbours = bucket
        .iter()
        .filter(|(other, _)| other.is_some() && other == neighbourhood)
        .count();
    let colleagues = bucket.iter().filter(|(_, other)| other == institution).count();
    neighbours < NEIGHBOURS_MAX && colleagues < COLLEAGUES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_network_and_no_institution_fills_a_bucket() {
        let of = |network: u8, institution: u8| {
            let ip = std::net::IpAddr::from([192, 0, network, 1]);
            (Some(Neighbourhood::of(Some(ip))), InstitutionId([institution; 32]))
        };
        let mut bucket = vec![of(1, 1), of(1, 2)];
        assert!(!has_room(&bucket, &of(1, 3)));
        assert!(has_room(&bucket, &of(2, 3)));
        bucket.extend((10..15).map(|network| of(network, 9)));
        assert!(!has_room(&bucket, &of(20, 9)));
        assert!(has_room(&bucket, &(None, InstitutionId([8; 32]))));
    }

    #[test]
    fn a_private_network_is_bound_by_its_institutions_alone() {
        let at_home = |institution: u8| (None, InstitutionId([institution; 32]));
        let bucket: Vec<Origin> = (0..12).map(|n| at_home(n / 4)).collect();
        assert!(has_room(&bucket, &at_home(2)));
        assert!(!has_room(&[bucket, vec![at_home(2)]].concat(), &at_home(2)));
    }
}
