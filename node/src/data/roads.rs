//! The socket under the endpoint: UDP, and beside it tunnels through which the same packets travel where UDP does not.
//!
//! A tunnel is a stream that the control plane opened, and has an address of its own among those that IPv4 reserves
//! (240.0.0.0/4), so that QUIC takes it for one more way to the peer: its handshake, its keys and its congestion control
//! run from end to end, and whoever relays the stream sees nothing.

use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use polder_protocol::hash::NodeId;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::sync::mpsc;

use crate::control::Path;

/// Packets that wait for one tunnel: 370 KiB. More are dropped, as a router does, and QUIC slows down.
const OUTBOX_MAX: usize = 256;

/// Packets out of all tunnels that wait for the endpoint.
const INBOX_MAX: usize = 2048;

/// Tunnels at a time, over all peers.
const TUNNELS_MAX: usize = 256;

/// Tunnels with one peer: two connections, dialled from both ends, and as many again while they are replaced.
const TUNNELS_PER_PEER_MAX: usize = 8;

/// What is written to a tunnel at once.
const BURST_BYTES: usize = 32 << 10;

/// No tunnel carries nothing for so long: the connection inside keeps itself alive every few seconds.
const SILENCE_MAX: std::time::Duration = std::time::Duration::from_secs(30);

/// The bit of a tunnel's number that says that it goes through no gateway.
const STRAIGHT: u32 = 0x0800_0000;

/// UDP and the tunnels.
pub(super) struct Roads {
    udp: Arc<dyn AsyncUdpSocket>,
    over_ipv6: bool,
    tunnels: Mutex<BTreeMap<u32, (NodeId, mpsc::Sender<Bytes>)>>,
    next: AtomicU32,
    arrivals: mpsc::Sender<(SocketAddr, Bytes)>,
    inbox: Mutex<mpsc::Receiver<(SocketAddr, Bytes)>>,
    /// Which is looked at first alternates, so that neither starves the other.
    tunnels_first: AtomicBool,
}

/// One end of a new tunnel.
#[derive(Debug)]
pub(super) struct Tunnel {
    /// Where the endpoint finds it.
    pub(super) address: SocketAddr,
    outbox: mpsc::Receiver<Bytes>,
}

impl std::fmt::Debug for Roads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roads").field("udp", &self.udp).finish_non_exhaustive()
    }
}

/// Whether an address is that of a tunnel.
pub(super) fn is_tunnel(address: SocketAddr) -> bool {
    number_of(address).is_some()
}

/// Whether an address is that of a tunnel that goes through no gateway.
pub(super) fn is_straight_tunnel(address: SocketAddr) -> bool {
    number_of(address).is_some_and(|number| number & STRAIGHT != 0)
}

fn number_of(address: SocketAddr) -> Option<u32> {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) if ip.octets()[0] >= 240 && !ip.is_broadcast() => Some(ip.to_bits() & 0x0fff_ffff),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    }
}

impl Roads {
    pub(super) fn new(udp: Arc<dyn AsyncUdpSocket>) -> io::Result<Self> {
        let over_ipv6 = udp.local_addr()?.is_ipv6();
        let (arrivals, inbox) = mpsc::channel(INBOX_MAX);
        Ok(Self {
            udp,
            over_ipv6,
            tunnels: Mutex::default(),
            next: AtomicU32::new(1),
            arrivals,
            inbox: Mutex::new(inbox),
            tunnels_first: AtomicBool::new(false),
        })
    }

    /// Enters a new tunnel, `over` a straight connection of the control plane or a relayed one; `None` where there are
    /// too many.
    pub(super) fn open(&self, peer: NodeId, over: Path) -> Option<Tunnel> {
        let mut tunnels = self.tunnels();
        let own = tunnels.values().filter(|(other, _)| *other == peer).count();
        if tunnels.len() >= TUNNELS_MAX || own >= TUNNELS_PER_PEER_MAX {
            return None;
        }
        // Below the broadcast address. After 2^26 tunnels the numbers begin again, and the first have long ended.
        let number = self.next.fetch_add(1, Ordering::Relaxed) & 0x03ff_ffff;
        let number = if over == Path::Direct {
            number | STRAIGHT
        } else {
            number
        };
        let (sender, outbox) = mpsc::channel(OUTBOX_MAX);
        tunnels.insert(number, (peer, sender));
        let ip = Ipv4Addr::from_bits(0xf000_0000 | number);
        let ip = if self.over_ipv6 {
            IpAddr::V6(ip.to_ipv6_mapped())
        } else {
            IpAddr::V4(ip)
        };
        let address = SocketAddr::new(ip, 1);
        Some(Tunnel { address, outbox })
    }

    /// Closes a tunnel; for other addresses it does nothing.
    pub(super) fn close(&self, address: SocketAddr) {
        if let Some(number) = number_of(address) {
            self.tunnels().remove(&number);
        }
    }

