//! Whole nodes with proxies in front of applications that use SQLite in the mounts: who writes through
//! any node reads his own writes on it.

mod common;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::node::free_address;
use common::run::Running;
use common::{Cluster, Node, Options, SOON, sqlite3, wait_until};
use futures_util::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use reqwest::StatusCode;
use tokio::runtime::Runtime;

type AppBody = UnsyncBoxBody<Bytes, Infallible>;

/// Bytes of the bodies that are large.
const LARGE: usize = 100 << 20;
const PIECE: usize = 64 << 10;

/// An application that uses the database at a path; it ends with its runtime.
fn application(runtime: &Runtime, database: PathBuf) -> SocketAddr {
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .expect("listen");
    let addr = listener.local_addr().expect("an address");
    runtime.spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let database = database.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let database = database.clone();
                    async move { Ok::<_, Infallible>(answer(request, database).await) }
                });
                let builder = auto::Builder::new(TokioExecutor::new());
                // A client that goes away is none of the test's business.
                let _ = builder
                    .serve_connection(TokioIo::new(socket), service)
                    .await;
            });
        }
    });
    addr
}

/// POST / stores its body, GET / tells the newest; `/large` sends much, and counts what it is sent.
async fn answer(request: Request<Incoming>, database: PathBuf) -> Response<AppBody> {
    let text = |text: String| Response::new(Full::new(Bytes::from(text)).boxed_unsync());
    let writes = request.method() == "POST";
    let large = request.uri().path() == "/large";
    if large && !writes {
        let pieces = futures_util::stream::iter(0..LARGE / PIECE)
            .map(|_| Ok(Frame::data(Bytes::from(vec![7; PIECE]))));
        return Response::new(StreamBody::new(pieces).boxed_unsync());
    }
    if large {
        let mut body = request.into_body();
        let mut length = 0;
        while let Some(Ok(frame)) = body.frame().await {
            length += frame.data_ref().map_or(0, Bytes::len);
        }
        return text(length.to_string());
    }
    let body = request
        .into_body()
        .collect()
        .await
        .expect("a body")
        .to_bytes();
    let done = tokio::task::spawn_blocking(move || sql(&database, writes.then_some(&body[..])));
    match done.await.expect("no panic") {
        Ok(newest) => text(newest),
        Err(error) => {
            let mut response = text(error.to_string());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
    }
}

fn sql(database: &Path, write: Option<&[u8]>) -> rusqlite::Result<String> {
    let db = rusqlite::Connection::open(database)?;
    db.busy_timeout(Duration::from_secs(10))?;
    // In WAL mode the commit does not wait for the disk, and its position is not published at once.
    db.pragma_update(None, "synchronous", "NORMAL")?;
    if let Some(text) = write {
        let text = String::from_utf8_lossy(text).into_owned();
        db.execute("INSERT INTO t (text) VALUES (?1)", [text])?;
    }
    db.query_row("SELECT text FROM t ORDER BY id DESC LIMIT 1", [], |row| {
        row.get(0)
    })
}

/// Two nodes with an application each, and proxies on one port of two addresses.
struct Proxied {
    // Dropped in this order.
    runtime: Runtime,
    replica: Node,
    primary: Node,
    proxies: [String; 2],
    _cluster: Cluster,
}

/// Mounts are where the nodes put them: below the test's directory, under the node's name.
fn start(forward: &str, mode: &str) -> Proxied {
    let cluster = Cluster::new(120);
    let runtime = Runtime::new().expect("a runtime");
    let port = free_address();
    let port = port.rsplit(':').next().expect("a port");
    let mut primary = Options::primary("primary");
    let mut replica = Options::replica("replica", &primary);
    let proxies = [format!("127.0.0.1:{port}"), format!("127.0.0.2:{port}")];
    for (options, proxy) in [&mut primary, &mut replica].into_iter().zip(&proxies) {
        let dir = cluster
            .subdir(&options.name)
            .canonicalize()
            .expect("a path");
        let target = application(&runtime, dir.join("mnt/app.db"));
        options.more_yaml = format!(
            "proxy:\n  addr: \"{proxy}\"\n  target: \"{target}\"\n  db: app.db\n  \
             forward: {forward}\n  always-forward: [\"/touch\"]\n  max-lag: 2s\n"
        );
    }
    let primary = cluster.start(primary);
    let create =
        "CREATE TABLE t (id INTEGER PRIMARY KEY, text); INSERT INTO t (text) VALUES ('first');";
    sqlite3(
        &primary.db("app.db"),
        &format!("PRAGMA journal_mode={mode}; {create}"),
    );
    let replica = cluster.start(replica);
    common::wait_same_pos(&primary, &replica, "app.db");
    Proxied {
        runtime,
        replica,
        primary,
        proxies,
        _cluster: cluster,
    }
}

fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(30))
        .build()
        .expect("a client")
}

