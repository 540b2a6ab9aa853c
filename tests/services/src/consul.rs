//! A real Consul: one server agent, whose data lasts from one start to the next.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{Process, directory, free_ports, write};
use crate::program;
use crate::tls::Identity;

/// The token that may do everything, where there are ACLs. ([`ConsulOptions::acl`]).
pub const MASTER_TOKEN: &str = "5ec12e70-0000-4000-8000-00000000a11e";
/// The token that may hold leases below [`Acl::key_prefix`] alone.
pub const LIMITED_TOKEN: &str = "5ec12e70-0000-4000-8000-00000000c0de";

/// What a Consul is started with.
#[derive(Clone, Debug)]
pub struct ConsulOptions {
    /// The address that it listens on; the default is 127.0.0.1.
    pub bind: IpAddr,
    /// With ACLs: requests without a token may do nothing.
    pub acl: Option<Acl>,
    /// Also serves `https` ([`Consul::https`]) with this certificate, to clients that show one of
    /// the same authority.
    pub tls: Option<Identity>,
}

/// What [`LIMITED_TOKEN`] may do beside making sessions.
#[derive(Clone, Debug)]
pub struct Acl {
    /// The beginning of the keys that it may read and write.
    pub key_prefix: String,
    /// The catalog node that it may register and make sessions on, if there is one.
    pub node: Option<String>,
}

impl Default for ConsulOptions {
    fn default() -> Self {
        Self {
            bind: Ipv4Addr::LOCALHOST.into(),
            acl: None,
            tls: None,
        }
    }
}

/// A server agent of Consul, the only one of its datacenter. It ends when this is dropped.
pub struct Consul {
    process: Process,
    http: SocketAddr,
    https: SocketAddr,
    _dir: TempDir,
}

impl Consul {
    /// Starts a Consul on 127.0.0.1, and returns when it has a leader.
    pub fn start() -> Self {
        Self::start_with(ConsulOptions::default())
    }

    /// Starts a Consul, and returns when it has a leader.
    pub fn start_with(options: ConsulOptions) -> Self {
        let dir = directory("consul");
        let [http, https, serf_lan, serf_wan, server] = free_ports(options.bind);
        let config = dir.path().join("config.hcl");
        write(&config, &configuration(&options, https));
        let data = dir.path().join("data");
        let mut args = vec![
            "agent".into(),
            "-server".into(),
            "-bootstrap-expect=1".into(),
        ];
        let mut flag = |name: &str, value: &str| args.push(format!("-{name}={value}").into());
        let bind = options.bind.to_string();
        flag("node", "tenure-test");
        flag("bind", &bind);
        flag("client", &bind);
        flag("http-port", &http.to_string());
        flag("serf-lan-port", &serf_lan.to_string());
        flag("serf-wan-port", &serf_wan.to_string());
        flag("server-port", &server.to_string());
        flag("dns-port", "-1");
        flag("grpc-port", "-1");
        for (name, path) in [("data-dir", &data), ("config-file", &config)] {
            let mut arg = std::ffi::OsString::from(format!("-{name}="));
            arg.push(path);
            args.push(arg);
        }
        let process = Process::start(program("consul"), args, dir.path().join("log"));
        let consul = Self {
            process,
            http: SocketAddr::new(options.bind, http),
            https: SocketAddr::new(options.bind, https),
            _dir: dir,
        };
        consul.wait();
        if let Some(acl) = &options.acl {
            consul.set_up_acl(acl);
        }
        consul
    }

    /// Where it serves `http`.
    pub fn address(&self) -> SocketAddr {
        self.http
    }

    /// The same as a URL, without a token.
    pub fn url(&self) -> String {
        format!("http://{}", self.http)
    }

    /// Where it serves `https`, if it was started with a certificate.
    pub fn https(&self) -> SocketAddr {
        self.https
    }

    /// Returns when it has a leader that has confirmed a read.
    pub fn wait(&self) {
        self.process.wait_until(|| {
            let status = self.try_request("GET", "/v1/kv/ready?consistent", "")?;
            match status.0 {
                // There is no such key.
                404 | 200 => Ok(()),
                _ => Err(format!("{} {}", status.0, status.1)),
            }
        });
    }