    /// Carries packets between the endpoint and a stream until either end closes it. Whatever comes is a packet of a
    /// stranger until QUIC has opened it.
    pub(super) async fn carry<S: AsyncRead + AsyncWrite + Send>(&self, tunnel: Tunnel, stream: S) {
        let Tunnel { address, mut outbox } = tunnel;
        let (mut reader, mut writer) = stream.split();
        let read = async {
            loop {
                let packet = tokio::time::timeout(SILENCE_MAX, read_packet(&mut reader)).await;
                let Ok(Ok(packet)) = packet else { return };
                // A full inbox loses it, as a full socket buffer does.
                let _ = self.arrivals.try_send((address, packet));
            }
        };
        let write = async {
            let mut burst = Vec::with_capacity(BURST_BYTES + (64 << 10));
            while let Some(packet) = outbox.recv().await {
                append(&mut burst, &packet);
                while burst.len() < BURST_BYTES
                    && let Ok(packet) = outbox.try_recv()
                {
                    append(&mut burst, &packet);
                }
                if writer.write_all(&burst).await.is_err() || writer.flush().await.is_err() {
                    return;
                }
                burst.clear();
            }
            // The other side learns at once.
            let _ = writer.close().await;
        };
        tokio::select! {
            () = read => {}
            () = write => {}
        }
        self.close(address);
    }

    fn tunnels(&self) -> MutexGuard<'_, BTreeMap<u32, (NodeId, mpsc::Sender<Bytes>)>> {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll_tunnels(&self, context: &mut Context, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<usize> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta) {
            loop {
                match inbox.poll_recv(context) {
                    Poll::Ready(Some((address, packet))) => {
                        // Longer than any packet that was announced: not ours.
                        let Some(room) = buf.get_mut(..packet.len()) else {
                            continue;
                        };
                        room.copy_from_slice(&packet);
                        *meta = RecvMeta {
                            addr: address,
                            len: packet.len(),
                            stride: packet.len(),
                            ecn: None,
                            dst_ip: None,
                        };
                        count += 1;
                        break;
                    }
                    // The sender lives as long as this.
                    Poll::Ready(None) | Poll::Pending if count == 0 => return Poll::Pending,
                    Poll::Ready(None) | Poll::Pending => return Poll::Ready(count),
                }
            }
        }
        Poll::Ready(count)
    }
}

impl AsyncUdpSocket for Roads {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.udp).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        let Some(number) = number_of(transmit.destination) else {
            return self.udp.try_send(transmit);
        };
        // A tunnel that has ended loses packets, until the connection notices.
        let Some((_, outbox)) = self.tunnels().get(&number).cloned() else {
            return Ok(());
        };
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for packet in transmit.contents.chunks(size) {
            let _ = outbox.try_send(Bytes::copy_from_slice(packet));
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let tunnels_first = self.tunnels_first.fetch_xor(true, Ordering::Relaxed);
        if tunnels_first && let Poll::Ready(count) = self.poll_tunnels(context, bufs, meta) {
            return Poll::Ready(Ok(count));
        }
        match self.udp.poll_recv(context, bufs, meta) {
            Poll::Pending if !tunnels_first => self.poll_tunnels(context, bufs, meta).map(Ok),
            polled => polled,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.udp.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.udp.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.udp.may_fragment()
    }
}

pub(super) fn append(burst: &mut Vec<u8>, packet: &[u8]) {
    // QUIC packets are below 64 KiB, as UDP is.
    if let Ok(length) = u16::try_from(packet.len()) {
        burst.extend_from_slice(&length.to_le_bytes());
        burst.extend_from_slice(packet);
    }
}

pub(super) async fn read_packet<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<Bytes> {
    let mut length = [0; 2];
    reader.read_exact(&mut length).await?;
    let mut packet = vec![0; usize::from(u16::from_le_bytes(length))];
    reader.read_exact(&mut packet).await?;
    Ok(packet.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use futures::io::Cursor;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packets_survive_a_burst(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..1_500), 0..8)) {
            let mut burst = Vec::new();
            packets.iter().for_each(|packet| append(&mut burst, packet));
            let mut reader = Cursor::new(burst);
            for packet in &packets {
                let read = block_on(read_packet(&mut reader)).unwrap();
                prop_assert_eq!(read.as_ref(), packet.as_slice());
            }
            prop_assert!(block_on(read_packet(&mut reader)).is_err());
        }

        #[test]
        fn any_stream_ends_in_packets_and_an_error(bytes: Vec<u8>) {
            let length = bytes.len();
            let mut reader = Cursor::new(bytes);
            let mut read = 0;
            while let Ok(packet) = block_on(read_packet(&mut reader)) {
                read += packet.len() + 2;
            }
            prop_assert!(read <= length);
        }
    }
}
