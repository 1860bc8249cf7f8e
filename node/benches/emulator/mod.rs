//! A link between two network namespaces, for kernels without `tc netem`: a TUN device in each, and between them, each
//! way, a rate, a queue that drops at its end, seeded loss, and delay. Needs root; says why where it cannot be.
//!
//! One thread carries each way. It looks at its device at fixed times and takes all that waits, instead of waking for
//! each packet: at 1 Gbit/s with full packets that is twenty at a time, and no packet is later than [`LOOK_EVERY`].

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often each way is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(250);

/// What Ethernet adds to a packet that crosses a real link: header and checksum, preamble and gap.
const ETHERNET_BYTES: usize = 38;

/// The largest packet; a device says 1,500 and never hands out more.
const PACKET_BYTES_MAX: usize = 2048;

/// What one command that sets up a link may take.
const COMMAND_SECONDS_MAX: &str = "20";

/// Both addresses of a link.
pub(crate) const ADDRESSES: [&str; 2] = ["10.98.0.1", "10.98.0.2"];

/// What a link is like, each way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    pub(crate) megabits: f64,
    /// There and back, without a queue.
    pub(crate) round_trip: Duration,
    /// The longest queue; what comes then is dropped.
    pub(crate) queue: Duration,
    pub(crate) loss_per_mille: f64,
    /// Which packets are lost: the same for the same seed and the same order.
    pub(crate) seed: u64,
}

/// What happened to packets of one way.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) sent: AtomicU64,
    /// Lost at random.
    pub(crate) lost: AtomicU64,
    /// Dropped since the queue was full: overshoot.
    pub(crate) overflowed: AtomicU64,
}

/// The link. Dropping it removes its namespaces.
pub(crate) struct Link {
    pub(crate) namespaces: [String; 2],
    /// From the first namespace to the second, and back.
    pub(crate) counts: [Arc<Counts>; 2],
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Link {
    /// Makes the namespaces and the link between them.
    ///
    /// # Errors
    ///
    /// Why this machine cannot have one.
    pub(crate) fn new(path: Path) -> Result<Self, String> {
        static LINKS: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "polder-link-{}-{}",
            std::process::id(),
            LINKS.fetch_add(1, Ordering::Relaxed)
        );
        let mut link = Self {
            namespaces: [format!("{name}-a"), format!("{name}-b")],
            counts: Default::default(),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        let mut devices = Vec::new();
        for (place, namespace) in link.namespaces.iter().enumerate() {
            run(&format!("ip netns add {namespace}"))?;
            // Made here and then moved: the file stays this process's.
            let device = format!("pl{}-{place}", std::process::id());
            devices.push(tun(&device)?);
            let (own, other) = (ADDRESSES[place], ADDRESSES[1 - place]);
            run(&format!("ip link set {device} netns {namespace}"))?;
            run(&format!("ip -n {namespace} link set lo up"))?;
            run(&format!("ip -n {namespace} link set dev {device} name wire"))?;
            run(&format!("ip -n {namespace} addr add {own} peer {other} dev wire"))?;
            // Neighbours that are looked for over IPv6 would be counted too; a kernel without it needs nothing.
            let inside = format!("ip netns exec {namespace} sysctl -qw");
            run(&format!("{inside} net.ipv6.conf.wire.disable_ipv6=1")).ok();
            run(&format!(
                "ip -n {namespace} link set dev wire txqueuelen 20000 mtu 1500 up"
            ))?;
            // A TCP that may have as much under way as the link holds; the default is for short paths.
            let inside: Vec<&str> = inside.split(' ').collect();
            for setting in ["tcp_rmem=4096 131072 67108864", "tcp_wmem=4096 65536 67108864"] {
                finish(&[inside.as_slice(), &[&format!("net.ipv4.{setting}")]].concat())?;
            }
        }
        let other_ends = devices.iter().rev().map(File::try_clone).collect::<Result<Vec<_>, _>>();
        let other_ends = other_ends.map_err(|error| error.to_string())?;
        for ((source, sink), counts) in devices.into_iter().zip(other_ends).zip(&link.counts) {
            let way = Way::new(path, link.threads.len() as u64);
            let (stop, counts) = (link.stop.clone(), counts.clone());
            link.threads
                .push(std::thread::spawn(move || way.carry(source, sink, &counts, &stop)));
        }
        Ok(link)
    }

    /// Packets that never came onto the link, since a device's own queue was full: the machine was too slow, and
    /// figures are not the link's.
    pub(crate) fn missed(&self) -> u64 {
        let dropped = self.namespaces.iter().map(|namespace| {
            let counter = "/sys/class/net/wire/statistics/tx_dropped";
            let text = finish(&["ip", "netns", "exec", namespace, "cat", counter]).unwrap_or_default();
            text.trim().parse::<u64>().unwrap_or_default()
        });
        dropped.sum()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().ok();
        }
        for namespace in &self.namespaces {
            run(&format!("ip netns del {namespace}")).ok();
        }
    }
}

