//! What a configuration says, as plain values. Keys and defaults are LiteFS's, so that a
//! `litefs.yml` works unchanged; what LiteFS does not have says so.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The configuration of a node. Each field is the YAML key of the same name (`-` for `_`).
///
/// Out of [`super::Config::load`] and its siblings it is complete and consistent: defaults that
/// depend on other keys (`lease.hostname`, `lease.advertise-url`, `http.snapshot-timeout`) are
/// filled in and paths are absolute.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The mount.
    pub fuse: FuseConfig,
    /// The data directory.
    pub data: DataConfig,
    /// Commands to run once the node is ready, in order, the last one in the background.
    pub exec: Vec<ExecConfig>,
    /// Whether a failed start ends the process; false keeps it for debugging. Default true.
    pub exit_on_error: bool,
    /// Whether `exec` starts without waiting for the primary's data. Default false.
    pub skip_sync: bool,
    /// Whether every transaction is followed by a checksum of the whole database: for tests.
    pub strict_verify: bool,
    /// The HTTP server that the other nodes talk to.
    pub http: HttpConfig,
    /// The proxy in front of the application.
    pub proxy: ProxyConfig,
    /// Who may be primary, and who decides.
    pub lease: LeaseConfig,
    /// Where a primary keeps a backup, if it does.
    pub backup: Option<BackupConfig>,
    /// The log.
    pub log: LogConfig,
    /// The rolling log of every file operation.
    pub tracing: TracingConfig,
}

/// `fuse`: the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuseConfig {
    /// The mount point. Default `/litefs`.
    pub dir: PathBuf,
    /// Whether users other than the daemon's own see the mount. Default false.
    pub allow_other: bool,
    /// Whether each FUSE request is logged. Default false.
    pub debug: bool,
    /// How transactions in WAL mode are captured. Default gate. LiteFS does not have it.
    pub wal_capture: WalCapture,
}

/// `fuse.wal-capture`: where transactions in WAL mode are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WalCapture {
    /// In the request that commits them.
    #[default]
    Gate,
    /// Behind the writers, which write past the node.
    Tail,
}

/// `data`: the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataConfig {
    /// The data directory. Default `/var/lib/litefs`.
    pub dir: PathBuf,
    /// Whether pages are compressed (LZ4) in LTX files. Default true.
    pub compress: bool,
    /// How long transactions are kept for replicas that catch up. The newest always is. Default
    /// 10 minutes.
    pub retention: Duration,
    /// How often transactions past their retention are looked for; 0: never, everything is kept.
    /// Default 1 minute.
    pub retention_monitor_interval: Duration,
    /// How long after a look at everything that is stored the next begins; 0: never. Default 24
    /// hours. LiteFS does not have it.
    pub scrub_interval: Duration,
    /// How many MB a second that look reads. Default 4. LiteFS does not have it.
    pub scrub_rate: u64,
}

/// An entry of `exec`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecConfig {
    /// The program and its arguments; `cmd` split as a shell splits it. Never empty.
    pub cmd: Vec<OsString>,
    /// Whether it runs on candidates only. Default false.
    pub if_candidate: bool,
}

/// `http`: the server that the other nodes talk to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConfig {
    /// `HOST:PORT`; without a host (`:20202`) on all interfaces. Default `:20202`.
    /// [`super::split_addr`] takes it apart.
    pub addr: String,
    /// How long sending one snapshot may take. Default: `data.retention`.
    pub snapshot_timeout: Duration,
    /// TLS, on this port and in this node's own calls; without it neither has any. LiteFS does not
    /// have it.
    pub tls: Option<HttpTls>,
    /// Tokens; without them nobody is asked for one. LiteFS does not have it.
    pub auth: Option<HttpAuth>,
}

/// `http.tls`: PEM files. They are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpTls {
    /// This node's certificate, with those between it and its authority: for those who connect, and
    /// for those to whom it connects.
    pub cert: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// The authorities that sign the other nodes' certificates. Default: the system's.
    pub ca: Option<PathBuf>,
    /// What a client has to show. Default: required if there is a `ca`.
    pub client_auth: ClientAuth,
}

/// `http.tls.client-auth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// No certificate.
    None,
    /// A certificate that `ca` has signed.
    Required,
}

