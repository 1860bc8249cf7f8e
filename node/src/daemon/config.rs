//! The node's configuration: `config.toml` in its folder. Every key has a unit, a default and a reason; an unknown key
//! is refused, since a misspelled limit is no limit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use polder_protocol::hash::NodeId;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::caps::{CapClock, CapWindow};
use crate::contribute::Contribute;
use crate::control::{Proxy, ProxyError, is_multiaddress};

/// Where a node listens, what it may use, what it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the network interface to listen on. All of them by default, IPv6 and IPv4: peers must reach us.
    pub listen: IpAddr,
    /// TCP and UDP port of the control plane; 0 takes any free one. 4001 by default, as other libp2p programs.
    pub control_port: u16,
    /// UDP port of the data plane; 0 takes any free one. 4002 by default, beside the control plane's.
    pub data_port: u16,
    /// Address of the local HTTP interface. Loopback by default: it is for this machine's people.
    pub api: SocketAddr,
    /// Addresses at which others reach us, as multiaddrs, where we cannot know them (behind a port mapping).
    pub external: Vec<String>,
    /// Data-plane addresses at which others reach us, in place of what the interfaces say.
    pub external_data: Vec<SocketAddr>,
    /// Further multiaddrs to listen on, such as `/ip4/0.0.0.0/tcp/443/ws` on a gateway: most firewalls let port 443 out.
    pub listen_also: Vec<String>,
    /// The HTTP proxy through which TCP leaves for public addresses, as `http://[user:password@]host:port`. Empty
    /// takes the one in `HTTPS_PROXY`; `none` takes none.
    pub proxy: String,
    /// A PEM file of root certificates that are trusted for `/wss` addresses beside those of browsers: where the campus has
    /// its own. Who answers is proved by its key in any case.
    pub tls_roots: PathBuf,
    /// Members to begin with beside those of the invite and of the last time, as `NODE@MULTIADDR`. Names are looked up anew
    /// at each dial, so a gateway may move.
    pub bootstrap: Vec<String>,
    /// Find members on the local network by multicast DNS.
    pub mdns: bool,
    /// Ask the router before this machine to open the node's ports (NAT-PMP, PCP, UPnP), so that others reach it straight.
    /// A router that is not meant to do so refuses.
    #[serde(alias = "upnp")]
    pub map_ports: bool,
    /// The most bytes per second that leave this node as blobs, to everybody together; 0 is no limit.
    pub upload_bytes_per_second: u64,
    /// The same, to the members of one institution.
    pub upload_bytes_per_second_to_each_institution: u64,
    /// The most bytes per second that this node relays as a gateway, all circuits together; 0 is no limit.
    pub relay_bytes_per_second: u64,
    /// The same, of what the members of one institution send.
    pub relay_bytes_per_second_of_each_institution: u64,
    /// The same, of what one member sends.
    pub relay_bytes_per_second_of_each_member: u64,
    /// The same, in each direction of one circuit.
    pub relay_bytes_per_second_of_each_circuit: u64,
    /// By which clock `cap_windows` are read: `local` or `utc`.
    pub cap_clock: CapClock,
    /// Other caps at some times; the first window that holds decides.
    pub cap_windows: Vec<CapWindow>,
    /// `auto`, `cpu` or `wgpu`.
    pub device: String,
    /// Threads of the worker on a CPU; 0 takes one per core.
    pub threads: u32,
    /// Take part in training runs.
    pub train: bool,
    /// Serve stages of published models.
    pub serve: bool,
    /// The most blocks of a model to hold, for training or serving; 0 is no limit. A node that cannot hold a whole
    /// model becomes a stage of a chain.
    pub blocks_max: u32,
    /// The longest context of one served session, in tokens; each reserves its KV cache in full.
    pub context_tokens_max: u32,
    /// Sessions served at once.
    pub sessions_max: u32,
    /// When this node may work.
    pub contribute: Contribute,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            control_port: 4001,
            data_port: 4002,
            api: SocketAddr::from((Ipv4Addr::LOCALHOST, 8399)),
            external: Vec::new(),
            external_data: Vec::new(),
            listen_also: Vec::new(),
            proxy: String::new(),
            tls_roots: PathBuf::new(),
            bootstrap: Vec::new(),
            mdns: true,
            map_ports: true,
            upload_bytes_per_second: 0,
            upload_bytes_per_second_to_each_institution: 0,
            relay_bytes_per_second: 0,
            relay_bytes_per_second_of_each_institution: 0,
            relay_bytes_per_second_of_each_member: 0,
            relay_bytes_per_second_of_each_circuit: 0,
            cap_clock: CapClock::Local,
            cap_windows: Vec::new(),
            device: "auto".into(),
            threads: 0,
            train: true,
            serve: true,
            blocks_max: 0,
            context_tokens_max: 4096,
            sessions_max: 8,
            contribute: Contribute::default(),
        }
    }
}

