//! TLS bound to the node's ed25519 key, and what else of the endpoint follows from it.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use polder_protocol::hash::NodeId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{ClientConfig, ConnectionId, ConnectionIdGenerator, EndpointConfig, ServerConfig};
use rustls::pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};

use super::error::DataError;
use super::settings::{ALPN, Class, DataConfig, SOCKET_BUFFER_BYTES, transport};

/// The node's key, in the form that the TLS library takes.
#[derive(Clone)]
pub(super) struct Identity {
    keypair: Keypair,
    /// The public key.
    pub(super) node: NodeId,
}

impl Identity {
    pub(super) fn from_seed(seed: [u8; 32]) -> Result<Self, DataError> {
        let keypair = Keypair::ed25519_from_bytes(seed).map_err(|error| no_certificate(&error))?;
        let public = keypair
            .public()
            .try_into_ed25519()
            .map_err(|error| no_certificate(&error))?;
        let node = NodeId(public.to_bytes());
        Ok(Self { keypair, node })
    }

    /// How this node answers.
    pub(super) fn server(&self, config: &DataConfig) -> Result<ServerConfig, DataError> {
        let mut tls = libp2p_tls::make_server_config(&self.keypair).map_err(|error| no_certificate(&error))?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // libp2p-tls obeys SSLKEYLOGFILE; a node's environment must not give its traffic away.
        tls.key_log = Arc::new(rustls::NoKeyLog);
        let crypto = QuicServerConfig::try_from(tls).map_err(|error| no_certificate(&error))?;
        let mut server = ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(transport(config, None));
        Ok(server)
    }

    /// How this node dials `peer`, and nobody else: another key fails inside the TLS handshake.
    pub(super) fn client(&self, config: &DataConfig, peer: NodeId, class: Class) -> Result<ClientConfig, DataError> {
        let mut tls = libp2p_tls::make_client_config(&self.keypair, Some(peer_id(peer)?))
            .map_err(|error| no_certificate(&error))?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        tls.key_log = Arc::new(rustls::NoKeyLog);
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| no_certificate(&error))?;
        let mut client = ClientConfig::new(Arc::new(crypto));
        client.transport_config(transport(config, Some(class)));
        Ok(client)
    }
}

/// The endpoint's own settings. Reset tokens and connection ids follow from the seed, so that a node that was killed
/// and started again can tell its peers at once that their connections are gone.
pub(super) fn endpoint(seed: &[u8; 32]) -> EndpointConfig {
    let key = blake3::derive_key("polder data plane stateless reset v1", seed);
    let mut config = EndpointConfig::new(Arc::new(ResetKey(key)));
    config.cid_generator(move || Box::new(KeyedConnectionIds(key)));
    config
}

/// Binds the UDP socket with large kernel buffers.
///
/// `[::]` means both families; on a machine without IPv6 it means IPv4.
pub(super) fn bind(address: SocketAddr) -> Result<UdpSocket, DataError> {
    let attempt = |address: SocketAddr| -> std::io::Result<UdpSocket> {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() && address.ip().is_unspecified() {
            socket.set_only_v6(false)?;
        }
        // Smaller buffers cost throughput and nothing else.
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES).ok();
        socket.set_send_buffer_size(SOCKET_BUFFER_BYTES).ok();
        if socket.recv_buffer_size()? < SOCKET_BUFFER_BYTES / 2 {
            tracing::info!(
                remedy = "sysctl -w net.core.rmem_max=8388608 net.core.wmem_max=8388608",
                "small UDP buffers"
            );
        }
        socket.bind(&address.into())?;
        Ok(socket.into())
    };
    let bound = match attempt(address) {
        Err(error) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && error.kind() != ErrorKind::AddrInUse => {
            attempt(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        bound => bound,
    };
    bound.map_err(|error| DataError::Listen {
        address,
        reason: error.to_string(),
    })
}

/// Who is at the other end: the key that signed the peer's certificate.
pub(super) fn peer_of(connection: &quinn::Connection) -> Option<NodeId> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    let certificate = libp2p_tls::certificate::parse(chain.first()?).ok()?;
    // An ed25519 peer id is the key itself behind two bytes: "identity hash", length.
    let id = certificate.peer_id().to_bytes();
    let public = PublicKey::try_decode_protobuf(id.get(2..)?).ok()?;
    Some(NodeId(public.try_into_ed25519().ok()?.to_bytes()))
}

fn peer_id(node: NodeId) -> Result<PeerId, DataError> {
    let public = ed25519::PublicKey::try_from_bytes(&node.0).map_err(|_| DataError::Malformed {
        peer: node,
        what: "an id that is no ed25519 key".to_owned(),
    })?;
    Ok(PublicKey::from(public).to_peer_id())
}

fn no_certificate(error: &dyn std::error::Error) -> DataError {
    DataError::Certificate {
        reason: error.to_string(),
    }
}

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        let hash = blake3::keyed_hash(&self.0, data);
        for (out, byte) in signature_out.iter_mut().zip(hash.as_bytes()) {
            *out = *byte;
        }
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let signature: [u8; 32] = signature.try_into().map_err(|_| CryptoError)?;
        // blake3 compares hashes in constant time.
        match blake3::keyed_hash(&self.0, data) == blake3::Hash::from_bytes(signature) {
            true => Ok(()),
            false => Err(CryptoError),
        }
    }
}

/// Eight bytes: four random ones, and four that only the holder of the key could add.
struct KeyedConnectionIds([u8; 32]);

impl KeyedConnectionIds {
    fn seal(&self, nonce: [u8; 4]) -> [u8; 4] {
        let [a, b, c, d, ..] = *blake3::keyed_hash(&self.0, &nonce).as_bytes();
        [a, b, c, d]
    }
}

impl ConnectionIdGenerator for KeyedConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let nonce = getrandom::u32().unwrap_or_default().to_le_bytes();
        let [a, b, c, d] = nonce;
        let [e, f, g, h] = self.seal(nonce);
        ConnectionId::new(&[a, b, c, d, e, f, g, h])
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}
