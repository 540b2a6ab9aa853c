//! Requests to Consul's HTTP API: bounded in size and time, their failures sorted into those that
//! pass by themselves and those that do not.

use std::error::Error;
use std::io;
use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::{Method, StatusCode, Url};
use tenure_lease::LeaseError;
use tokio::time::timeout;

/// The longest answer that is read: Consul's values have at most 512 KiB each.
const MAX_ANSWER: usize = 8 << 20;

/// One agent of Consul.
pub(crate) struct Agent {
    pub http: reqwest::Client,
    /// Scheme, host and port.
    pub base: Url,
    pub token: Option<HeaderValue>,
}

/// A request. Its parts are encoded when it is sent.
pub(crate) struct Request<'a> {
    pub method: Method,
    /// Below `/v1/`: names and keys, which may have slashes.
    pub path: &'a [&'a str],
    /// An empty value stands for none.
    pub query: &'a [(&'a str, &'a str)],
    pub body: Vec<u8>,
}

/// An answer with a status that may mean something: 200, 404 or 409.
pub(crate) struct Answer {
    pub status: StatusCode,
    /// `X-Consul-Index`, with which a blocking query goes on.
    pub index: Option<u64>,
    pub body: Vec<u8>,
}

impl Agent {
    /// Sends a request and reads the answer. `action` is for the errors, and `needs` names the
    /// permission without which Consul refuses it.
    ///
    /// # Errors
    /// [`LeaseError::LeaseExpired`] when the request names a session that does not exist; Fatal
    /// and Transient.
    pub async fn send(
        &self,
        action: &str,
        needs: &str,
        request: Request<'_>,
    ) -> Result<Answer, LeaseError> {
        let failed = |e| failed(action, e);
        let mut sent = self
            .http
            .request(request.method, self.url(request.path, request.query));
        if let Some(token) = &self.token {
            sent = sent.header("X-Consul-Token", token);
        }
        let mut answer = sent.body(request.body).send().await.map_err(failed)?;
        let index = answer.headers().get("X-Consul-Index");
        let index = index.and_then(|value| value.to_str().ok()?.parse().ok());
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_ANSWER {
                let why = format!("the answer has more than {MAX_ANSWER} bytes");
                return Err(LeaseError::fatal(action, why));
            }
            body.extend_from_slice(&chunk);
        }
        let status = answer.status();
        match status {
            StatusCode::OK | StatusCode::NOT_FOUND | StatusCode::CONFLICT => Ok(Answer {
                status,
                index,
                body,
            }),
            _ => Err(refused(action, needs, status, &body)),
        }
    }

    fn url(&self, path: &[&str], query: &[(&str, &str)]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut parts) = url.path_segments_mut() {
            parts.clear().push("v1");
            for part in path {
                parts.extend(part.split('/'));
            }
        }
        for (name, value) in query {
            match *value {
                "" => url.query_pairs_mut().append_key_only(name),
                value => url.query_pairs_mut().append_pair(name, value),
            };
        }
        url
    }
}

/// Ends `call` after `limit`, as something that may pass.
pub(crate) async fn within<T>(
    limit: Duration,
    action: &str,
    call: impl Future<Output = Result<T, LeaseError>>,
) -> Result<T, LeaseError> {
    match timeout(limit, call).await {
        Ok(done) => done,
        Err(_) => Err(LeaseError::transient(
            action,
            format!("no answer within {limit:?}"),
        )),
    }
}

/// A request that got no answer.
fn failed(action: &str, error: reqwest::Error) -> LeaseError {
    // The last cause says it, and does not repeat the URL.
    let mut last: &(dyn Error + 'static) = &error;
    while let Some(cause) = last.source() {
        last = cause;
        // What an I/O error wraps is not its source.
        while let Some(inner) = last.downcast_ref().and_then(io::Error::get_ref) {
            last = inner;
        }
        // TLS says what is wrong with a certificate; all else may get better by itself.
        if let Some(tls) = last.downcast_ref::<rustls::Error>() {
            let why =
                format!("TLS: {tls}: check the scheme of lease.consul.url and lease.consul.tls");
            return LeaseError::fatal(action, why);
        }
    }
    LeaseError::transient(action, last.to_string())
}

/// A request that Consul, or who else listens there, did not serve.
fn refused(action: &str, needs: &str, status: StatusCode, body: &[u8]) -> LeaseError {
    let body = String::from_utf8_lossy(&body[..body.len().min(300)]);
    let body = body.trim();
    if status == StatusCode::FORBIDDEN {
        return denied(action, needs, body);
    }
    if body.starts_with("invalid session") {
        return LeaseError::LeaseExpired;
    }
    let why = format!("{status}: {body}");
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        LeaseError::transient(action, why)
    } else {
        LeaseError::fatal(action, format!("{why}: is this Consul's HTTP API?"))
    }
}

/// The token (or that there is none) does not suffice.
pub(crate) fn denied(action: &str, needs: &str, answer: &str) -> LeaseError {
    let why = format!(
        "Consul answers {answer:?}: the token (the password in lease.consul.url) must be valid and grant {needs}"
    );
    LeaseError::fatal(action, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_queries_are_encoded() {
        let agent = Agent {
            http: reqwest::Client::new(),
            base: Url::parse("http://h:1/").unwrap(),
            token: None,
        };
        let url = agent.url(
            &["kv", "a b/c?d", "e%2f", ""],
            &[("consistent", ""), ("x", "1&2")],
        );
        assert_eq!(
            url.as_str(),
            "http://h:1/v1/kv/a%20b/c%3Fd/e%252f/?consistent&x=1%262"
        );
    }

    #[test]
    fn answers_are_sorted() {
        let of = |status: u16, body: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            refused("renewing x", r#"key "a" write"#, status, body.as_bytes())
        };
        let error = of(403, "ACL not found");
        assert!(matches!(error, LeaseError::Fatal { .. }));
        assert!(
            error.to_string().contains(r#"grant key "a" write"#),
            "{error}"
        );
        assert!(matches!(
            of(500, r#"invalid session "x""#),
            LeaseError::LeaseExpired
        ));
        assert!(of(500, "No cluster leader").is_transient());
        assert!(of(429, "slow down").is_transient());
        assert!(matches!(of(301, ""), LeaseError::Fatal { .. }));
        assert!(of(500, &"é".repeat(1000)).to_string().len() < 1000);
    }
}