/// Reads `NODE@MULTIADDR`, as `bootstrap` and the doors of a charter are written.
pub fn member_at(text: &str) -> Option<(NodeId, String)> {
    let (node, address) = text.split_once('@')?;
    is_multiaddress(address).then_some(())?;
    Some((node.parse().ok()?, address.to_owned()))
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file is there and cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `tls_roots` names what is no file of certificates.
    #[error("`tls_roots` in config.toml names {path}, which cannot be used: {reason}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The file is not what it should be.
    #[error("{path} is not a configuration: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, key and reason, in the parser's words.
        reason: String,
    },
}

impl Config {
    /// Nodes of [`Self::bootstrap`], each with its addresses.
    ///
    /// # Errors
    ///
    /// The entry that is none.
    pub fn bootstrap(&self) -> Result<Vec<(NodeId, Vec<String>)>, String> {
        let read = |entry: &String| member_at(entry).map(|(node, address)| (node, vec![address]));
        self.bootstrap
            .iter()
            .map(|entry| read(entry).ok_or_else(|| entry.clone()))
            .collect()
    }

    /// Reads `config.toml` in `home`; without the file everything has its default.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for an unreadable file, an unknown key, or a value of the wrong kind.
    pub fn load(home: &Path) -> Result<Self, ConfigError> {
        let path = home.join("config.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Malformed {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        if let Err(error) = config.proxy() {
            let reason = error.to_string();
            return Err(ConfigError::Malformed { path, reason });
        }
        match config.device.as_str() {
            "auto" | "cpu" | "wgpu" => Ok(config),
            other => Err(ConfigError::Malformed {
                path,
                reason: format!("device = \"{other}\" is none of \"auto\", \"cpu\", \"wgpu\""),
            }),
        }
    }
}

impl Config {
    /// The certificates in [`Self::tls_roots`]; none without the file's name.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for a file that cannot be read, or holds no certificate.
    pub fn roots(&self) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
        let path = &self.tls_roots;
        if path.as_os_str().is_empty() {
            return Ok(Vec::new());
        }
        let malformed = |reason: String| ConfigError::Roots {
            path: path.clone(),
            reason,
        };
        let found = CertificateDer::pem_file_iter(path).map_err(|error| malformed(error.to_string()))?;
        let roots: Result<Vec<_>, _> = found.collect();
        let roots = roots.map_err(|error| malformed(error.to_string()))?;
        if roots.is_empty() {
            return Err(malformed("there is no certificate in it".to_owned()));
        }
        Ok(roots)
    }

    /// The proxy that is to be used, where there is one.
    ///
    /// # Errors
    ///
    /// [`ProxyError`] for text that is no proxy.
    pub fn proxy(&self) -> Result<Option<Proxy>, ProxyError> {
        match self.proxy.as_str() {
            "" => Ok(Proxy::of_the_environment()),
            "none" => Ok(None),
            text => text.parse().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_file_everything_has_its_default() {
        let home = tempfile::tempdir().expect("a folder");
        assert_eq!(Config::load(home.path()).expect("defaults"), Config::default());
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let home = tempfile::tempdir().expect("a folder");
        std::fs::write(home.path().join("config.toml"), "blocks_maximum = 3\n").expect("written");
        let error = Config::load(home.path()).expect_err("refused").to_string();
        assert!(error.contains("blocks_maximum"), "{error}");
    }

    #[test]
    fn a_device_that_does_not_exist_is_refused() {
        let home = tempfile::tempdir().expect("a folder");
        std::fs::write(home.path().join("config.toml"), "device = \"tpu\"\n").expect("written");
        assert!(
            Config::load(home.path())
                .expect_err("refused")
                .to_string()
                .contains("tpu")
        );
    }

    #[test]
    fn a_member_to_begin_with_is_a_node_and_an_address() {
        let of = |entry: String| Config {
            bootstrap: vec![entry],
            ..Config::default()
        };
        let node = NodeId([7; 32]);
        let good = of(format!("{node}@/dns4/gateway.example.org/tcp/4001"));
        assert_eq!(
            good.bootstrap(),
            Ok(vec![(node, vec!["/dns4/gateway.example.org/tcp/4001".into()])])
        );
        for wrong in [
            "/ip4/192.0.2.1/tcp/1".to_owned(),
            format!("{node}@example.org"),
            "x@/ip4/192.0.2.1/tcp/1".into(),
        ] {
            assert_eq!(of(wrong.clone()).bootstrap(), Err(wrong));
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let home = tempfile::tempdir().expect("a folder");
        let config = Config {
            blocks_max: 2,
            control_port: 0,
            ..Config::default()
        };
        std::fs::write(home.path().join("config.toml"), toml::to_string(&config).expect("text")).expect("written");
        assert_eq!(Config::load(home.path()).expect("read"), config);
    }
}
