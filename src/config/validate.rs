//! What the keys of a configuration must be together, and the defaults that hang on other keys.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use crate::store::check_database;

use super::ConfigError;
use super::model::{
    Config, ConsulConfig, EtcdConfig, LeaseKind, ProxyConfig, ProxyForward, TlsConfig,
};
use super::section::Source;

type Result<T> = std::result::Result<T, ConfigError>;

/// MB a second: more than any disk, and no overflow.
const MAX_SCRUB_RATE: u64 = 100_000;

/// Checks `c` and completes it. `source` knows where each key was.
pub fn complete(c: &mut Config, source: &Source) -> Result<()> {
    directories(c, source)?;
    if c.http.snapshot_timeout.is_zero() {
        c.http.snapshot_timeout = match c.data.retention {
            Duration::ZERO => Duration::from_secs(600),
            retention => retention,
        };
    }
    let Some((_, port)) = split_addr(&c.http.addr) else {
        return Err(bad_addr(source, "http.addr", &c.http.addr));
    };
    if !(1..=MAX_SCRUB_RATE).contains(&c.data.scrub_rate) {
        let problem = format!(
            "must be from 1 to {MAX_SCRUB_RATE} (MB a second); a scrub-interval of 0 is none"
        );
        return Err(source.invalid("data.scrub-rate", problem));
    }
    if c.tracing.max_size == 0 {
        return Err(source.invalid("tracing.max-size", "must be 1 (MB) or more"));
    }
    proxy(&c.proxy, source)?;
    lease(c, port, source)?;
    transport(c, source)
}

/// Splits `HOST:PORT`; an empty host is all interfaces, and one in brackets (`[::1]:20202`) comes
/// back without them. `None` if it is something else.
pub fn split_addr(addr: &str) -> Option<(&str, u16)> {
    let (host, port) = addr.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:%".contains(c);
    if !host.chars().all(plain) || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((host, port.parse().ok()?))
}

