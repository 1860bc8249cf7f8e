//! What works between this machine and a federation before it belongs to one: for `polder doctor` without a node. Nobody
//! is told anything but keys, and nothing changes.

mod gateway;
mod surroundings;
mod target;

use std::path::Path;
use std::time::Duration;

use futures::future::join_all;

use super::doctor::{Finding, Health, disk, graphics};
use super::{Config, ConfigError};
use gateway::gateway;
use surroundings::{clock, hub, ipv6, named_proxy, names, router, web};

pub use target::Target;

/// What a name, or a host of the web, gets to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// Looks at this machine, its network, and the way to `targets`. It takes a few seconds.
///
/// # Errors
///
/// A configuration that cannot be used.
pub async fn examine_ahead(config: &Config, home: &Path, targets: &[Target]) -> Result<Vec<Finding>, ConfigError> {
    let proxy = config.proxy().map_err(|error| ConfigError::Malformed {
        path: home.join("config.toml"),
        reason: error.to_string(),
    })?;
    let roots = config.roots()?;
    let hub = hub();
    let gateways = join_all(targets.iter().map(|target| gateway(target, proxy.clone(), &roots)));
    let (gateways, names, web, router, clock, disk) = tokio::join!(
        gateways,
        names(targets, &hub),
        web(&hub, proxy.as_ref()),
        router(config),
        clock(&hub),
        disk(home),
    );
    let mut findings: Vec<Finding> = gateways.into_iter().flatten().collect();
    if targets.is_empty() {
        let words = "not tried: name one with --gateway ADDR, or your invite with --invite LINE";
        findings.push(Finding::new("gateway", Health::Fair, words));
    }
    findings.extend([
        named_proxy(proxy.as_ref()).await,
        web,
        names,
        router,
        ipv6(),
        clock,
        disk,
        graphics(),
    ]);
    Ok(findings)
}
