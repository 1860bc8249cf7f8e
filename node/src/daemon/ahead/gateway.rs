//! Tries the ways to a gateway, and says what came of each.

use std::time::Duration;

use futures::future::join_all;
use polder_protocol::hash::NodeId;

use super::super::doctor::{Finding, Health};
use super::ANSWER_TIME_MAX;
use super::target::{ADDRESSES_MAX, Address, CONTROL_PORT, DATA_PORT, Target, Way};
use crate::control::{Knocked, Proxy, knock};
use crate::data;
use crate::home::random_32;

/// Tries every way to a gateway.
pub(super) async fn gateway(
    target: &Target,
    proxy: Option<Proxy>,
    roots: &[rustls::pki_types::CertificateDer<'static>],
) -> Vec<Finding> {
    let Ok(seed) = random_32() else {
        return vec![Finding::new(
            "gateway",
            Health::Bad,
            "this system has no random numbers",
        )];
    };
    let tries = target.control.iter().map(|address| {
        let proxy = proxy.clone();
        async move {
            let knocked = knock(seed, proxy, roots, target.node, &address.text).await;
            (address, knocked)
        }
    });
    let tried = join_all(tries).await;
    let answered = tried.iter().find_map(|(_, knocked)| knocked.as_ref().ok());
    let mut findings = vec![verdict(target, &tried)];
    for way in Way::ALL {
        let of_way = tried.iter().filter(|(address, _)| Way::of(&address.text) == way);
        findings.extend(way_found(
            way,
            &of_way.collect::<Vec<_>>(),
            answered.is_some(),
            &target.host,
        ));
    }
    if let Some(known) = target.node.or(answered.map(|knocked| knocked.node)) {
        let mut data = data_found(seed, known, target, answered.is_some()).await;
        // The line for QUIC asks for this port too.
        if let Some(data) = &mut data
            && findings
                .iter()
                .any(|finding| finding.what == Way::Quic.name() && finding.ask.is_some())
        {
            data.ask = None;
        }
        findings.extend(data);
    }
    findings
}

type Tried<'a> = (&'a Address, Result<Knocked, String>);

fn verdict(target: &Target, tried: &[Tried<'_>]) -> Finding {
    let mut ways: Vec<Way> = tried
        .iter()
        .filter(|(_, knocked)| knocked.is_ok())
        .map(|(address, _)| Way::of(&address.text))
        .collect();
    ways.sort();
    ways.dedup();
    let host = &target.host;
    let node = tried.iter().find_map(|(_, knocked)| knocked.as_ref().ok());
    match node {
        Some(knocked) => {
            let ways = ways.iter().map(|way| way.name()).collect::<Vec<_>>().join(", ");
            let words = format!("{host} is node {} and can be reached by {ways}", knocked.node.short());
            Finding::new("gateway", Health::Good, words)
        }
        None => Finding::new("gateway", Health::Bad, format!("{host} cannot be reached in any way")).ask(format!(
            "Please allow outgoing TCP from this machine to {host} port {CONTROL_PORT} or 443, or tell us the address of \
             the HTTP proxy."
        )),
    }
}

fn way_found(way: Way, tried: &[&Tried<'_>], reached: bool, host: &str) -> Option<Finding> {
    let best = tried
        .iter()
        .filter_map(|(address, knocked)| Some((address, knocked.as_ref().ok()?)));
    if let Some((address, knocked)) = best.min_by_key(|(_, knocked)| knocked.after) {
        let words = format!("{} answers after {:.1} ms", address.text, millis(knocked.after));
        return Some(Finding::new(way.name(), Health::Good, words));
    }
    let told = tried.iter().find(|(address, _)| address.told);
    let (address, Err(reason)) = told.or_else(|| tried.first())? else {
        return None;
    };
    let health = if reached { Health::Fair } else { Health::Bad };
    let words = format!("{} does not answer: {reason}", address.text);
    let finding = Finding::new(way.name(), health, words);
    Some(match way {
        Way::Quic => finding.ask(format!(
            "Please allow outgoing UDP from this machine to {host} ports {CONTROL_PORT} and {DATA_PORT}, with answers (a \
             stateful rule)."
        )),
        // Where another way leads there, nothing is missing.
        Way::Tcp | Way::WebSocket => finding,
    })
}

/// Tries the data port, which has UDP alone.
async fn data_found(seed: [u8; 32], node: NodeId, target: &Target, reached: bool) -> Option<Finding> {
    let mut addresses = target.data.clone();
    if addresses.is_empty()
        && let Ok(Ok(found)) = tokio::time::timeout(
            ANSWER_TIME_MAX,
            tokio::net::lookup_host((target.host.as_str(), DATA_PORT)),
        )
        .await
    {
        addresses.extend(found);
    }
    addresses.truncate(ADDRESSES_MAX);
    let tries = addresses
        .iter()
        .map(|address| async move { (address, data::knock(seed, node, *address).await) });
    let tried = join_all(tries).await;
    let best = tried
        .iter()
        .filter_map(|(address, took)| Some((address, took.as_ref().ok()?)));
    if let Some((address, took)) = best.min_by_key(|(_, took)| **took) {
        let words = format!("UDP {address} answers after {:.1} ms", millis(*took));
        return Some(Finding::new("data", Health::Good, words));
    }
    let (address, Err(reason)) = tried.first()? else {
        return None;
    };
    let after = if reached {
        "; data goes inside TCP, which works and is slower"
    } else {
        ""
    };
    let finding = Finding::new(
        "data",
        Health::Fair,
        format!("UDP {address} does not answer: {reason}{after}"),
    );
    Some(finding.ask(format!(
        "Please allow outgoing UDP from this machine to {} port {}, with answers (a stateful rule).",
        address.ip(),
        address.port()
    )))
}

fn millis(span: Duration) -> f64 {
    span.as_secs_f64() * 1000.0
}
