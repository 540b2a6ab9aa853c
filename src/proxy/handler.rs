//! What becomes of one request. The rules are in the module above.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use http::uri::{Authority, Scheme};
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tenure_lease::PrimaryInfo;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::config::{ProxyConfig, ProxyForward};
use crate::telemetry::seldom::Seldom;

use super::activity::{Limits, OpenRequest};
use super::body::{AnswerBody, ProxyBody, RequestBody, streamed, whole};
use super::route::{Route, Rules};
use super::server::Permit;
use super::tunnel::{self, SWITCHING};
use super::upstream::{PATIENCE, Upstream, UpstreamError};
use super::{FORWARDED_BY, Node, TXID_TIMEOUT, cookie, headers};

/// How often at most the log says that an application or a primary's proxy does not answer.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

const FORWARDED: HeaderName = HeaderName::from_static(FORWARDED_BY);
const FLY_REPLAY: HeaderName = HeaderName::from_static("fly-replay");

/// Who sends a request.
#[derive(Clone)]
pub struct Client {
    /// Its address.
    pub peer: SocketAddr,
    /// Its right to a connection.
    pub permit: Permit,
}

/// Answers requests.
pub struct Handler {
    rules: Rules,
    db: String,
    target: Authority,
    forward: ProxyForward,
    /// The port of this proxy, and so of the primary's.
    port: u16,
    redirect_timeout: Duration,
    max_lag: Duration,
    log_requests: bool,
    node: Node,
    txid: watch::Receiver<u64>,
    upstream: Upstream,
    shutdown: watch::Receiver<bool>,
    complained: Seldom,
}

/// An answer of the proxy's own, of one line of text.
struct Refusal(StatusCode, String);

/// A request, and what is known of it besides.
struct Incomer {
    request: Request<ProxyBody>,
    client: Client,
    /// Its body was broken off, because it took too long.
    late: Arc<AtomicBool>,
    /// It may be sent to the application twice.
    repeatable: bool,
}

/// Who takes a write.
enum Writer {
    ThisNode,
    Primary(PrimaryInfo),
}

impl Handler {
    /// `port`: of this proxy; `txid`: the newest transaction of the database; `shutdown` ends upgraded
    /// connections.
    pub fn new(
        config: &ProxyConfig,
        target: Authority,
        port: u16,
        node: Node,
        txid: watch::Receiver<u64>,
        shutdown: watch::Receiver<bool>,
    ) -> Handler {
        Handler {
            rules: Rules::new(config),
            db: config.db.clone().unwrap_or_default(),
            target,
            forward: config.forward,
            port,
            redirect_timeout: config.primary_redirect_timeout,
            max_lag: config.max_lag,
            log_requests: config.debug,
            node,
            txid,
            upstream: Upstream::new(PATIENCE),
            shutdown,
            complained: Seldom::new(COMPLAIN_EVERY),
        }
    }

    /// The answer to a request whose head has just been read.
    pub async fn answer(
        &self,
        request: Request<Incoming>,
        client: Client,
        limits: Limits,
        open: OpenRequest,
    ) -> Response<AnswerBody> {
        let now = Instant::now();
        let mut write_due = limits.write.map(|limit| now + limit);
        let shown = self
            .log_requests
            .then(|| (request.method().clone(), request.uri().path().to_owned()));
        let (parts, body) = request.into_parts();
        let held_back = parts.headers.contains_key(header::EXPECT);
        let read_due = limits.read.map(|limit| now + limit);
        let (body, late) = RequestBody::limited(body, read_due, held_back);
        let incomer = Incomer {
            request: Request::from_parts(parts, body),
            client,
            late,
            repeatable: false,
        };
        let answered = match write_due {
            None => self.route(incomer).await,
            Some(due) => timeout_at(due, self.route(incomer))
                .await
                .unwrap_or_else(|_| {
                    // The limit for this answer is the connection's, which is a little longer.
                    write_due = None;
                    let text = "there was no answer within proxy.write-timeout";
                    Err(Refusal(StatusCode::GATEWAY_TIMEOUT, text.into()))
                }),
        };
        let response = answered.unwrap_or_else(Refusal::into_response);
        if let Some((method, path)) = shown {
            let status = response.status().as_u16();
            info!(%method, ?path, status, ms = now.elapsed().as_millis() as u64, "proxied");
        }
        response.map(|body| AnswerBody::new(body, write_due, open))
    }

