//! Asks a router over UPnP.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use igd_next::aio::Gateway;
use igd_next::aio::tokio::{Tokio, search_gateway};
use igd_next::{AddPortError, PortMappingProtocol, SearchOptions};

use super::{Carries, LEASE, Opened, Port};

/// What routers get to answer the search. They may wait for up to three seconds before they do.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(5);

/// What one request may take.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(5);

/// How a router's own list of ports names ours.
const DESCRIPTION: &str = "polder";

/// A router that speaks UPnP.
#[derive(Debug)]
pub(crate) struct Device {
    gateway: Gateway<Tokio>,
    own: Ipv4Addr,
    pub(super) external: Ipv4Addr,
}

impl Device {
    /// Looks for the router at `router`; the error is for people.
    pub(super) async fn find(own: Ipv4Addr, router: Ipv4Addr) -> Result<Self, String> {
        let options = SearchOptions {
            bind_addr: (own, 0).into(),
            timeout: Some(SEARCH_TIME_MAX),
            single_search_timeout: Some(SEARCH_TIME_MAX),
            ..SearchOptions::default()
        };
        let gateway = search_gateway(options)
            .await
            .map_err(|error| format!("no router answers UPnP ({error})"))?;
        if gateway.addr.ip() != IpAddr::V4(router) {
            // Anybody on this network may answer a search.
            return Err(format!(
                "{} answers UPnP, and is not the router {router}",
                gateway.addr.ip()
            ));
        }
        let told = within(gateway.get_external_ip()).await?;
        match told.map_err(|error| format!("the router tells no address outside over UPnP ({error})"))? {
            IpAddr::V4(external) => Ok(Self { gateway, own, external }),
            IpAddr::V6(external) => Err(format!("the router's address outside is {external}, not one of IPv4")),
        }
    }

    /// Asks for a port, or for more time with it: the same number outside, else any.
    pub(super) async fn open(&self, port: Port) -> Result<Opened, String> {
        let (protocol, inside) = (protocol(port), SocketAddr::from((self.own, port.number)));
        let seconds = u32::try_from(LEASE.as_secs()).unwrap_or(u32::MAX);
        let add = |seconds| {
            self.gateway
                .add_port(protocol, port.number, inside, seconds, DESCRIPTION)
        };
        let number = match within(add(seconds)).await? {
            Ok(()) => port.number,
            // Such a router keeps it until it is taken back or starts anew.
            Err(AddPortError::OnlyPermanentLeasesSupported) => {
                let added = within(add(0)).await?;
                added.map_err(refused)?;
                port.number
            }
            Err(AddPortError::PortInUse) => {
                let any = self.gateway.add_any_port(protocol, inside, seconds, DESCRIPTION);
                within(any).await?.map_err(refused)?
            }
            Err(error) => return Err(refused(error)),
        };
        Ok(Opened {
            port,
            external: (self.external, number).into(),
        })
    }

    /// Gives a port back.
    pub(super) async fn close(&self, opened: Opened) -> Result<(), String> {
        let removed = self.gateway.remove_port(protocol(opened.port), opened.external.port());
        within(removed).await?.map_err(refused)
    }
}

async fn within<T>(request: impl Future<Output = T>) -> Result<T, String> {
    let late = |_| {
        format!(
            "the router does not answer UPnP within {} s",
            REQUEST_TIME_MAX.as_secs()
        )
    };
    tokio::time::timeout(REQUEST_TIME_MAX, request).await.map_err(late)
}

fn refused(error: impl std::fmt::Display) -> String {
    format!("the router refuses over UPnP: {error}")
}

fn protocol(port: Port) -> PortMappingProtocol {
    match port.carries {
        Carries::Tcp => PortMappingProtocol::TCP,
        Carries::Udp => PortMappingProtocol::UDP,
    }
}
