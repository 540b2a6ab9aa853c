//! A real etcd, of one member or of several.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use crate::process::{Process, directory, free_ports};
use crate::program;
use crate::tls::Identity;

/// The password of the user `root` where there is authentication ([`EtcdOptions::auth`]).
const ROOT_PASSWORD: &str = "root-secret";

/// What an etcd is started with.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// The address that it listens on. The default is 127.0.0.1.
    pub bind: IpAddr,
    /// With authentication: a user (other than `root`) and its password; it may read and write
    /// all keys that begin with [`EtcdOptions::prefix`].
    pub auth: Option<(String, String)>,
    /// The keys of the user of [`EtcdOptions::auth`]; the default, "", is all.
    pub prefix: String,
    /// Clients must speak TLS and show a certificate of the same authority; this is the server's
    /// own, which is for [`EtcdOptions::bind`].
    pub tls: Option<Identity>,
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            bind: Ipv4Addr::LOCALHOST.into(),
            auth: None,
            prefix: String::new(),
            tls: None,
        }
    }
}

/// A member of an etcd cluster, most often its only one. It ends when this is dropped.
pub struct Etcd {
    process: Process,
    options: EtcdOptions,
    address: SocketAddr,
    /// Whether authentication has been set up.
    authenticates: AtomicBool,
    _dir: TempDir,
}

impl Etcd {
    /// Starts an etcd of one member on 127.0.0.1, and returns when it serves.
    pub fn start() -> Self {
        Self::start_with(EtcdOptions::default())
    }

    /// Starts an etcd of one member, and returns when it serves.
    pub fn start_with(options: EtcdOptions) -> Self {
        let mut members = Self::cluster(1, options);
        members.pop().expect("a cluster of one member")
    }

    /// Starts a cluster of `size` members, and returns when all of them serve.
    pub fn cluster(size: usize, options: EtcdOptions) -> Vec<Self> {
        let ports: Vec<[u16; 2]> = (0..size).map(|_| free_ports(options.bind)).collect();
        let url_of = |port: u16| format!("http://{}", SocketAddr::new(options.bind, port));
        let peers = ports.iter().enumerate();
        let peers = peers.map(|(i, [_, port])| format!("member{i}={}", url_of(*port)));
        let peers = peers.collect::<Vec<_>>().join(",");
        let start = |(i, [client, port]): (usize, &[u16; 2])| {
            let address = SocketAddr::new(options.bind, *client);
            let name = format!("member{i}");
            let flags = [("name", name), ("initial-cluster", peers.clone())];
            let flags = flags.into_iter().chain([
                ("listen-peer-urls", url_of(*port)),
                ("initial-advertise-peer-urls", url_of(*port)),
            ]);
            Self::member(address, flags, options.clone())
        };
        let members: Vec<Self> = ports.iter().enumerate().map(start).collect();
        for member in &members {
            member.wait();
        }
        if let Some(first) = members.first()
            && let Some((user, password)) = &first.options.auth
        {
            first.set_up_authentication(user, password);
            for member in &members {
                member.authenticates.store(true, Ordering::Relaxed);
            }
        }
        members
    }