    async fn route(&self, mut incomer: Incomer) -> Result<Response<ProxyBody>, Refusal> {
        let request = &incomer.request;
        let (method, headers) = (request.method(), request.headers());
        if *method == Method::CONNECT {
            let text = "this proxy stands in front of one application: it connects to nothing else";
            return Err(Refusal(StatusCode::METHOD_NOT_ALLOWED, text.into()));
        }
        let forwarded = headers.contains_key(FORWARDED);
        let route = self.rules.route(method, request.uri().path(), forwarded);
        incomer.repeatable = route != Route::Write && matches!(*method, Method::GET | Method::HEAD);
        match route {
            Route::Health => self.health(),
            Route::Passthrough => self.to_application(incomer).await,
            Route::Read => {
                if let Some(txid) = cookie::wanted(headers) {
                    self.reach(txid).await?;
                }
                self.to_application(incomer).await
            }
            Route::Write => match self.writer(forwarded).await? {
                Writer::ThisNode => {
                    let mut response = self.to_application(incomer).await?;
                    self.issue_cookie(&mut response).await;
                    Ok(response)
                }
                Writer::Primary(primary) => self.to_primary(incomer, &primary).await,
            },
        }
    }

    fn health(&self) -> Result<Response<ProxyBody>, Refusal> {
        let unfit = |text: String| Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, text));
        match self.node.store.lag() {
            None => unfit("this node has not been in step with its primary yet".into()),
            Some(lag) if u128::from(lag.unsigned_abs()) > self.max_lag.as_millis() => {
                unfit(format!(
                    "this node is {lag} ms behind its primary, proxy.max-lag is {} ms",
                    self.max_lag.as_millis()
                ))
            }
            Some(_) => Ok(Response::new(whole("OK\n"))),
        }
    }

    /// Waits until this node has a transaction.
    async fn reach(&self, txid: u64) -> Result<(), Refusal> {
        let mut newest = self.txid.clone();
        let reached = newest.wait_for(|newest| *newest >= txid);
        match timeout(TXID_TIMEOUT, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Refusal(
                StatusCode::GATEWAY_TIMEOUT,
                format!(
                    "this node did not receive transaction {txid:016x} of {}, which this client has written, in time",
                    self.db
                ),
            )),
        }
    }

    /// Finds out who takes writes. One that another node has sent is for this node or for nobody.
    async fn writer(&self, forwarded: bool) -> Result<Writer, Refusal> {
        let mut status = self.node.status.clone();
        let known = status.wait_for(|s| s.is_primary || (!forwarded && s.primary.is_some()));
        if let Ok(Ok(status)) = timeout(self.redirect_timeout, known).await {
            if status.is_primary {
                return Ok(Writer::ThisNode);
            }
            if let Some(primary) = &status.primary {
                return Ok(Writer::Primary(primary.clone()));
            }
        }
        let text = match forwarded {
            true => "another node took this one for the primary, which it is not",
            false => "there is no primary at the moment",
        };
        Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, text.into()))
    }

    /// Gives the client the position that its write has led to.
    async fn issue_cookie(&self, response: &mut Response<ProxyBody>) {
        let (store, db) = (Arc::clone(&self.node.store), self.db.clone());
        // A lock, which somebody may hold for as long as a write to disk takes.
        let txid = tokio::task::spawn_blocking(move || {
            store.database(&db).map_or(0, |db| db.captured_pos().txid)
        });
        let txid = txid.await.unwrap_or_default();
        if txid > 0
            && let Some(cookie) = cookie::issued(txid, SystemTime::now())
        {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }

    async fn to_application(&self, mut incomer: Incomer) -> Result<Response<ProxyBody>, Refusal> {
        incomer.request.headers_mut().remove(FORWARDED);
        self.send(incomer, &self.target, "the application").await
    }

    /// What a replica does with a write.
    async fn to_primary(
        &self,
        mut incomer: Incomer,
        primary: &PrimaryInfo,
    ) -> Result<Response<ProxyBody>, Refusal> {
        let unknown = || {
            let text = format!("the primary gives no usable address: {primary:?}");
            Refusal(StatusCode::BAD_GATEWAY, text)
        };
        match self.forward {
            ProxyForward::FlyReplay => {
                let value = HeaderValue::try_from(format!("instance={}", primary.hostname));
                let mut response = Response::new(whole(""));
                let value = value.map_err(|_| unknown())?;
                response.headers_mut().insert(FLY_REPLAY, value);
                Ok(response)
            }
            ProxyForward::Redirect => {
                let proxy = self.proxy_of(primary).ok_or_else(unknown)?;
                let path = incomer
                    .request
                    .uri()
                    .path_and_query()
                    .map_or("/", |p| p.as_str());
                let location = HeaderValue::try_from(format!("http://{proxy}{path}"));
                let mut response = Response::new(whole(""));
                *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
                let location = location.map_err(|_| unknown())?;
                response.headers_mut().insert(header::LOCATION, location);
                Ok(response)
            }
            ProxyForward::Proxy => {
                let proxy = self.proxy_of(primary).ok_or_else(unknown)?;
                let by = HeaderValue::from_static("replica");
                incomer.request.headers_mut().insert(FORWARDED, by);
                self.send(incomer, &proxy, "the primary's proxy").await
            }
        }
    }

    /// The primary's proxy: on the primary's host, on the port that this one has.
    fn proxy_of(&self, primary: &PrimaryInfo) -> Option<Authority> {
        let url: Uri = primary.advertise_url.parse().ok()?;
        format!("{}:{}", url.host()?, self.port).parse().ok()
    }

    /// Sends a request on; the answer's body is still on its way.
    async fn send(
        &self,
        incomer: Incomer,
        to: &Authority,
        who: &str,
    ) -> Result<Response<ProxyBody>, Refusal> {
        let Incomer {
            mut request,
            client,
            late,
            repeatable,
        } = incomer;
        // HTTP/2 and HTTP/1.0 have no such thing.
        let protocol = headers::upgrade(request.headers());
        let protocol = protocol.filter(|_| request.version() == Version::HTTP_11);
        let upgrade = protocol.map(|protocol| (protocol, hyper::upgrade::on(&mut request)));
        let (mut parts, body) = request.into_parts();
        headers::pass_on(&mut parts, client.peer.ip());
        if let Some((protocol, _)) = &upgrade {
            headers::set_upgrade(&mut parts.headers, protocol.clone());
        }
        let mut uri = std::mem::take(&mut parts.uri).into_parts();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(to.clone());
        uri.path_and_query
            .get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
        parts.uri = Uri::from_parts(uri).map_err(|e| {
            Refusal(
                StatusCode::BAD_REQUEST,
                format!("the request names no path: {e}"),
            )
        })?;
        let sent = self
            .upstream
            .send(Request::from_parts(parts, body), repeatable)
            .await;
        let response = sent.map_err(|error| {
            if late.load(Ordering::Acquire) {
                let text = "the request did not come within proxy.read-timeout";
                return Refusal(StatusCode::REQUEST_TIMEOUT, text.into());
            }
            self.complain(to, who, &error);
            Refusal(StatusCode::BAD_GATEWAY, format!("{who} at {to} {error}"))
        })?;
        self.bring_back(response, upgrade, client, who)
    }

    /// Makes the answer one that can be given to the client, and ties the two connections together if
    /// they change their protocol.
    fn bring_back(
        &self,
        mut response: Response<Incoming>,
        upgrade: Option<(HeaderValue, OnUpgrade)>,
        client: Client,
        who: &str,
    ) -> Result<Response<ProxyBody>, Refusal> {
        let agreed = headers::upgrade(response.headers());
        headers::end_hop(response.headers_mut());
        *response.version_mut() = Version::HTTP_11;
        if response.status() == SWITCHING {
            let same = |asked: &HeaderValue, got: &HeaderValue| {
                asked.as_bytes().eq_ignore_ascii_case(got.as_bytes())
            };
            let (Some((asked, from_client)), Some(agreed)) = (upgrade, agreed) else {
                let text = format!("{who} changed the protocol, which nobody had asked for");
                return Err(Refusal(StatusCode::BAD_GATEWAY, text));
            };
            if !same(&asked, &agreed) {
                let text = format!("{who} changed to {agreed:?}, not to {asked:?}");
                return Err(Refusal(StatusCode::BAD_GATEWAY, text));
            }
            let from_target = hyper::upgrade::on(&mut response);
            headers::set_upgrade(response.headers_mut(), agreed);
            let pipe = tunnel::pipe(
                from_client,
                from_target,
                client.permit,
                self.shutdown.clone(),
            );
            tokio::spawn(pipe);
        }
        Ok(response.map(streamed))
    }

    /// Says in the log, once in a while, that somebody does not answer.
    fn complain(&self, to: &Authority, who: &str, error: &UpstreamError) {
        if self.complained.due() {
            warn!("{who} at {to} {error}");
        } else {
            debug!("{who} at {to} {error}");
        }
    }
}

impl Refusal {
    fn into_response(self) -> Response<ProxyBody> {
        let Refusal(status, text) = self;
        debug!(%status, text, "the proxy refuses a request");
        let mut response = Response::new(whole(text + "\n"));
        *response.status_mut() = status;
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, plain);
        response
    }
}