/// `http.auth`: tokens.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct HttpAuth {
    /// The name of the token that this node shows to the others.
    pub send: Option<String>,
    /// The tokens that are accepted here; one at least, no name twice.
    pub tokens: Vec<TokenConfig>,
}

/// An entry of `http.auth.tokens`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenConfig {
    /// What the log calls whoever shows it.
    pub name: String,
    /// Where it is.
    pub source: TokenSource,
    /// What it allows; one at least.
    pub rights: Vec<Right>,
}

/// Where a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// In a file, a token a line: each is accepted, and the first is the one that is sent. It is read
    /// again when it changes.
    File(PathBuf),
    /// In this environment variable.
    Env(String),
}

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// To look: export, info, events, metrics, debug.
    Read,
    /// To follow as a replica.
    Replicate,
    /// Everything.
    Admin,
}

impl Right {
    /// The name, as the configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Replicate => "replicate",
            Self::Admin => "admin",
        }
    }
}

/// How a replica's proxy passes a write on to the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyForward {
    /// `fly-replay`: an empty answer that has Fly.io's own proxy send the request to the primary.
    FlyReplay,
    /// `proxy`: this node sends the request to the primary's proxy and brings the answer back.
    Proxy,
    /// `redirect`: a 307 has the client itself send the request to the primary's proxy.
    Redirect,
}

/// `proxy`: the HTTP proxy in front of the application; it runs if `target` is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Where it listens, as [`HttpConfig::addr`]. Set if `target` is.
    pub addr: Option<String>,
    /// The application's `HOST:PORT`.
    pub target: Option<String>,
    /// The database whose position clients' cookies carry. Set if `target` is.
    pub db: Option<String>,
    /// The lag from which on the health check fails. Default 10 s.
    pub max_lag: Duration,
    /// Paths that go to the target untouched; `*` matches anything.
    pub passthrough: Vec<String>,
    /// Paths that are treated as writes whatever their method.
    pub always_forward: Vec<String>,
    /// How a replica passes writes on to the primary. Default fly-replay. LiteFS does not have it.
    pub forward: ProxyForward,
    /// How long a write waits for a primary to be known. Default 5 s.
    pub primary_redirect_timeout: Duration,
    /// How long reading a request may take; 0: no limit (the default).
    pub read_timeout: Duration,
    /// How long reading a request's headers may take. Default 10 s.
    pub read_header_timeout: Duration,
    /// How long writing an answer may take; 0: no limit (the default).
    pub write_timeout: Duration,
    /// How long an idle connection is kept. Default 30 s.
    pub idle_timeout: Duration,
    /// Whether each request is logged. Default false.
    pub debug: bool,
}

impl ProxyConfig {
    /// Whether there is a proxy that sends writes on to another node's.
    pub fn forwards(&self) -> bool {
        self.target.is_some() && self.forward == ProxyForward::Proxy
    }
}

/// Which service decides who is primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseKind {
    /// The configuration itself.
    Static,
    /// A Consul server.
    Consul,
    /// An etcd cluster. LiteFS does not have it.
    Etcd,
}

impl LeaseKind {
    /// The name, as `lease.type` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Consul => "consul",
            Self::Etcd => "etcd",
        }
    }
}

/// `lease`: who may be primary, and who decides.
#[derive(Clone, Debug, PartialEq)]
pub struct LeaseConfig {
    /// `type`. Default static, if this node is a candidate.
    pub kind: LeaseKind,
    /// The host name that is published while this node is primary (default: the machine's); with a
    /// static lease the primary's (default on the others: the host in `advertise-url`).
    pub hostname: String,
    /// The URL by which other nodes reach this one (default `http://HOSTNAME:PORT`); with a static
    /// lease the one by which they reach the primary.
    pub advertise_url: String,
    /// Whether this node may be primary; with a static lease: whether it is. Default true.
    pub candidate: bool,
    /// Whether a candidate takes the lease over once it has caught up. Default false.
    pub promote: bool,
    /// How long a replica waits before it connects again. Default 1 s.
    pub reconnect_delay: Duration,
    /// How long a demoted primary leaves the lease to others. Default 10 s.
    pub demote_delay: Duration,
    /// The databases that this node replicates; empty: all. Empty on a candidate.
    pub databases: Vec<String>,
    /// The Consul server; set if `kind` is.
    pub consul: Option<ConsulConfig>,
    /// The etcd cluster; set if `kind` is.
    pub etcd: Option<EtcdConfig>,
}