/// The `__txid` cookie that an answer sets.
fn cookie(response: &reqwest::Response) -> String {
    let value = response.headers().get("set-cookie").expect("a cookie");
    let value = value.to_str().expect("text");
    value.split(';').next().expect("a pair").to_owned()
}

/// Writes through the proxy at `url`, and reads back at once through the same one.
async fn write_and_read_back(client: &reqwest::Client, url: &str, rounds: u32) {
    for round in 0..rounds {
        let text = format!("round {round}");
        let answer = client
            .post(url)
            .body(text.clone())
            .send()
            .await
            .expect("an answer");
        let cookie = cookie(&answer);
        let status = answer.status();
        let body = answer.text().await.expect("a body");
        assert_eq!((status, &body), (StatusCode::OK, &text));
        let read = client.get(url).header("cookie", cookie).send().await;
        let read = read.expect("an answer");
        assert_eq!(read.status(), StatusCode::OK);
        assert_eq!(read.text().await.expect("a body"), text, "in round {round}");
    }
}

#[test]
fn a_write_through_the_replica_is_read_back_there_at_once() {
    for mode in ["wal", "delete"] {
        let nodes = start("proxy", mode);
        let [at_primary, at_replica] = nodes.proxies.each_ref().map(|p| format!("http://{p}/"));
        let client = client();
        nodes.runtime.block_on(async {
            write_and_read_back(&client, &at_replica, 100).await;
            write_and_read_back(&client, &at_primary, 50).await;
            // Written at one, read at the other.
            let answer = client
                .post(&at_primary)
                .body("there")
                .send()
                .await
                .expect("an answer");
            let read = client.get(&at_replica).header("cookie", cookie(&answer));
            let read = read.send().await.expect("an answer");
            assert_eq!(read.text().await.expect("a body"), "there");
        });
        assert_eq!(
            sqlite3(&nodes.replica.db("app.db"), "SELECT count(*) FROM t;"),
            "152\n"
        );
        common::assert_same(&nodes.primary, &nodes.replica, "app.db");
    }
}

#[test]
fn a_redirected_client_writes_on_the_primary() {
    let nodes = start("redirect", "wal");
    let at_replica = format!("http://{}/", nodes.proxies[1]);
    // It follows the redirection, with the body.
    nodes
        .runtime
        .block_on(write_and_read_back(&client(), &at_replica, 20));
    assert_eq!(
        sqlite3(&nodes.primary.db("app.db"), "SELECT count(*) FROM t;"),
        "21\n"
    );
}