/// `path` from the root, with `.` and `..` resolved in its text (symbolic links are not followed).
pub fn absolute(path: &Path) -> io::Result<PathBuf> {
    let mut clean = PathBuf::new();
    for component in std::path::absolute(path)?.components() {
        match component {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    Ok(clean)
}

/// The machine's host name.
pub fn machine_name() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

fn bad_addr(source: &Source, key: &str, addr: &str) -> ConfigError {
    source.invalid(
        key,
        format!("must be HOST:PORT or :PORT (all interfaces), like :20202, not \"{addr}\""),
    )
}

fn directories(c: &mut Config, source: &Source) -> Result<()> {
    for (key, dir) in [("fuse.dir", &mut c.fuse.dir), ("data.dir", &mut c.data.dir)] {
        *dir = absolute(dir).map_err(|e| source.invalid(key, e.to_string()))?;
    }
    // Symbolic links may make one of two names.
    let real = |dir: &Path| fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    if real(&c.data.dir) == real(&c.fuse.dir) {
        let problem = "must differ from fuse.dir: the mount would hide it";
        return Err(source.invalid("data.dir", problem));
    }
    if c.data.dir.starts_with(&c.fuse.dir) {
        let problem = "must not lie within fuse.dir: the mount would hide it";
        return Err(source.invalid("data.dir", problem));
    }
    Ok(())
}

fn proxy(c: &ProxyConfig, source: &Source) -> Result<()> {
    for (key, addr) in [("proxy.addr", &c.addr), ("proxy.target", &c.target)] {
        match addr {
            Some(addr) if split_addr(addr).is_none() => return Err(bad_addr(source, key, addr)),
            _ => {}
        }
    }
    if c.target.is_none() {
        return Ok(());
    }
    let Some(addr) = &c.addr else {
        return Err(source.invalid("proxy.addr", "is missing: where the proxy listens"));
    };
    if c.forward != ProxyForward::FlyReplay && split_addr(addr).is_some_and(|(_, port)| port == 0) {
        let problem = "must name a port: the primary's proxy is looked for on the same one";
        return Err(source.invalid("proxy.addr", problem));
    }
    if c.target
        .as_deref()
        .and_then(split_addr)
        .is_some_and(|(_, port)| port == 0)
    {
        let problem = "must name the port that the application listens on";
        return Err(source.invalid("proxy.target", problem));
    }
    if c.db.as_deref().unwrap_or("").is_empty() {
        let problem = "is missing: the database whose position the clients' cookies carry";
        return Err(source.invalid("proxy.db", problem));
    }
    Ok(())
}

fn lease(c: &mut Config, port: u16, source: &Source) -> Result<()> {
    let lease = &mut c.lease;
    let follower = lease.kind == LeaseKind::Static && !lease.candidate;
    if follower && lease.advertise_url.is_empty() {
        let problem = "is missing: on a static replica it is the URL of the primary, like \
                       http://primary:20202";
        return Err(source.invalid("lease.advertise-url", problem));
    }
    if lease.hostname.is_empty() {
        let default = match http_host(&lease.advertise_url) {
            Some(host) if follower => Some(host.to_owned()),
            _ => machine_name(),
        };
        lease.hostname = default.ok_or_else(|| {
            source.invalid("lease.hostname", "is missing, and this machine has no name")
        })?;
    }
    if lease
        .hostname
        .contains(|c: char| c.is_whitespace() || c.is_control())
    {
        return Err(source.invalid("lease.hostname", "must not contain blanks"));
    }
    if lease.advertise_url.is_empty() {
        let scheme = if c.http.tls.is_some() {
            "https"
        } else {
            "http"
        };
        lease.advertise_url = format!("{scheme}://{}:{port}", lease.hostname);
    }
    // It may hold a password: it is not repeated.
    if http_host(&lease.advertise_url).is_none() {
        let problem = "must be a URL like http://host:20202";
        return Err(source.invalid("lease.advertise-url", problem));
    }
    if has_user(&lease.advertise_url) {
        let problem = "must not hold a user or a password: every node shows it, and nobody uses \
                       them. For tokens there is http.auth";
        return Err(source.invalid("lease.advertise-url", problem));
    }
    if lease.candidate && !lease.databases.is_empty() {
        let problem = "a node that replicates some databases only cannot be primary: set \
                       lease.candidate to false, or remove this key";
        return Err(source.invalid("lease.databases", problem));
    }
    for name in &lease.databases {
        check_database(name).map_err(|e| source.invalid("lease.databases", e.to_string()))?;
    }
    if let Some(c) = &lease.consul {
        consul(c, source)?;
    } else if lease.kind == LeaseKind::Consul {
        let problem = "is missing: lease.type consul needs a url and a key";
        return Err(source.invalid("lease.consul", problem));
    }
    if let Some(c) = &lease.etcd {
        etcd(c, source)?;
    } else if lease.kind == LeaseKind::Etcd {
        let problem = "is missing: lease.type etcd needs endpoints and a key";
        return Err(source.invalid("lease.etcd", problem));
    }
    Ok(())
}

/// What `http.tls` and `http.auth` must be together with the rest.
fn transport(c: &Config, source: &Source) -> Result<()> {
    let https = c.lease.advertise_url.starts_with("https:");
    let problem = match (&c.http.tls, https) {
        (Some(_), false) => {
            "must begin with https: with http.tls, this node and the others speak TLS only"
        }
        (None, true) => {
            "begins with https, and there is no http.tls: give this node a certificate there (cert, \
             key, ca), or write http"
        }
        _ => "",
    };
    if !problem.is_empty() {
        return Err(source.invalid("lease.advertise-url", problem));
    }
    let Some(auth) = &c.http.auth else {
        return Ok(());
    };
    for (i, token) in auth.tokens.iter().enumerate() {
        if auth.tokens[..i].iter().any(|t| t.name == token.name) {
            let key = format!("http.auth.tokens[{i}].name");
            let problem = format!("\"{}\" is the name of another token already", token.name);
            return Err(source.invalid(&key, problem));
        }
    }
    let names = || {
        let names: Vec<_> = auth.tokens.iter().map(|t| t.name.as_str()).collect();
        names.join(", ")
    };
    match &auth.send {
        Some(name) if !auth.tokens.iter().any(|t| t.name == *name) => {
            let problem = format!("there is no token \"{name}\", but: {}", names());
            Err(source.invalid("http.auth.send", problem))
        }
        // A static primary calls nobody.
        None if c.lease.kind != LeaseKind::Static || !c.lease.candidate => {
            let problem = format!(
                "is missing: the name of the token that this node shows to the others, one of: {}",
                names()
            );
            Err(source.invalid("http.auth.send", problem))
        }
        _ => Ok(()),
    }
}

fn consul(c: &ConsulConfig, source: &Source) -> Result<()> {
    let invalid =
        |key: &str, problem: &str| Err(source.invalid(&format!("lease.consul.{key}"), problem));
    // The URL may hold a token: it is not repeated.
    if http_host(&c.url.0).is_none() {
        return invalid(
            "url",
            "is missing or no URL; write it like http://localhost:8500",
        );
    }
    if c.key.is_empty() {
        return invalid(
            "key",
            "is missing: the key of the lease, one for each cluster",
        );
    }
    if !(Duration::from_secs(10)..=Duration::from_secs(86_400)).contains(&c.ttl) {
        return invalid(
            "ttl",
            "must be from 10s to 24h: Consul refuses anything else",
        );
    }
    if c.lock_delay > Duration::from_secs(60) {
        return invalid("lock-delay", "must be 60s or less: Consul refuses more");
    }
    if half_an_identity(c.tls.as_ref()) {
        return invalid("tls", "cert and key must be given together");
    }
    Ok(())
}

fn etcd(c: &EtcdConfig, source: &Source) -> Result<()> {
    let invalid =
        |key: &str, problem: &str| Err(source.invalid(&format!("lease.etcd.{key}"), problem));
    if c.endpoints.is_empty() || c.endpoints.iter().any(|url| http_host(url).is_none()) {
        return invalid(
            "endpoints",
            "must be a list of URLs like http://localhost:2379",
        );
    }
    if c.endpoints.iter().any(|url| has_user(url)) {
        let problem = "must not hold a user or a password: use username and password";
        return invalid("endpoints", problem);
    }
    if c.key.is_empty() {
        return invalid(
            "key",
            "is missing: the key of the lease, one for each cluster",
        );
    }
    if c.ttl < Duration::from_secs(2) || c.ttl.subsec_nanos() != 0 {
        return invalid("ttl", "must be whole seconds, 2s or more");
    }
    if c.username.is_some() != c.password.is_some() {
        return invalid("username", "and password must be given together");
    }
    if half_an_identity(c.tls.as_ref()) {
        return invalid("tls", "cert and key must be given together");
    }
    Ok(())
}

fn half_an_identity(tls: Option<&TlsConfig>) -> bool {
    tls.is_some_and(|tls| tls.cert.is_some() != tls.key.is_some())
}

/// Whether an `http` or `https` URL names a user, or a password.
fn has_user(url: &str) -> bool {
    let authority = url.split_once("://").map_or("", |(_, rest)| rest);
    let authority = authority.split(['/', '?', '#']).next();
    authority.is_some_and(|a| a.contains('@'))
}

/// The host in an `http` or `https` URL; `None` if it is no such URL.
pub fn http_host(url: &str) -> Option<&str> {
    let rest = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"))?;
    if url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return None;
    }
    let authority = rest.split(['/', '?', '#']).next()?;
    let address = authority.rsplit('@').next()?;
    let (host, port) = match address.strip_prefix('[') {
        Some(v6) => v6.split_once(']')?,
        None => address.split_at(address.find(':').unwrap_or(address.len())),
    };
    let port_fits = match port.strip_prefix(':') {
        Some(port) => port.parse::<u16>().is_ok(),
        None => port.is_empty(),
    };
    (port_fits && !host.is_empty()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (addr, parts) in [
            (":20202", Some(("", 20202))),
            ("localhost:80", Some(("localhost", 80))),
            ("127.0.0.1:0", Some(("127.0.0.1", 0))),
            ("[::1]:20202", Some(("::1", 20202))),
            ("[fe80::1%eth0]:1", Some(("fe80::1%eth0", 1))),
            ("20202", None),
            ("host:", None),
            ("host:+1", None),
            ("host:65536", None),
            ("::1:20202", None),
            ("[::1:20202", None),
            ("a b:1", None),
            ("http://host:1", None),
        ] {
            assert_eq!(split_addr(addr), parts, "{addr}");
        }
    }

    #[test]
    fn hosts_of_urls() {
        for (url, host) in [
            ("http://a:20202", Some("a")),
            ("https://a.b", Some("a.b")),
            ("http://:secret@a:8500/x", Some("a")),
            ("http://[::1]:20202/", Some("::1")),
            ("http://", None),
            ("http://:20202", None),
            ("http://a:x", None),
            ("http://a:70000", None),
            ("http://a b", None),
            ("a:20202", None),
            ("ftp://a", None),
        ] {
            assert_eq!(http_host(url), host, "{url}");
        }
    }

    #[test]
    fn paths_become_absolute() {
        assert_eq!(
            absolute(Path::new("/a/./b/../c/")).unwrap(),
            Path::new("/a/c")
        );
        assert_eq!(absolute(Path::new("/../..")).unwrap(), Path::new("/"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute(Path::new("x")).unwrap(), here.join("x"));
        assert_eq!(absolute(Path::new(".")).unwrap(), here);
    }
}
