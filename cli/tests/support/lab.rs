//! A laboratory of networks: one bridge for the world, and sites behind it as campuses and homes have them, each in
//! network namespaces of its own. Needs root; a machine that cannot have it says why.
//!
//! The routers drop what nobody inside asked for, as real ones do: one that let it in would note a flow before its host
//! sends, map the host to another port, and so spoil every punch.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// What one command that sets up a network may take.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(20);

/// The first three numbers of the world's addresses. Radio amateurs keep them for tests. Those that are set apart for
/// documentation will not do: routers know that nobody can be reached there.
pub(crate) const WORLD: &str = "44.128.0";

/// What all names begin with, followed by the process that made them.
const PREFIX: &str = "polder-lab-";

/// What stands between a host and the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// Nothing: a public address of each family.
    Open,
    /// A router that keeps the port of a host.
    Cone,
    /// A router that takes another port for every peer.
    Symmetric,
    /// As `Symmetric`, and opens ports when it is asked in NAT-PMP or PCP.
    NatPmp,
    /// As `Symmetric`, and opens ports when it is asked over UPnP.
    Upnp,
    /// As `Cone`, and UDP does not pass.
    UdpBlocked,
    /// Nothing passes; a proxy on 3128 opens tunnels to port 443.
    ProxyOnly,
    /// A public address of IPv6 and none of IPv4.
    Ipv6Only,
}

/// One host.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Its namespace.
    pub(crate) namespace: String,
    /// The router's namespace, where there is one.
    pub(crate) router: Option<String>,
    /// Tells it from the others, and is the last number of its addresses.
    pub(crate) number: u8,
}

/// The laboratory. Dropping it removes everything, also after a panic.
#[derive(Debug)]
pub(crate) struct Lab {
    prefix: String,
    namespaces: Vec<String>,
    helpers: Vec<Child>,
    hosts: u8,
    /// Settings of helpers.
    folder: tempfile::TempDir,
}