/// One direction.
struct Way {
    path: Path,
    dice: u64,
    // Packets on their way, in the order in which they arrive.
    flying: VecDeque<(Instant, Vec<u8>)>,
    // Buffers of packets that have arrived.
    spare: Vec<Vec<u8>>,
}

impl Way {
    fn new(path: Path, direction: u64) -> Self {
        Self {
            path,
            dice: path
                .seed
                .wrapping_mul(2)
                .wrapping_add(direction)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                | 1,
            flying: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    fn carry(mut self, mut source: File, mut sink: File, counts: &Counts, stop: &AtomicBool) {
        hurry();
        let mut free_at = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            while let Some((_, packet)) = self.flying.pop_front_if(|(at, _)| *at <= now) {
                // A full receiver loses it, as a network card does.
                sink.write_all(&packet).ok();
                self.spare.push(packet);
            }
            loop {
                let mut packet = self.spare.pop().unwrap_or_else(|| vec![0; PACKET_BYTES_MAX]);
                packet.resize(PACKET_BYTES_MAX, 0);
                match source.read(&mut packet) {
                    Ok(length) => packet.truncate(length),
                    Err(error) => {
                        self.spare.push(packet);
                        match error.kind() {
                            ErrorKind::Interrupted => continue,
                            // Nothing waits, or the device is down for a moment.
                            _ => break,
                        }
                    }
                }
                counts.sent.fetch_add(1, Ordering::Relaxed);
                free_at = free_at.max(now);
                if free_at - now > self.path.queue {
                    counts.overflowed.fetch_add(1, Ordering::Relaxed);
                    self.spare.push(packet);
                    continue;
                }
                let bits = (packet.len() + ETHERNET_BYTES) as f64 * 8.0;
                free_at += Duration::from_secs_f64(bits * 1e-6 / self.path.megabits);
                if self.unlucky() {
                    counts.lost.fetch_add(1, Ordering::Relaxed);
                    self.spare.push(packet);
                    continue;
                }
                self.flying.push_back((free_at + self.path.round_trip / 2, packet));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Whether the next packet is lost.
    fn unlucky(&mut self) -> bool {
        // Marsaglia's xorshift of 64 bits.
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        ((self.dice >> 33) % 1_000_000) as f64 <= self.path.loss_per_mille * 1e3 - 1.0
    }
}

/// Lets this thread run before others, so that the link and not the machine's load is measured; where that is not
/// allowed it goes without.
fn hurry() {
    let Ok(place) = std::fs::read_link("/proc/thread-self") else {
        return;
    };
    if let Some(thread) = place.file_name().and_then(|name| name.to_str()) {
        run(&format!("chrt -r -p 20 {thread}")).ok();
    }
}

fn tun(name: &str) -> Result<File, String> {
    const IFF_TUN_WITHOUT_HEADER: u16 = 0x1001;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options
        .open("/dev/net/tun")
        .map_err(|error| format!("/dev/net/tun: {error}"))?;
    // A `struct ifreq`: 16 bytes of name, then flags.
    let mut request = [0u8; 40];
    for (to, from) in request.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let flags = IFF_TUN_WITHOUT_HEADER.to_ne_bytes();
    (request[16], request[17]) = (flags[0], flags[1]);
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which has 40 bytes at most, and the file is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    match result {
        0 => Ok(file),
        _ => Err(format!("a TUN device: {}", std::io::Error::last_os_error())),
    }
}

fn run(words: &str) -> Result<(), String> {
    finish(&words.split_whitespace().collect::<Vec<_>>()).map(drop)
}

/// What a short command printed.
fn finish(words: &[&str]) -> Result<String, String> {
    let mut command = Command::new("timeout");
    let command = command.arg(COMMAND_SECONDS_MAX).args(words).stdin(Stdio::null());
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}