/// `lease.consul`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsulConfig {
    /// The server's URL, which may hold a token as its password and a key prefix as its path.
    pub url: Secret,
    /// The key of the lease.
    pub key: String,
    /// How long a lease lasts unless renewed: 10 s (the default) to 24 h.
    pub ttl: Duration,
    /// How long a key stays locked after its session has expired: up to 60 s. Default 1 s.
    pub lock_delay: Duration,
    /// Certificates for an `https` URL. LiteFS does not have it.
    pub tls: Option<TlsConfig>,
}

/// `lease.etcd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// The URLs of the cluster's members; one at least.
    pub endpoints: Vec<String>,
    /// The key of the lease.
    pub key: String,
    /// How long a lease lasts unless renewed: whole seconds, 2 s at least. Default 10 s.
    pub ttl: Duration,
    /// The user, if the cluster asks for one; then `password` is set too.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// Certificates, if the cluster asks for TLS.
    pub tls: Option<TlsConfig>,
}

/// `lease.etcd.tls`, `lease.consul.tls`: PEM files.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TlsConfig {
    /// The authority that signs the servers' certificates. Default: the system's.
    pub ca: Option<PathBuf>,
    /// This client's certificate, with `key`.
    pub cert: Option<PathBuf>,
    /// The certificate's key.
    pub key: Option<PathBuf>,
}

/// `backup`: type `file`, the one that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupConfig {
    /// The directory that holds the backup.
    pub path: PathBuf,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// A line of text.
    Text,
    /// A JSON object a line.
    Json,
}

/// `log`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Default text.
    pub format: LogFormat,
    /// Whether each line begins with the time. Default false.
    pub timestamp: bool,
    /// Whether debug messages are logged. Default false.
    pub debug: bool,
}

/// `tracing`: a rolling log of every file operation, if `path` is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracingConfig {
    /// Whether it is written, if there is a path. Default true.
    pub enabled: bool,
    /// The file.
    pub path: Option<PathBuf>,
    /// How large the file may grow before the next one is begun, in MB (2^20 bytes). Default 64.
    pub max_size: u64,
    /// How many older files are kept. Default 8.
    pub max_count: u64,
    /// Whether older files are compressed. Default true.
    pub compress: bool,
}

/// Text that is not to be seen in a log: `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Default for Config {
    /// The defaults of the table in the README. Those that depend on other keys are still empty.
    fn default() -> Self {
        Self {
            fuse: FuseConfig {
                dir: "/litefs".into(),
                allow_other: false,
                debug: false,
                wal_capture: WalCapture::Gate,
            },
            data: DataConfig {
                dir: "/var/lib/litefs".into(),
                compress: true,
                retention: Duration::from_secs(600),
                retention_monitor_interval: Duration::from_secs(60),
                scrub_interval: Duration::from_secs(24 * 3600),
                scrub_rate: 4,
            },
            exec: Vec::new(),
            exit_on_error: true,
            skip_sync: false,
            strict_verify: false,
            http: HttpConfig {
                addr: ":20202".into(),
                snapshot_timeout: Duration::ZERO,
                tls: None,
                auth: None,
            },
            proxy: ProxyConfig::default(),
            lease: LeaseConfig::default(),
            backup: None,
            log: LogConfig {
                format: LogFormat::Text,
                timestamp: false,
                debug: false,
            },
            tracing: TracingConfig {
                enabled: true,
                path: None,
                max_size: 64,
                max_count: 8,
                compress: true,
            },
        }
    }
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            addr: None,
            target: None,
            db: None,
            max_lag: Duration::from_secs(10),
            passthrough: Vec::new(),
            always_forward: Vec::new(),
            forward: ProxyForward::FlyReplay,
            primary_redirect_timeout: Duration::from_secs(5),
            read_timeout: Duration::ZERO,
            read_header_timeout: Duration::from_secs(10),
            write_timeout: Duration::ZERO,
            idle_timeout: Duration::from_secs(30),
            debug: false,
        }
    }
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self {
            kind: LeaseKind::Static,
            hostname: String::new(),
            advertise_url: String::new(),
            candidate: true,
            promote: false,
            reconnect_delay: Duration::from_secs(1),
            demote_delay: Duration::from_secs(10),
            databases: Vec::new(),
            consul: None,
            etcd: None,
        }
    }
}
