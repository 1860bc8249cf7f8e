//! Real swarms on the loopback interface.

use std::io::Write;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libp2p::{gossipsub, identify, kad};
use polder_protocol::hash::InstitutionId;

use super::*;
use crate::gate::Refused;

/// Lets in whoever shows the right word.
struct Word(&'static str);

impl Gate for Word {
    fn credentials(&self) -> Vec<u8> {
        self.0.into()
    }

    fn admit(&self, peer: NodeId, credentials: &[u8]) -> Result<Admitted, Refused> {
        if credentials == self.0.as_bytes() {
            let institution = InstitutionId([1; 32]);
            return Ok(Admitted {
                node: peer,
                institution,
                capabilities: 63,
            });
        }
        let theirs = String::from_utf8_lossy(credentials);
        Err(Refused {
            reason: format!("node {} says `{theirs}`, not `{}`", peer.short(), self.0),
        })
    }
}

async fn node(seed: u8, word: &'static str, bootstrap: &[&ControlHandle]) -> ControlHandle {
    let mut config = ControlConfig::loopback([seed; 32]);
    config.data_addresses = vec![SocketAddr::from(([0, 0, 0, 0], 4000 + u16::from(seed)))];
    config.bootstrap = bootstrap
        .iter()
        .map(|peer| (peer.node(), peer.listen_addresses()))
        .collect();
    start(config, Arc::new(Word(word))).await.expect("started").0
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..400 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within 20 s: {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_find_each_other_through_one_of_them_and_hear_gossip() {
    let gateway = node(1, "dike", &[]).await;
    let second = node(2, "dike", &[&gateway]).await;
    let third = node(3, "dike", &[&gateway]).await;
    let mut heard = third.subscribe("news");
    until("all are present", || {
        [&gateway, &second, &third].iter().all(|node| node.present().len() == 2)
    })
    .await;
    let record = third
        .present()
        .into_iter()
        .find(|record| record.node == second.node())
        .expect("met");
    assert_eq!(record.data_addresses, [SocketAddr::from(([127, 0, 0, 1], 4002))]);
    for _ in 0..100 {
        if second.publish("news", b"high water".to_vec()).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let gossip = tokio::time::timeout(Duration::from_secs(10), heard.recv())
        .await
        .expect("in time")
        .expect("open");
    assert_eq!((gossip.from, gossip.bytes), (second.node(), b"high water".to_vec()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_answered_and_a_service_that_is_not_offered_is_named() {
    let (one, two) = (node(4, "dike", &[]).await, node(5, "dike", &[]).await);
    let mut asked = one.register(Service::Run);
    tokio::spawn(async move {
        while let Some(incoming) = asked.recv().await {
            let answer = [incoming.body.as_slice(), b"!"].concat();
            incoming.reply.send(answer).expect("awaited");
        }
    });
    two.dial(one.node(), &one.listen_addresses()).await.expect("met");
    assert_eq!(
        two.request(one.node(), Service::Run, b"pump".to_vec()).await,
        Ok(b"pump!".to_vec())
    );
    let refused = two.request(one.node(), Service::Blobs, Vec::new()).await;
    assert_eq!(
        refused,
        Err(ControlError::NoSuchService {
            node: one.node(),
            service: Service::Blobs
        })
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_hears_which_rule_turns_it_away() {
    let (one, stranger) = (node(6, "dike", &[]).await, node(7, "flood", &[]).await);
    let refused = stranger
        .request_at(one.node(), &one.listen_addresses(), Service::Run, Vec::new())
        .await;
    let Err(ControlError::RefusedBy { reason, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(reason.contains("says `flood`, not `dike`"), "{reason}");
    assert!(one.present().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_may_ask_to_be_enrolled_and_nothing_else() {
    let (gateway, newcomer) = (node(8, "dike", &[]).await, node(9, "", &[]).await);
    let mut asked = gateway.register(Service::Enrol);
    tokio::spawn(async move {
        while let Some(incoming) = asked.recv().await {
            assert_eq!(incoming.admitted, None);
            incoming.reply.send(b"welcome".to_vec()).expect("awaited");
        }
    });
    let addresses = gateway.listen_addresses();
    let answer = newcomer
        .request_at(gateway.node(), &addresses, Service::Enrol, b"token".to_vec())
        .await;
    assert_eq!(answer, Ok(b"welcome".to_vec()));
    let refused = newcomer
        .request_at(gateway.node(), &addresses, Service::Run, Vec::new())
        .await;
    assert!(refused.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_named() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = holder.local_addr().expect("bound").port();
    let mut config = ControlConfig::loopback([10; 32]);
    config.listen = vec![format!("/ip4/127.0.0.1/tcp/{port}")];
    let error = start(config, Arc::new(Word("dike")))
        .await
        .expect_err("in use")
        .to_string();
    assert!(error.contains(&port.to_string()) && error.contains("hint"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_both_ports_changes_nothing() {
    let one = node(11, "dike", &[]).await;
    let port = |kind: &str| -> u16 {
        let addresses = one.listen_addresses();
        let address = addresses
            .iter()
            .find(|address| address.contains(kind))
            .expect("listening");
        address.split('/').nth(4).expect("a port").parse().expect("a number")
    };
    let mut tcp = TcpStream::connect(("127.0.0.1", port("tcp"))).expect("connected");
    // The node may hang up at the first wrong byte.
    let _ = tcp.write_all(&[0xff; 100_000]);
    let udp = UdpSocket::bind("127.0.0.1:0").expect("bound");
    for length in 1..1200 {
        udp.send_to(&vec![0xc3; length], ("127.0.0.1", port("udp")))
            .expect("sent");
    }
    let two = node(12, "dike", &[&one]).await;
    until("a member is still met", || two.present().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_says_so() {
    let one = node(13, "dike", &[]).await;
    let two = node(14, "dike", &[&one]).await;
    until("met", || one.present().len() == 1).await;
    let mut events = one.events();
    two.shutdown().await;
    until("gone", || one.present().is_empty()).await;
    assert!(matches!(events.try_recv(), Ok(PeerEvent::Left { reason, .. }) if reason == "it has left"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_restarts_is_met_anew_before_its_old_connections_end() {
    let one = node(20, "dike", &[]).await;
    let (old, old_task) = start(to(21, &one), Arc::new(Word("dike"))).await.expect("started");
    until("met", || one.present().len() == 1).await;
    let mut events = one.events();
    // The first process stays, so that none of its connections ends: like one whose machine lost its network.
    let (_new, _) = start(to(21, &one), Arc::new(Word("dike"))).await.expect("started");
    let restarted = async {
        while !matches!(events.recv().await, Ok(PeerEvent::Left { reason, .. }) if reason == "it has restarted") {}
        while !matches!(events.recv().await, Ok(PeerEvent::Joined(_))) {}
    };
    tokio::time::timeout(Duration::from_secs(20), restarted)
        .await
        .expect("noticed");
    old_task.abort();
    drop(old);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_certificate_is_revoked_is_shown_the_door() {
    let revoked = Arc::new(AtomicBool::new(false));
    let gate = Arc::new(Until(Arc::clone(&revoked)));
    let (one, _) = start(ControlConfig::loopback([22; 32]), gate).await.expect("started");
    let two = node(23, "dike", &[&one]).await;
    until("met", || one.present().len() == 1).await;
    let mut events = two.events();
    revoked.store(true, Ordering::SeqCst);
    let refused = async {
        loop {
            if let Ok(PeerEvent::RefusedBy { reason, .. }) = events.recv().await {
                return reason;
            }
        }
    };
    let reason = tokio::time::timeout(Duration::from_secs(30), refused)
        .await
        .expect("told");
    assert!(reason.contains("revoked"), "{reason}");
    until("gone", || one.present().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_enter_neither_the_routing_table_nor_the_meshes() {
    let one = node(30, "dike", &[]).await;
    let _heard = one.subscribe("news");
    let two = node(31, "dike", &[&one]).await;
    let _heard_too = two.subscribe("news");
    until("met", || one.present().len() == 1).await;
    let (done, talked) = oneshot::channel();
    let task = tokio::spawn(stranger(one.listen_addresses(), done));
    tokio::time::timeout(Duration::from_secs(30), talked)
        .await
        .expect("in time")
        .expect("talked");
    for _ in 0..100 {
        if one.circles().await.gossip.contains(&two.node()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let circles = one.circles().await;
    assert_eq!(circles.table, [two.node()]);
    assert_eq!(circles.gossip, [two.node()]);
    task.abort();
}

/// Talks gossip, routing and identification to a node for three seconds, and shows no credentials. It must hear
/// neither gossip nor routes.
async fn stranger(addresses: Vec<String>, done: oneshot::Sender<()>) {
    #[derive(libp2p::swarm::NetworkBehaviour)]
    struct Talk {
        gossip: gossipsub::Behaviour,
        kad: kad::Behaviour<kad::store::MemoryStore>,
        identify: identify::Behaviour,
    }
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            Default::default(),
            libp2p::noise::Config::new,
            libp2p::yamux::Config::default,
        )
        .expect("transport")
        .with_behaviour(|key| {
            let peer = key.public().to_peer_id();
            let settings = kad::Config::new(libp2p::StreamProtocol::new("/polder/kad/1"));
            let signed = gossipsub::MessageAuthenticity::Signed(key.clone());
            Ok(Talk {
                gossip: gossipsub::Behaviour::new(signed, gossipsub::Config::default())?,
                kad: kad::Behaviour::with_config(peer, kad::store::MemoryStore::new(peer), settings),
                identify: identify::Behaviour::new(identify::Config::new("/polder/1".into(), key.public())),
            })
        })
        .expect("behaviour")
        .build();
    swarm.behaviour_mut().kad.set_mode(Some(kad::Mode::Server));
    let topic = gossipsub::IdentTopic::new("news");
    swarm.behaviour_mut().gossip.subscribe(&topic).expect("subscribed");
    swarm
        .listen_on("/ip4/127.0.0.1/tcp/0".parse().expect("address"))
        .expect("listening");
    let tcp = addresses
        .iter()
        .find(|address| address.contains("/tcp/"))
        .expect("listening");
    swarm
        .dial(tcp.parse::<libp2p::Multiaddr>().expect("address"))
        .expect("dialled");
    let mut done = Some(done);
    let mut ends = Box::pin(tokio::time::sleep(Duration::from_secs(20)));
    let mut met = false;
    loop {
        tokio::select! {
            () = &mut ends => {
                assert!(met, "it was never connected");
                if let Some(done) = done.take() {
                    let _ = done.send(());
                }
                ends.as_mut().reset(tokio::time::Instant::now() + Duration::from_secs(600));
            }
            event = futures::StreamExt::select_next_some(&mut swarm) => match event {
                libp2p::swarm::SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } => {
                    met = true;
                    let kad = &mut swarm.behaviour_mut().kad;
                    kad.add_address(&peer_id, endpoint.get_remote_address().clone());
                    kad.get_closest_peers(peer_id);
                    let record = kad::Record::new(b"key".to_vec(), b"poison".to_vec());
                    kad.put_record(record, kad::Quorum::One).expect("stored here");
                    ends.as_mut().reset(tokio::time::Instant::now() + Duration::from_secs(3));
                }
                libp2p::swarm::SwarmEvent::Behaviour(TalkEvent::Kad(kad::Event::OutboundQueryProgressed {
                    result: kad::QueryResult::PutRecord(Ok(_)),
                    ..
                })) => panic!("a stranger's record was taken"),
                _ => {
                    let _ = swarm.behaviour_mut().gossip.publish(topic.clone(), b"poison".to_vec());
                }
            },
        }
    }
}

/// Lets everybody in until they are revoked.
struct Until(Arc<AtomicBool>);

impl Gate for Until {
    fn credentials(&self) -> Vec<u8> {
        b"dike".to_vec()
    }

    fn admit(&self, peer: NodeId, credentials: &[u8]) -> Result<Admitted, Refused> {
        if self.0.load(Ordering::SeqCst) {
            let reason = format!("the certificate of node {} is revoked", peer.short());
            return Err(Refused { reason });
        }
        Word("dike").admit(peer, credentials)
    }
}

fn to(seed: u8, bootstrap: &ControlHandle) -> ControlConfig {
    let mut config = ControlConfig::loopback([seed; 32]);
    config.bootstrap = vec![(bootstrap.node(), bootstrap.listen_addresses())];
    config
}
