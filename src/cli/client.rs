//! What commands that talk to a running node share: its address, how they prove to it who asks, its
//! answers, and a line of progress where a person looks on.
//!
//! What an option (or its environment variable) says goes before what the file of `-config` says. A
//! token is never an option of its own: everybody on the machine can see those.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;

use crate::access::tokens::{self, Tokens};
use crate::access::{AccessError, tls};
use crate::config::{Config, ConfigError, split_addr};

/// Where a node answers unless it is told otherwise.
const DEFAULT_URL: &str = "http://localhost:20202";
/// The environment variable that holds a token.
const TOKEN: &str = "TENURE_TOKEN";
/// How long a node may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a node may send nothing: it may be busy with an import of any size, or wait for
/// applications.
const SILENCE: Duration = Duration::from_secs(600);
/// Bytes of an error's text that are shown.
const MAX_TEXT: usize = 2000;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// `-url`. It may hold a password: it is not repeated.
    #[error(
        "-url is no address: write http://HOST:PORT or https://HOST:PORT; a token belongs into TENURE_TOKEN or a file"
    )]
    Url,
    /// `-config`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A certificate, a key or a token.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// No token, or an unknown one.
    #[error("{0}; give one that it knows by TENURE_TOKEN, -token-file or -config")]
    Token(String),
    /// Nobody answers.
    #[error("cannot reach a node at {url}: {reason}; is it running, and is -url right?")]
    Unreachable {
        /// The address.
        url: String,
        /// What went wrong.
        reason: String,
    },
    /// The node refuses.
    #[error("{0}")]
    Refused(String),
    /// It is not the primary.
    #[error("the node at {url} is a replica: the primary is {primary}; use its -url")]
    Replica {
        /// The address.
        url: String,
        /// The primary's host name.
        primary: String,
    },
    /// Nobody is.
    #[error("the node at {0} is a replica, and there is no primary at the moment")]
    NoPrimary(String),
    /// The transfer broke.
    #[error("{0} was cut off: {1}")]
    Broken(&'static str, String),
    /// A file.
    #[error("{0} {1}: {2}")]
    File(&'static str, String, std::io::Error),
}

/// A node's HTTP API.
pub(super) struct NodeClient {
    base: Url,
    client: Client,
}

/// What `/info` says that matters here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    is_primary: bool,
    candidate: bool,
    primary: Primary,
}

#[derive(Deserialize)]
struct Primary {
    #[serde(default)]
    hostname: String,
}

/// Which node, and what to show to it.
#[derive(Debug, Default, clap::Args)]
pub(super) struct Target {
    /// The node's HTTP address [default: http://localhost:20202, or as the file of -config says].
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// The node's configuration file: its address, certificates and token are used.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// PEM file of the authorities that sign the node's certificate [default: the system's].
    #[arg(
        long,
        value_name = "FILE",
        env = "TENURE_TLS_CA",
        hide_env_values = true
    )]
    pub tls_ca: Option<PathBuf>,
    /// PEM file of a certificate to show, if the node asks for one.
    #[arg(
        long,
        value_name = "FILE",
        env = "TENURE_TLS_CERT",
        hide_env_values = true
    )]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of that certificate's key.
    #[arg(
        long,
        value_name = "FILE",
        env = "TENURE_TLS_KEY",
        hide_env_values = true
    )]
    pub tls_key: Option<PathBuf>,
    /// File of a token to show (its first line); the environment variable TENURE_TOKEN may hold
    /// the token itself.
    #[arg(
        long,
        value_name = "FILE",
        env = "TENURE_TOKEN_FILE",
        hide_env_values = true
    )]
    pub token_file: Option<PathBuf>,
}

impl Target {
    fn url(&self, config: Option<&Config>) -> Result<Url, ClientError> {
        let text = match (&self.url, config) {
            (Some(url), _) => url.clone(),
            (None, Some(config)) => address(config),
            (None, None) => DEFAULT_URL.to_owned(),
        };
        let url = Url::parse(&text).map_err(|_| ClientError::Url)?;
        let plain = url.username().is_empty() && url.password().is_none();
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() || !plain {
            return Err(ClientError::Url);
        }
        Ok(url)
    }

    fn tls(&self, config: Option<&Config>) -> Result<rustls::ClientConfig, AccessError> {
        let configured = config.and_then(|c| c.http.tls.as_ref());
        let pick =
            |option: &Option<PathBuf>, file: Option<&PathBuf>| option.as_ref().or(file).cloned();
        let ca = pick(&self.tls_ca, configured.and_then(|tls| tls.ca.as_ref()));
        let cert = pick(&self.tls_cert, configured.map(|tls| &tls.cert));
        let key = pick(&self.tls_key, configured.map(|tls| &tls.key));
        let options = ["-tls-ca", "-tls-cert", "-tls-key"];
        tls::client(options, ca.as_deref(), cert.as_deref(), key.as_deref())
    }

    fn token(&self, config: Option<&Config>) -> Result<Option<HeaderValue>, AccessError> {
        if let Some(path) = &self.token_file {
            return first(tokens::read("-token-file", path)?);
        }
        match std::env::var(TOKEN) {
            Ok(text) if !text.is_empty() => {
                return first(tokens::lines(
                    TOKEN,
                    "the environment variable",
                    text.as_bytes(),
                )?);
            }
            _ => {}
        }
        let auth = config.and_then(|c| c.http.auth.as_ref());
        Ok(auth.map(Tokens::load).transpose()?.and_then(|t| t.send()))
    }
}

