//! What commands that talk to a running node share: its address, its answers, and a line of
//! progress where a person looks on.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;

/// Where a node answers unless it is told otherwise.
pub(super) const DEFAULT_URL: &str = "http://localhost:20202";
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
    /// `-url`.
    #[error("-url {0:?} is no address: write http://HOST:PORT")]
    Url(String),
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
    primary: Primary,
}

#[derive(Deserialize)]
struct Primary {
    #[serde(default)]
    hostname: String,
}

impl NodeClient {
    /// For the node at this address.
    pub fn new(url: &str) -> Result<NodeClient, ClientError> {
        let bad = || ClientError::Url(url.to_owned());
        let base = Url::parse(url).map_err(|_| bad())?;
        if base.scheme() != "http" || base.host().is_none() {
            return Err(bad());
        }
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE)
            .no_proxy()
            .build()
            .map_err(|e| ClientError::Unreachable {
                url: url.to_owned(),
                reason: cause(&e),
            })?;
        Ok(NodeClient { base, client })
    }

    /// `/PATH?name=DB`.
    pub fn url(&self, path: &str, db: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(path);
        url.query_pairs_mut().clear().append_pair("name", db);
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

    /// An error, with who is primary, unless the node is.
    pub async fn check_primary(&self) -> Result<(), ClientError> {
        let mut url = self.base.clone();
        url.set_path("info");
        let asked = self
            .client
            .get(url)
            .timeout(CONNECT_TIMEOUT)
            .send()
            .await
            .map_err(|e| self.unreachable(e))?;
        let info: Info = checked(asked)
            .await?
            .json()
            .await
            .map_err(|e| self.unreachable(e))?;
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
    Err(ClientError::Refused(if text.is_empty() {
        format!("the node answers {status}")
    } else {
        text
    }))
}

/// The innermost reason of an HTTP client's error: the outer ones only say that there was one.
pub(super) fn cause(e: &reqwest::Error) -> String {
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