    /// Kills it (SIGKILL). What it has stored is kept.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Starts it again on the same ports, and returns when it has a leader.
    pub fn start_again(&self) {
        self.process.start_again();
        self.wait();
    }

    /// Stops it in its tracks (SIGSTOP).
    pub fn pause(&self) {
        self.process.pause();
    }

    /// Lets it go on after [`Consul::pause`].
    pub fn resume(&self) {
        self.process.resume();
    }

    /// Sends a request as the one who may do everything; gives the answer's status and body.
    /// Panics if there is none.
    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        self.try_request(method, path, body)
            .unwrap_or_else(|e| panic!("{method} {path} of Consul: {e}"))
    }

    fn try_request(&self, method: &str, path: &str, body: &str) -> Result<(u16, String), String> {
        let ask = || {
            let mut connection = TcpStream::connect_timeout(&self.http, Duration::from_secs(5))?;
            connection.set_read_timeout(Some(Duration::from_secs(10)))?;
            // HTTP/1.0: the answer ends with the connection.
            let length = body.len();
            write!(
                connection,
                "{method} {path} HTTP/1.0\r\nX-Consul-Token: {MASTER_TOKEN}\r\nContent-Length: {length}\r\n\r\n{body}"
            )?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().map_err(|e: std::io::Error| e.to_string())?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok((status.ok_or("no HTTP status")?, body.to_owned()))
    }

    fn set_up_acl(&self, acl: &Acl) {
        let prefix = &acl.key_prefix;
        let mut rules = format!(r#"key_prefix "{prefix}" {{ policy = "write" }} "#);
        rules += r#"session_prefix "" { policy = "write" } "#;
        if let Some(node) = &acl.node {
            rules += &format!(r#"node "{node}" {{ policy = "write" }}"#);
        }
        let rules = rules.replace('"', "\\\"");
        let policy = format!(r#"{{"Name":"limited","Rules":"{rules}"}}"#);
        let token =
            format!(r#"{{"SecretID":"{LIMITED_TOKEN}","Policies":[{{"Name":"limited"}}]}}"#);
        for (path, body) in [("/v1/acl/policy", policy), ("/v1/acl/token", token)] {
            // The new leader sets ACLs up after it has begun to serve.
            let made = (0..100).find_map(|_| {
                let (status, answer) = self.request("PUT", path, &body);
                if status != 200 {
                    thread::sleep(Duration::from_millis(100));
                }
                (status == 200).then_some(answer)
            });
            assert!(made.is_some(), "Consul does not take {path}: {body}");
        }
    }
}

/// What has no flag of its own.
fn configuration(options: &ConsulOptions, https: u16) -> String {
    let mut config = String::from(
        "performance { raft_multiplier = 1 }\ndisable_update_check = true\nleave_on_terminate = false\n",
    );
    if options.acl.is_some() {
        config += &format!(
            "acl {{ enabled = true default_policy = \"deny\" tokens {{ master = \"{MASTER_TOKEN}\" agent = \"{MASTER_TOKEN}\" }} }}\n"
        );
    }
    if let Some(tls) = &options.tls {
        config += &format!(
            "ports {{ https = {https} }}\nca_file = {:?}\ncert_file = {:?}\nkey_file = {:?}\nverify_incoming_https = true\n",
            tls.ca, tls.cert, tls.key
        );
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_data_lasts() {
        let consul = Consul::start();
        assert_eq!(consul.request("PUT", "/v1/kv/a", "x"), (200, "true".into()));
        consul.kill();
        consul.start_again();
        assert_eq!(consul.request("GET", "/v1/kv/a?raw", ""), (200, "x".into()));
    }

    #[test]
    fn its_tokens_limit() {
        let acl = Acl {
            key_prefix: "mine/".into(),
            node: None,
        };
        let consul = Consul::start_with(ConsulOptions {
            acl: Some(acl),
            ..ConsulOptions::default()
        });
        let put = |key: &str| {
            let path = format!("/v1/kv/{key}?token={LIMITED_TOKEN}");
            consul.request("PUT", &path, "x").0
        };
        // A token in the query goes before that of the header.
        assert_eq!((put("mine/a"), put("other")), (200, 403));
    }
}