fn first(tokens: Vec<String>) -> Result<Option<HeaderValue>, AccessError> {
    tokens
        .first()
        .map(|token| tokens::bearer("token", token))
        .transpose()
}

/// Where the node of this configuration answers.
fn address(config: &Config) -> String {
    if config.advertises_itself() {
        return config.lease.advertise_url.clone();
    }
    let (host, port) = split_addr(&config.http.addr).unwrap_or_default();
    let scheme = if config.http.tls.is_some() {
        "https"
    } else {
        "http"
    };
    match host {
        "" => format!("{scheme}://localhost:{port}"),
        v6 if v6.contains(':') => format!("{scheme}://[{v6}]:{port}"),
        host => format!("{scheme}://{host}:{port}"),
    }
}

impl NodeClient {
    /// For the node that the options name.
    pub fn new(target: &Target) -> Result<NodeClient, ClientError> {
        let load = |path: &PathBuf| Config::load(Some(Path::new(path)), true);
        let config = target.config.as_ref().map(load).transpose()?;
        let base = target.url(config.as_ref())?;
        let mut client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        if base.scheme() == "https" {
            client = client.use_preconfigured_tls(target.tls(config.as_ref())?);
        }
        if let Some(token) = target.token(config.as_ref())? {
            client = client.default_headers(HeaderMap::from_iter([(AUTHORIZATION, token)]));
        }
        let client = client.build().map_err(|e| ClientError::Unreachable {
            url: base.to_string(),
            reason: cause(&e),
        })?;
        Ok(NodeClient { base, client })
    }

    /// `/PATH?name=DB`.
    pub fn url(&self, path: &str, db: &str) -> Url {
        let mut url = self.path(path);
        url.query_pairs_mut().append_pair("name", db);
        url
    }

    /// `/PATH`.
    pub fn path(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(path);
        url.set_query(None);
        url
    }

    /// The HTTP client.
    pub fn http(&self) -> &Client {
        &self.client
    }

    /// For `map_err`: nobody answers.
    pub fn unreachable(&self, e: reqwest::Error) -> ClientError {
        ClientError::Unreachable {
            url: self.base.to_string(),
            reason: cause(&e),
        }
    }

    async fn info(&self) -> Result<Info, ClientError> {
        let request = self.client.get(self.path("info")).timeout(CONNECT_TIMEOUT);
        let asked = request.send().await.map_err(|e| self.unreachable(e))?;
        let info = checked(asked).await?.json().await;
        info.map_err(|e| self.unreachable(e))
    }

    /// Whether the node may be primary.
    pub async fn is_candidate(&self) -> Result<bool, ClientError> {
        Ok(self.info().await?.candidate)
    }

    /// An error, with who is primary, unless the node is.
    pub async fn check_primary(&self) -> Result<(), ClientError> {
        let info = self.info().await?;
        let url = self.base.to_string();
        match (info.is_primary, info.primary.hostname) {
            (true, _) => Ok(()),
            (false, none) if none.is_empty() => Err(ClientError::NoPrimary(url)),
            (false, primary) => Err(ClientError::Replica { url, primary }),
        }
    }
}

/// The answer, if it is a good one; else the node's own text.
pub(super) async fn checked(response: Response) -> Result<Response, ClientError> {
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response);
    }
    let mut response = response;
    let mut text = Vec::new();
    while let Ok(Some(piece)) = response.chunk().await {
        text.extend_from_slice(&piece);
        if text.len() > MAX_TEXT {
            break;
        }
    }
    text.truncate(MAX_TEXT);
    let text = String::from_utf8_lossy(&text);
    let text: String = text.trim().chars().filter(|c| !c.is_control()).collect();
    let text = match text.is_empty() {
        true => format!("the node answers {status}"),
        false => text,
    };
    Err(match status {
        StatusCode::UNAUTHORIZED => ClientError::Token(text),
        _ => ClientError::Refused(text),
    })
}

/// The innermost reason of an HTTP client's error: the outer ones only say that there was one.
pub(super) fn cause(e: &reqwest::Error) -> String {
    if let Some(reason) = tls::reason(e) {
        return format!("TLS: {reason}");
    }
    let mut inner: &dyn std::error::Error = e;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// A line on a terminal that tells how far `what` is; nothing anywhere else.
pub(super) fn progress(what: &'static str, total: Option<u64>) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    let line = "{msg} {bytes}/{total_bytes} {wide_bar} {bytes_per_sec} {eta}";
    // A template that cannot be read would leave the library's own.
    if let Ok(style) = ProgressStyle::with_template(line) {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

/// Runs a command's request to its end.
pub(super) fn block_on(
    work: impl Future<Output = Result<(), ClientError>>,
) -> std::process::ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(work),
        Err(e) => {
            super::report(&format_args!("cannot start: {e}"));
            return std::process::ExitCode::FAILURE;
        }
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            super::report(&e);
            std::process::ExitCode::FAILURE
        }
    }
}