impl Lab {
    /// Makes the world, or says why this machine cannot have one.
    pub(crate) fn new() -> Result<Self, String> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let mut lab = Self {
            prefix: format!("{PREFIX}{}-{number}-", std::process::id()),
            namespaces: Vec::new(),
            helpers: Vec::new(),
            hosts: 0,
            folder: tempfile::tempdir().map_err(|error| error.to_string())?,
        };
        try_run("nft", &["--version"])?;
        let world = lab.namespace("world")?;
        for command in ["link add br0 type bridge", "link set br0 up"] {
            ip_in(&world, command)?;
        }
        Ok(lab)
    }

    /// Adds a host behind `site`.
    pub(crate) fn host(&mut self, name: &str, site: Site) -> Host {
        self.try_host(name, site)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn try_host(&mut self, name: &str, site: Site) -> Result<Host, String> {
        self.hosts += 1;
        let number = self.hosts;
        let namespace = self.namespace(name)?;
        let router = match site {
            Site::Open | Site::Ipv6Only => None,
            Site::Cone | Site::Symmetric | Site::NatPmp | Site::Upnp | Site::UdpBlocked | Site::ProxyOnly => {
                Some(self.namespace(&format!("{name}-router"))?)
            }
        };
        let outer = router.as_ref().unwrap_or(&namespace);
        self.attach(outer, number)?;
        if site != Site::Ipv6Only {
            ip_in(outer, &format!("addr add {WORLD}.{number}/24 dev wan"))?;
        }
        if router.is_none() {
            ip_in(outer, &format!("addr add 2001:db8::{number}/64 dev wan nodad"))?;
        }
        if let Some(router) = &router {
            run(
                "ip",
                &format!("link add lan netns {router} type veth peer name eth0 netns {namespace}"),
            )?;
            ip_in(router, &format!("addr add 192.168.{number}.1/24 dev lan"))?;
            ip_in(router, "link set lan up")?;
            ip_in(&namespace, &format!("addr add 192.168.{number}.2/24 dev eth0"))?;
            ip_in(&namespace, "link set eth0 up")?;
            ip_in(&namespace, &format!("route add default via 192.168.{number}.1"))?;
            within(router, "sysctl", &["-qw", "net.ipv4.ip_forward=1"])?;
            feed(router, "nft", &["-f", "-"], &rules(site))?;
            if matches!(site, Site::NatPmp | Site::Upnp) {
                self.opener(router, site, number)?;
            }
        }
        Ok(Host {
            namespace,
            router,
            number,
        })
    }

    /// Starts a helper in the router of a host: this test program again, as the test `name` with `variable` set.
    pub(crate) fn helper(&mut self, host: &Host, name: &str, variable: (&str, &str)) {
        let router = host.router.as_ref().expect("a site with a router");
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", router])
            .arg(program)
            .args([name, "--exact", "--ignored", "--nocapture"]);
        // The helper ends when its standard input does, at the latest with this process.
        command
            .env(variable.0, variable.1)
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        self.helpers.push(command.spawn().unwrap());
    }

    /// Whether a program is here, which a test needs; the error says how it may come here.
    pub(crate) fn has_program(name: &str) -> Result<(), String> {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        let here = std::env::split_paths(&folders)
            .chain([PathBuf::from("/usr/sbin")])
            .any(|folder| folder.join(name).exists());
        here.then_some(())
            .ok_or_else(|| format!("there is no {name} (on Debian: apt-get install {name}-nftables)"))
    }

    /// Starts what opens ports on request in a router.
    fn opener(&mut self, router: &str, site: Site, number: u8) -> Result<(), String> {
        let folder = self.folder.path();
        let settings = folder.join(format!("miniupnpd-{number}.conf"));
        let answers = |wanted: Site| if site == wanted { "yes" } else { "no" };
        let lines = format!(
            "ext_ifname=wan\nlistening_ip=lan\nport=0\nenable_natpmp={}\nenable_upnp={}\nsecure_mode=yes\n\
             min_lifetime=120\nmax_lifetime=86400\nuuid=5c2b5b3e-0000-4000-8000-{number:012}\n\
             upnp_table_name=opened\nupnp_nat_table_name=opened\nupnp_forward_chain=passing\n\
             upnp_nat_chain=entering\nupnp_nat_postrouting_chain=leaving\n\
             allow 1024-65535 192.168.{number}.0/24 1024-65535\n",
            answers(Site::NatPmp),
            answers(Site::Upnp),
        );
        std::fs::write(&settings, lines).map_err(|error| error.to_string())?;
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", router, "miniupnpd", "-d", "-f"])
            .arg(&settings);
        command
            .arg("-P")
            .arg(folder.join(format!("miniupnpd-{number}.pid")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.helpers.push(command.spawn().map_err(|error| error.to_string())?);
        Ok(())
    }

    fn namespace(&mut self, name: &str) -> Result<String, String> {
        let name = format!("{}{name}", self.prefix);
        run("ip", &format!("netns add {name}"))?;
        self.namespaces.push(name.clone());
        ip_in(&name, "link set lo up")?;
        Ok(name)
    }

    /// A cable named `wan` from a namespace to the bridge.
    fn attach(&self, namespace: &str, number: u8) -> Result<(), String> {
        let world = format!("{}world", self.prefix);
        run(
            "ip",
            &format!("link add port{number} netns {world} type veth peer name wan netns {namespace}"),
        )?;
        ip_in(&world, &format!("link set port{number} master br0 up"))?;
        ip_in(namespace, "link set wan up")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for helper in &mut self.helpers {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        for namespace in &self.namespaces {
            let _ = run("ip", &format!("netns del {namespace}"));
        }
    }
}

impl Host {
    /// The rules by which the host's router leads ports from outside to it.
    pub(crate) fn opened(&self) -> Vec<String> {
        let router = self.router.as_ref().expect("a site with a router");
        let arguments = ["netns", "exec", router, "nft", "list", "ruleset"];
        let output = try_run("ip", &arguments).unwrap_or_else(|error| panic!("{error}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let rules = text.lines().filter(|line| line.contains("dnat ip to"));
        rules.map(|line| line.trim().to_owned()).collect()
    }

    /// Runs `ip` with these words in the host's namespace.
    pub(crate) fn ip(&self, words: &str) {
        ip_in(&self.namespace, words).unwrap_or_else(|error| panic!("ip {words}: {error}"));
    }
}

/// Removes what laboratories of processes that are gone have left.
fn sweep() {
    let Ok(output) = try_run("ip", &["netns", "list"]) else {
        return;
    };
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !std::path::Path::new("/proc").join(process).exists()) {
            let _ = run("ip", &format!("netns del {name}"));
        }
    }
}

fn rules(site: Site) -> String {
    let masquerade = match site {
        Site::Symmetric | Site::NatPmp | Site::Upnp => "masquerade fully-random",
        _ => "masquerade",
    };
    let first = match site {
        Site::UdpBlocked => "iifname \"lan\" meta l4proto udp drop",
        Site::ProxyOnly => "drop",
        _ => "",
    };
    format!(
        "table ip nat {{
            chain leaving {{ type nat hook postrouting priority 100; policy accept;
                oifname \"wan\" {masquerade}
            }}
        }}
        table ip filter {{
            chain arriving {{ type filter hook input priority 0; policy drop;
                iifname \"lo\" accept
                ct state established,related accept
                iifname \"lan\" accept
            }}
            chain passing {{ type filter hook forward priority 0; policy drop;
                {first}
                iifname \"lan\" oifname \"wan\" accept
                ct status dnat accept
                ct state established,related accept
            }}
        }}
        table inet opened {{
            chain passing {{ }}
            chain entering {{ }}
            chain leaving {{ }}
            chain before_entering {{ type nat hook prerouting priority -100; policy accept;
                jump entering
            }}
        }}
        "
    )
}

fn ip_in(namespace: &str, words: &str) -> Result<(), String> {
    run("ip", &format!("-n {namespace} {words}"))
}

fn within(namespace: &str, program: &str, arguments: &[&str]) -> Result<(), String> {
    try_run("ip", &[&["netns", "exec", namespace, program], arguments].concat()).map(drop)
}

fn run(program: &str, words: &str) -> Result<(), String> {
    try_run(program, &words.split_whitespace().collect::<Vec<_>>()).map(drop)
}

fn try_run(program: &str, arguments: &[&str]) -> Result<Output, String> {
    finish(program, Command::new(program).args(arguments), "")
}

fn feed(namespace: &str, program: &str, arguments: &[&str], input: &str) -> Result<(), String> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace, program]).args(arguments);
    finish(program, &mut command, input).map(drop)
}

fn finish(program: &str, command: &mut Command, input: &str) -> Result<Output, String> {
    let piped = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = piped
        .spawn()
        .map_err(|error| format!("`{program}` cannot be run: {error}"))?;
    let mut stdin = child.stdin.take().expect("piped");
    stdin
        .write_all(input.as_bytes())
        .map_err(|error| format!("{program}: {error}"))?;
    drop(stdin);
    let process = child.id();
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    let output = match end.recv_timeout(COMMAND_TIME_MAX) {
        Ok(output) => output.map_err(|error| format!("{program}: {error}"))?,
        Err(_) => {
            let _ = Command::new("kill").args(["-KILL", &process.to_string()]).status();
            return Err(format!("`{program}` does not end"));
        }
    };
    match output.status.success() {
        true => Ok(output),
        false => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}