#[test]
fn fly_replay_and_health_and_a_stop() {
    let mut nodes = start("fly-replay", "wal");
    let client = client();
    let url = |path: &str| format!("http://{}{path}", nodes.proxies[1]);
    nodes.runtime.block_on(async {
        for request in [client.post(url("/")).body("x"), client.get(url("/touch"))] {
            let answer = request.send().await.expect("an answer");
            assert_eq!(answer.headers()["fly-replay"], "instance=primary");
        }
        let health = client
            .get(url("/litefs/health"))
            .send()
            .await
            .expect("an answer");
        assert_eq!(health.text().await.expect("a body"), "OK\n");
        let read = client.get(url("/")).send().await.expect("an answer");
        assert_eq!(read.text().await.expect("a body"), "first");
    });
    // An idle connection to it does not hold the primary up.
    let at_primary = format!("http://{}/", nodes.proxies[0]);
    nodes.runtime.block_on(async {
        let read = client.get(at_primary).send().await.expect("an answer");
        assert_eq!(read.text().await.expect("a body"), "first");
    });
    let started = Instant::now();
    assert_eq!(nodes.primary.stop(), Some(0), "{}", nodes.primary.log());
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
    // Without its primary the replica goes on reading, and says that it is behind.
    let read = nodes.runtime.block_on(async {
        let answer = client.get(url("/")).send().await.expect("an answer");
        answer.text().await.expect("a body")
    });
    assert_eq!(read, "first");
    wait_until("the health check to fail", SOON, || {
        match nodes
            .runtime
            .block_on(async { client.get(url("/litefs/health")).send().await })
        {
            Ok(answer) if answer.status() == StatusCode::SERVICE_UNAVAILABLE => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn bodies_of_100_mb_take_no_memory() {
    let nodes = start("proxy", "wal");
    let client = client();
    let [before_primary, before_replica] = [&nodes.primary, &nodes.replica].map(Node::peak_memory);
    let url = format!("http://{}/large", nodes.proxies[1]);
    nodes.runtime.block_on(async {
        // To the application on the primary, through both nodes.
        let pieces = futures_util::stream::iter(0..LARGE / PIECE)
            .map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![7; PIECE])));
        let post = client.post(&url).body(reqwest::Body::wrap_stream(pieces));
        let answer = post.send().await.expect("an answer");
        assert_eq!(answer.text().await.expect("a body"), LARGE.to_string());
        let mut answer = client.get(&url).send().await.expect("an answer");
        let mut length = 0;
        while let Some(piece) = answer.chunk().await.expect("a piece") {
            length += piece.len();
        }
        assert_eq!(length, LARGE);
    });
    for (node, before) in [
        (&nodes.primary, before_primary),
        (&nodes.replica, before_replica),
    ] {
        let grown = node.peak_memory() - before;
        eprintln!("{} has grown by {} KiB", node.options.name, grown >> 10);
        assert!(
            grown < 16 << 20,
            "{} has grown by {grown} bytes",
            node.options.name
        );
    }
}

#[test]
fn the_example_runs_with_its_application() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("config-examples");
    let cluster = Cluster::new(90);
    let mut options = Options::primary("primary");
    let (proxy, target) = (free_address(), free_address());
    // The section of the example, at addresses that are free.
    let example = std::fs::read_to_string(examples.join("proxy.yml")).expect("the example");
    let section: String = example
        .lines()
        .skip_while(|line| *line != "proxy:")
        .take_while(|line| *line != "lease:")
        .map(|line| line.to_owned() + "\n")
        .collect();
    let replaced = section
        .replace(":8080", &proxy)
        .replace("localhost:8081", &target);
    assert!(
        replaced.contains(&proxy) && replaced.contains(&target),
        "{replaced}"
    );
    options.more_yaml = replaced;
    let node = cluster.start(options);
    let mut command = Command::new("python3");
    command
        .arg(examples.join("proxy-app.py"))
        .arg(node.db("app.db"))
        .arg(target.rsplit(':').next().expect("a port"))
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    // Ended before the node, of whose mount it has a file open.
    let _app = Running(command.spawn().expect("python3"));
    let runtime = Runtime::new().expect("a runtime");
    let notes = format!("http://{proxy}/notes");
    runtime.block_on(async {
        let client = client();
        // The application is still starting.
        let post = client
            .post(&notes)
            .body("text=hello")
            .send()
            .await
            .expect("an answer");
        assert_eq!(post.status(), StatusCode::CREATED);
        let read = client
            .get(&notes)
            .header("cookie", cookie(&post))
            .send()
            .await;
        assert_eq!(
            read.expect("an answer").text().await.expect("a body"),
            "hello\n"
        );
        let clear = client
            .get(format!("{notes}/clear"))
            .send()
            .await
            .expect("an answer");
        assert!(!cookie(&clear).is_empty());
        let read = client.get(&notes).send().await.expect("an answer");
        assert_eq!(read.text().await.expect("a body"), "");
    });
}
