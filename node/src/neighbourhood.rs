//! Who shares a fate on the network: addresses that one party can have many of for the price of one.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// Addresses that count as one: whoever has one of them can have them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Neighbourhood {
    /// The first 24 bits of an IPv4 address: the smallest network that is announced on the internet.
    V4([u8; 3]),
    /// The first 48 bits of an IPv6 address: what a site gets.
    V6([u8; 6]),
    /// Behind a relay, which hides the address.
    Relayed,
}

impl Neighbourhood {
    /// That of an address; `None` stands for a peer behind a relay.
    pub(crate) fn of(ip: Option<IpAddr>) -> Self {
        match ip.map(|ip| ip.to_canonical()) {
            Some(IpAddr::V4(ip)) => {
                let [first, second, third, _] = ip.octets();
                Self::V4([first, second, third])
            }
            Some(IpAddr::V6(ip)) => {
                let [a, b, c, d, e, f, ..] = ip.octets();
                Self::V6([a, b, c, d, e, f])
            }
            None => Self::Relayed,
        }
    }
}

/// How many of something each neighbourhood has. It holds no more neighbourhoods than there are things.
#[derive(Debug, Default)]
pub(crate) struct Census(BTreeMap<Neighbourhood, usize>);

impl Census {
    /// Counts one more, unless the neighbourhood has `share_max` already.
    pub(crate) fn enter(&mut self, neighbourhood: Neighbourhood, share_max: usize) -> bool {
        let count = self.0.entry(neighbourhood).or_default();
        if *count >= share_max {
            return false;
        }
        *count += 1;
        true
    }

    /// Counts one less.
    pub(crate) fn leave(&mut self, neighbourhood: Neighbourhood) {
        if let Some(count) = self.0.get_mut(&neighbourhood) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.0.remove(&neighbourhood);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_of_one_network_are_neighbours() {
        let of = |ip: &str| Neighbourhood::of(Some(ip.parse().expect("an address")));
        assert_eq!(of("192.0.2.1"), of("192.0.2.254"));
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.7"));
        assert_ne!(of("192.0.2.1"), of("192.0.3.1"));
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:ffff::9"));
        assert_ne!(of("2001:db8:1::1"), of("2001:db8:2::1"));
        assert_eq!(Neighbourhood::of(None), Neighbourhood::Relayed);
    }

    proptest! {
        #[test]
        fn no_neighbourhood_ever_has_more_than_its_share(steps in prop::collection::vec((0u8..4, any::<bool>()), 0..200)) {
            let mut census = Census::default();
            let mut inside = [0usize; 4];
            for (network, comes) in steps {
                let neighbourhood = Neighbourhood::of(Some(IpAddr::from([10, 0, network, 1])));
                let here = &mut inside[usize::from(network)];
                if comes {
                    let entered = census.enter(neighbourhood, 5);
                    prop_assert_eq!(entered, *here < 5);
                    *here += usize::from(entered);
                } else if *here > 0 {
                    census.leave(neighbourhood);
                    *here -= 1;
                }
            }
            prop_assert_eq!(census.0.values().sum::<usize>(), inside.iter().sum::<usize>());
            prop_assert!(census.0.values().all(|count| *count > 0));
        }
    }
}
