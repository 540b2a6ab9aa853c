//! A configuration tree laid over the defaults: which key sets which field, one line each.
//!
//! Each value is checked by itself here, and each section's keys are complete; what sections say
//! together is `validate`'s.

use std::ffi::OsString;
use std::time::Duration;

use super::ConfigError;
use super::model::{
    BackupConfig, ClientAuth, Config, ConsulConfig, EtcdConfig, ExecConfig, HttpAuth, HttpTls,
    LeaseConfig, ProxyConfig, Secret, TlsConfig, TokenConfig, TokenSource,
};
use super::section::{FromNode, Section};
use super::yaml::{Node, Value};

type Result<T> = std::result::Result<T, ConfigError>;

/// The whole file.
pub fn config(mut root: Section) -> Result<Config> {
    let mut c = Config::default();
    if let Some(mut s) = root.section("fuse")? {
        s.set("dir", &mut c.fuse.dir)?;
        s.set("allow-other", &mut c.fuse.allow_other)?;
        s.set("debug", &mut c.fuse.debug)?;
        s.set("wal-capture", &mut c.fuse.wal_capture)?;
        s.finish()?;
    }
    if let Some(mut s) = root.section("data")? {
        s.set("dir", &mut c.data.dir)?;
        s.set("compress", &mut c.data.compress)?;
        s.set("retention", &mut c.data.retention)?;
        s.set(
            "retention-monitor-interval",
            &mut c.data.retention_monitor_interval,
        )?;
        s.set("scrub-interval", &mut c.data.scrub_interval)?;
        s.set("scrub-rate", &mut c.data.scrub_rate)?;
        s.finish()?;
    }
    if let Some(node) = root.node("exec") {
        c.exec = exec(&root, node)?;
    }
    root.set("exit-on-error", &mut c.exit_on_error)?;
    root.set("skip-sync", &mut c.skip_sync)?;
    root.set("strict-verify", &mut c.strict_verify)?;
    c.http.snapshot_timeout = c.data.retention;
    if let Some(mut s) = root.section("http")? {
        s.set("addr", &mut c.http.addr)?;
        s.set("snapshot-timeout", &mut c.http.snapshot_timeout)?;
        c.http.tls = s.section("tls")?.map(http_tls).transpose()?;
        c.http.auth = s.section("auth")?.map(http_auth).transpose()?;
        s.finish()?;
    }
    if let Some(s) = root.section("proxy")? {
        proxy(s, &mut c.proxy)?;
    }
    if let Some(s) = root.section("lease")? {
        lease(s, &mut c.lease)?;
    }
    if let Some(s) = root.section("backup")? {
        c.backup = Some(backup(s)?);
    }
    if let Some(mut s) = root.section("log")? {
        s.set("format", &mut c.log.format)?;
        s.set("timestamp", &mut c.log.timestamp)?;
        s.set("debug", &mut c.log.debug)?;
        s.finish()?;
    }
    if let Some(mut s) = root.section("tracing")? {
        s.set("enabled", &mut c.tracing.enabled)?;
        s.set("path", &mut c.tracing.path)?;
        s.set("max-size", &mut c.tracing.max_size)?;
        s.set("max-count", &mut c.tracing.max_count)?;
        s.set("compress", &mut c.tracing.compress)?;
        s.finish()?;
    }
    root.finish()?;
    Ok(c)
}

/// `exec`: one command line, or a list of `{cmd, if-candidate}`.
fn exec(root: &Section, node: &Node) -> Result<Vec<ExecConfig>> {
    let command = |cmd: String, if_candidate| match shlex::split(&cmd) {
        None => Err(root.invalid("exec", "a quote is not closed, or a backslash is the last")),
        Some(words) if words.is_empty() => Err(root.invalid("exec", "a command is empty")),
        Some(words) => Ok(ExecConfig {
            cmd: words.into_iter().map(OsString::from).collect(),
            if_candidate,
        }),
    };
    let Value::List(items) = &node.value else {
        let cmd = String::from_node(node)
            .map_err(|_| root.invalid("exec", "must be a command line or a list of {cmd: …}"))?;
        return Ok(vec![command(cmd, false)?]);
    };
    let entry = |(i, item)| {
        let mut s = root.item("exec", i, item)?;
        let (mut cmd, mut if_candidate) = (String::new(), false);
        s.set("cmd", &mut cmd)?;
        s.set("if-candidate", &mut if_candidate)?;
        s.finish()?;
        command(cmd, if_candidate)
    };
    items.iter().enumerate().map(entry).collect()
}

fn http_tls(mut s: Section) -> Result<HttpTls> {
    let (mut cert, mut key, mut ca, mut client_auth) = (None, None, None, None);
    s.set("cert", &mut cert)?;
    s.set("key", &mut key)?;
    s.set("ca", &mut ca)?;
    s.set("client-auth", &mut client_auth)?;
    let Some(cert) = cert else {
        return Err(s.invalid("cert", "is missing: the file of this node's certificate"));
    };
    let Some(key) = key else {
        return Err(s.invalid("key", "is missing: the file of the certificate's key"));
    };
    let client_auth = match (client_auth, &ca) {
        (Some(ClientAuth::Required), None) => {
            let problem = "required needs http.tls.ca: an authority of your own, which signs the \
                           clients' certificates";
            return Err(s.invalid("client-auth", problem));
        }
        (Some(said), _) => said,
        (None, Some(_)) => ClientAuth::Required,
        (None, None) => ClientAuth::None,
    };
    s.finish()?;
    Ok(HttpTls {
        cert,
        key,
        ca,
        client_auth,
    })
}

