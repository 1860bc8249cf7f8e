//! Tries whether a data port answers: a handshake of QUIC, and nothing after it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use polder_protocol::hash::NodeId;
use quinn::{Endpoint, VarInt};

use super::error::DataError;
use super::plane::SERVER_NAME;
use super::settings::{Class, DataConfig};
use super::tls::Identity;

/// What one address gets.
const KNOCK_TIME_MAX: Duration = Duration::from_secs(5);

/// Shakes hands with `peer` at `address`, with a key of `seed`; says how long it took, or why not, for people.
pub(crate) async fn knock(seed: [u8; 32], peer: NodeId, address: SocketAddr) -> Result<Duration, String> {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let words = |error: DataError| error.to_string();
    let client = Identity::from_seed(seed).map_err(words)?;
    let client = client
        .client(&DataConfig::new(seed, any), peer, Class::Act)
        .map_err(words)?;
    let endpoint = Endpoint::client(any).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let dialling = endpoint.connect_with(client, address, SERVER_NAME);
    let dialling = dialling.map_err(|error| error.to_string())?;
    let connection = tokio::time::timeout(KNOCK_TIME_MAX, dialling)
        .await
        .map_err(|_| format!("no answer within {} s", KNOCK_TIME_MAX.as_secs()))?
        .map_err(|error| error.to_string())?;
    connection.close(VarInt::from_u32(0), b"only a knock");
    Ok(began.elapsed())
}