    fn member(
        address: SocketAddr,
        flags: impl IntoIterator<Item = (&'static str, String)>,
        options: EtcdOptions,
    ) -> Self {
        let dir = directory("etcd");
        let url = url(address, &options);
        let mut args: Vec<OsString> = Vec::new();
        let mut flag = |name: &str, value: OsString| {
            args.push(format!("--{name}").into());
            args.push(value);
        };
        for (name, value) in flags {
            flag(name, value.into());
        }
        flag("listen-client-urls", url.clone().into());
        flag("advertise-client-urls", url.into());
        flag("data-dir", dir.path().join("data").into());
        flag("logger", "zap".into());
        flag("log-outputs", "stderr".into());
        if let Some(tls) = &options.tls {
            flag("cert-file", tls.cert.clone().into());
            flag("key-file", tls.key.clone().into());
            flag("trusted-ca-file", tls.ca.clone().into());
            args.push("--client-cert-auth".into());
        }
        let process = Process::start(program("etcd"), args, dir.path().join("log"));
        Self {
            process,
            options,
            address,
            authenticates: AtomicBool::new(false),
            _dir: dir,
        }
    }

    fn set_up_authentication(&self, user: &str, password: &str) {
        let prefix = &self.options.prefix;
        let steps: [&[&str]; 8] = [
            &["user", "add", &format!("root:{ROOT_PASSWORD}")],
            &["role", "add", "root"],
            &["user", "grant-role", "root", "root"],
            &["user", "add", &format!("{user}:{password}")],
            &["role", "add", user],
            &[
                "role",
                "grant-permission",
                user,
                "readwrite",
                prefix,
                "--prefix",
            ],
            &["user", "grant-role", user, user],
            &["auth", "enable"],
        ];
        for step in steps {
            let done = self.etcdctl(false, step);
            done.unwrap_or_else(|e| panic!("etcdctl {step:?}: {e}"));
        }
    }

    /// The address that clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a URL: `http://…` or `https://…`.
    pub fn endpoint(&self) -> String {
        url(self.address, &self.options)
    }

    /// Runs `etcdctl` on this member, as the user `root` where there is authentication, and gives
    /// what it prints. Panics if it fails.
    pub fn ctl(&self, args: &[&str]) -> String {
        let output = self.etcdctl(self.authenticates.load(Ordering::Relaxed), args);
        output.unwrap_or_else(|e| panic!("etcdctl {args:?}: {e}"))
    }

    fn etcdctl(&self, as_root: bool, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new(program("etcdctl"));
        command.env("ETCDCTL_API", "3").args([
            "--endpoints",
            &self.endpoint(),
            "--command-timeout",
            "5s",
        ]);
        if as_root {
            command.args(["--user", &format!("root:{ROOT_PASSWORD}")]);
        }
        if let Some(tls) = &self.options.tls {
            command.arg("--cacert").arg(&tls.ca);
            command.arg("--cert").arg(&tls.cert);
            command.arg("--key").arg(&tls.key);
        }
        let output = command.args(args).output().map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns when it serves: a read that the cluster's majority has confirmed succeeds.
    pub fn wait(&self) {
        self.process.wait_until(|| {
            let as_root = self.authenticates.load(Ordering::Relaxed);
            self.etcdctl(as_root, &["endpoint", "health"]).map(drop)
        });
    }

    /// Kills it (SIGKILL). What it has stored is kept.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Starts it again on the same ports, with what it had stored, and returns when it serves.
    pub fn start_again(&self) {
        self.process.start_again();
        self.wait();
    }

    /// Stops it in its tracks (SIGSTOP): connections stay, nothing is answered.
    pub fn pause(&self) {
        self.process.pause();
    }

    /// Lets it go on after [`Etcd::pause`].
    pub fn resume(&self) {
        self.process.resume();
    }
}

fn url(address: SocketAddr, options: &EtcdOptions) -> String {
    let scheme = if options.tls.is_some() {
        "https"
    } else {
        "http"
    };
    format!("{scheme}://{address}")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;
    use crate::tls::Authority;

    #[test]
    fn it_keeps_its_data_and_its_address_when_it_is_killed_and_started_again() {
        let etcd = Etcd::start();
        let address = etcd.address();
        etcd.ctl(&["put", "key", "value"]);
        etcd.kill();
        let reached = std::net::TcpStream::connect(address);
        assert!(reached.is_err(), "killed, and still listening");
        etcd.start_again();
        assert_eq!(etcd.address(), address);
        assert_eq!(etcd.ctl(&["get", "key", "--print-value-only"]), "value\n");
    }

    #[test]
    fn a_paused_one_answers_only_when_it_is_resumed() {
        let etcd = Etcd::start();
        etcd.pause();
        let before = Instant::now();
        assert!(etcd.etcdctl(false, &["get", "key"]).is_err());
        assert!(before.elapsed().as_secs() >= 2, "failed before its time");
        etcd.resume();
        etcd.ctl(&["get", "key"]);
    }

    #[test]
    fn a_dropped_one_is_gone_with_its_directory() {
        let etcd = Etcd::start();
        let (address, dir) = (etcd.address(), etcd._dir.path().to_owned());
        etcd.pause();
        drop(etcd);
        assert!(std::net::TcpStream::connect(address).is_err());
        assert!(!dir.exists());
    }

    #[test]
    fn with_authentication_a_user_reaches_the_keys_of_its_prefix() {
        let etcd = Etcd::start_with(EtcdOptions {
            auth: Some(("tenure".into(), "secret".into())),
            prefix: "tenure/".into(),
            ..EtcdOptions::default()
        });
        let put = |user: &str, key: &str| etcd.etcdctl(false, &["--user", user, "put", key, "x"]);
        put("tenure:secret", "tenure/a").expect("the user's own key");
        assert!(put("tenure:secret", "other").is_err());
        assert!(put("tenure:wrong", "tenure/a").is_err());
        assert!(etcd.etcdctl(false, &["get", "tenure/a"]).is_err());
        etcd.kill();
        etcd.start_again();
        assert!(etcd.ctl(&["get", "tenure/a"]).contains('x'));
    }

    #[test]
    fn with_tls_only_clients_with_a_certificate_are_served() {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::new(dir.path());
        let mut etcd = Etcd::start_with(EtcdOptions {
            tls: Some(authority.issue("server", &[Ipv4Addr::LOCALHOST.into()])),
            ..EtcdOptions::default()
        });
        etcd.ctl(&["put", "key", "value"]);
        let elsewhere = dir.path().join("other");
        fs::create_dir(&elsewhere).expect("a directory");
        let other = Authority::new(&elsewhere);
        let mut stranger = other.issue("client", &[]);
        stranger.ca = authority.ca().to_owned();
        etcd.options.tls = Some(stranger);
        assert!(etcd.etcdctl(false, &["get", "key"]).is_err());
    }

    #[test]
    fn a_cluster_of_three_outlives_any_one_member() {
        let members = Etcd::cluster(3, EtcdOptions::default());
        members[0].ctl(&["put", "key", "value"]);
        for member in &members {
            member.kill();
            let other = members.iter().find(|m| m.address() != member.address());
            let other = other.expect("another member");
            other.wait();
            assert!(other.ctl(&["get", "key"]).contains("value"));
            member.start_again();
        }
    }
}