fn http_auth(mut s: Section) -> Result<HttpAuth> {
    let mut auth = HttpAuth::default();
    s.set("send", &mut auth.send)?;
    if let Some(node) = s.node("tokens") {
        let Value::List(items) = &node.value else {
            let problem = "must be a list of {name, file or env, rights}";
            return Err(s.invalid("tokens", problem));
        };
        for (i, item) in items.iter().enumerate() {
            auth.tokens.push(token(s.item("tokens", i, item)?)?);
        }
    }
    if auth.tokens.is_empty() {
        let problem = "is missing or empty: a list of {name, file or env, rights}";
        return Err(s.invalid("tokens", problem));
    }
    s.finish()?;
    Ok(auth)
}

fn token(mut s: Section) -> Result<TokenConfig> {
    let (mut name, mut file, mut env) = (String::new(), None, None);
    let mut rights = Vec::new();
    s.set("name", &mut name)?;
    s.set("file", &mut file)?;
    s.set("env", &mut env)?;
    s.set("rights", &mut rights)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        let problem = "must be a name of letters, digits, \"-\", \"_\" and \".\": the log shows it";
        return Err(s.invalid("name", problem));
    }
    let source = match (file, env) {
        (Some(file), None) => TokenSource::File(file),
        (None, Some(env)) => TokenSource::Env(env),
        _ => {
            let problem = "say either file or env: where the token is. The token itself does not \
                           belong into this file";
            return Err(s.invalid("file", problem));
        }
    };
    if rights.is_empty() {
        let problem = "is missing or empty: a list of read, replicate, admin";
        return Err(s.invalid("rights", problem));
    }
    s.finish()?;
    Ok(TokenConfig {
        name,
        source,
        rights,
    })
}

fn proxy(mut s: Section, c: &mut ProxyConfig) -> Result<()> {
    s.set("addr", &mut c.addr)?;
    s.set("target", &mut c.target)?;
    s.set("db", &mut c.db)?;
    s.set("max-lag", &mut c.max_lag)?;
    s.set("passthrough", &mut c.passthrough)?;
    s.set("always-forward", &mut c.always_forward)?;
    s.set("forward", &mut c.forward)?;
    s.set("primary-redirect-timeout", &mut c.primary_redirect_timeout)?;
    s.set("read-timeout", &mut c.read_timeout)?;
    s.set("read-header-timeout", &mut c.read_header_timeout)?;
    s.set("write-timeout", &mut c.write_timeout)?;
    s.set("idle-timeout", &mut c.idle_timeout)?;
    s.set("debug", &mut c.debug)?;
    s.finish()
}

fn lease(mut s: Section, c: &mut LeaseConfig) -> Result<()> {
    let mut kind = None;
    s.set("type", &mut kind)?;
    s.set("hostname", &mut c.hostname)?;
    s.set("advertise-url", &mut c.advertise_url)?;
    s.set("candidate", &mut c.candidate)?;
    s.set("promote", &mut c.promote)?;
    s.set("reconnect-delay", &mut c.reconnect_delay)?;
    s.set("demote-delay", &mut c.demote_delay)?;
    s.set("databases", &mut c.databases)?;
    c.consul = s.section("consul")?.map(consul).transpose()?;
    c.etcd = s.section("etcd")?.map(etcd).transpose()?;
    match kind {
        Some(kind) => c.kind = kind,
        None if c.candidate && c.consul.is_none() && c.etcd.is_none() => {}
        None => {
            let problem = "is missing: say static, consul or etcd";
            return Err(s.invalid("type", problem));
        }
    }
    s.finish()
}

fn consul(mut s: Section) -> Result<ConsulConfig> {
    let mut c = ConsulConfig {
        url: Secret(String::new()),
        key: String::new(),
        ttl: Duration::from_secs(10),
        lock_delay: Duration::from_secs(1),
        tls: None,
    };
    s.set("url", &mut c.url)?;
    s.set("key", &mut c.key)?;
    s.set("ttl", &mut c.ttl)?;
    s.set("lock-delay", &mut c.lock_delay)?;
    c.tls = s.section("tls")?.map(tls).transpose()?;
    s.finish()?;
    Ok(c)
}

fn etcd(mut s: Section) -> Result<EtcdConfig> {
    let mut c = EtcdConfig {
        endpoints: Vec::new(),
        key: String::new(),
        ttl: Duration::from_secs(10),
        username: None,
        password: None,
        tls: None,
    };
    s.set("endpoints", &mut c.endpoints)?;
    s.set("key", &mut c.key)?;
    s.set("ttl", &mut c.ttl)?;
    s.set("username", &mut c.username)?;
    s.set("password", &mut c.password)?;
    c.tls = s.section("tls")?.map(tls).transpose()?;
    s.finish()?;
    Ok(c)
}

fn tls(mut s: Section) -> Result<TlsConfig> {
    let mut tls = TlsConfig::default();
    s.set("ca", &mut tls.ca)?;
    s.set("cert", &mut tls.cert)?;
    s.set("key", &mut tls.key)?;
    s.finish()?;
    Ok(tls)
}

fn backup(mut s: Section) -> Result<BackupConfig> {
    let mut kind = String::new();
    s.set("type", &mut kind)?;
    match kind.as_str() {
        "file" => {}
        "litefs-cloud" => {
            let problem = "litefs-cloud cannot be used: the service LiteFS Cloud has been shut \
                           down; remove this section, or use type file";
            return Err(s.invalid("type", problem));
        }
        "" => return Err(s.invalid("type", "is missing: say file")),
        other => return Err(s.invalid("type", format!("must be file, not \"{other}\""))),
    }
    let mut path = None;
    s.set("path", &mut path)?;
    let Some(path) = path else {
        return Err(s.invalid("path", "is missing: the directory that holds the backup"));
    };
    s.finish()?;
    Ok(BackupConfig { path })
}
