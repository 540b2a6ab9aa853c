//! Peers that mean harm, over real sockets against whole nodes: names, bodies without end, floods,
//! readers that do not read. Each gets what it may and no more; the others notice nothing.

mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::h2::{self, Connection, connect_from};
use common::{Cluster, Node, Options, Pair, SOON, sqlite3, wait_until};

/// A peer's address that is not the nodes' own.
const PEER: [u8; 4] = [127, 0, 0, 2];

fn connect(node: &Node, from: [u8; 4]) -> TcpStream {
    let stream = connect_from(from, &node.options.http).expect("a connection");
    stream
        .set_read_timeout(Some(Duration::from_secs(40)))
        .expect("a limit");
    stream
        .set_write_timeout(Some(Duration::from_secs(40)))
        .expect("a limit");
    stream
}

/// What is answered to these bytes, until the end; an error ends it too.
fn answer(stream: &mut TcpStream) -> String {
    let (mut text, mut buf) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = stream.read(&mut buf) {
        text.extend_from_slice(&buf[..n]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn ask(node: &Node, request: &str) -> String {
    let mut stream = connect(node, PEER);
    // The server may answer, and end the connection, before it has read everything.
    let _ = stream.write_all(request.as_bytes());
    answer(&mut stream)
}

fn status(answer: &str) -> u16 {
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    code.unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

/// All names below a directory.
fn names_below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).expect("a list") {
        let entry = entry.expect("an entry");
        names.push(entry.path().display().to_string());
        if entry.file_type().expect("a type").is_dir() {
            names.extend(names_below(&entry.path()));
        }
    }
    names.sort();
    names
}

/// Writes to a database and waits for its replica; how long that took.
fn replicated(pair: &Pair, sql: &str) -> Duration {
    let begun = Instant::now();
    sqlite3(&pair.primary.db("a.db"), sql);
    common::wait_same_pos(&pair.primary, &pair.replica, "a.db");
    begun.elapsed()
}

#[test]
fn names_lead_nowhere() {
    let cluster = Cluster::new(120);
    let node = cluster.start(Options::primary("p"));
    sqlite3(&node.db("a.db"), "CREATE TABLE t (a);");
    let before = names_below(cluster.dir());
    let names = [
        "",
        ".",
        "..",
        "../x",
        "%2e%2e%2fx",
        "..%2fx",
        "..%5cx%2f",
        "%2E%2E/%2E%2E/x",
        "/etc/x",
        "%2fetc%2fx",
        "a.db/x",
        "a.db%2f..%2fx",
        "x%00",
        "%00",
        "x%00.db",
        "x-wal",
        "x-journal",
        "x-shm",
        "x-pos",
        "x-lock",
        ".primary",
        ".lag",
        ".lock",
        "a%0ab",
        "a%0d%0aX:y",
        "%1b%5b2J",
        "%c0%ae%c0%ae%c0%afx/",
        "%ff%2fx",
        "x-mj0A1B2C9D0",
        "../x-mj0A1B2C9D0",
        "%7f",
    ];
    let long = "x".repeat(201);
    let id = "Litefs-Id: 0000000000000001\r\n";
    for name in names.iter().copied().chain([&*long]) {
        for (method, path) in [
            ("GET", format!("/export?name={name}")),
            ("POST", format!("/import?name={name}")),
            ("POST", format!("/halt?name={name}&id=7")),
            ("DELETE", format!("/halt?name={name}&id=7")),
            ("POST", format!("/tx?name={name}&lockID=7")),
            ("POST", format!("/common?name={name}")),
        ] {
            let head = format!(
                "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{id}Content-Length: 0\r\n\r\n"
            );
            let said = ask(&node, &head);
            assert_eq!(status(&said), 400, "{method} {path}: {said}");
        }
        let mut stream = Connection::begin(connect(&node, PEER), 65_535).expect("HTTP/2");
        let path = format!("/stream?filter=a.db,{name}");
        if !name.is_empty() && path.len() < 128 {
            stream
                .ask(1, "POST", &path, Some(&[0; 4]))
                .expect("a request");
            let refused = loop {
                match stream.receive().expect("an answer") {
                    // 400 is entry 12 of HPACK's static table.
                    (h2::HEADERS, _, 1, block) => break block[0] == 0x80 | 12,
                    (h2::GOAWAY, ..) => break false,
                    _ => {}
                }
            };
            assert!(refused, "/stream?filter={name}");
        }
    }
    // The position map's names.
    for name in [
        &b"../x"[..],
        b"a/b",
        b"",
        b"..",
        b"x-wal",
        b"\xff\xfe",
        b"a\nb",
        &[b'x'; 255],
    ] {
        let mut map = vec![0, 0, 0, 1];
        map.extend((name.len() as u32).to_be_bytes());
        map.extend_from_slice(name);
        map.extend([0; 16]);
        let mut stream = Connection::begin(connect(&node, PEER), 65_535).expect("HTTP/2");
        stream
            .ask(1, "POST", "/stream", Some(&map))
            .expect("a request");
        let first = loop {
            match stream.receive().expect("an answer") {
                (h2::HEADERS, _, 1, block) => break block[0],
                (kind, ..) => assert_ne!(kind, h2::GOAWAY),
            }
        };
        assert_eq!(first, 0x80 | 12, "a position map with {name:?}");
    }
    assert_eq!(names_below(cluster.dir()), before, "files came to be");
    sqlite3(&node.db("a.db"), "INSERT INTO t VALUES (1);");
}

/// Sends `bytes` again and again until the server has had enough; what it says.
fn endless(mut stream: TcpStream, bytes: &[u8], most: usize) -> (String, usize) {
    let mut sent = 0;
    while sent < most && stream.write_all(bytes).is_ok() {
        sent += bytes.len();
    }
    (answer(&mut stream), sent)
}

#[test]
fn bodies_without_end_are_refused() {
    let cluster = Cluster::new(120);
    let node = cluster.start(Options::primary("p"));
    sqlite3(&node.db("a.db"), "CREATE TABLE t (a);");
    let before = node.peak_memory();
    let database = fs::read(node.db("a.db")).expect("a database");
    let import = "POST /import?name=b.db HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = [&b"10000\r\n"[..], &[7; 65_536], b"\r\n"].concat();
    // Garbage, and a database that goes on after its last page.
    let whole = [
        format!("{:x}\r\n", database.len()).as_bytes(),
        &database,
        b"\r\n",
    ]
    .concat();
    for (first, word) in [(&[][..], "no database"), (&whole[..], "more than")] {
        let mut stream = connect(&node, PEER);
        stream
            .write_all(import.as_bytes())
            .and_then(|()| stream.write_all(first))
            .expect("a head");
        let (said, sent) = endless(stream, &chunk, 1 << 30);
        assert!(sent < 64 << 20, "{sent} bytes were taken");
        assert!(
            said.is_empty() || status(&said) == 400 && said.contains(word),
            "{said}"
        );
    }
    // More than is wanted, of what has a small limit.
    for path in [
        "/common?name=a.db",
        "/tx?name=a.db&lockID=7",
        "/info",
        "/promote",
        "/halt?name=a.db&id=0",
    ] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nLitefs-Id: 0000000000000001\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        let mut stream = connect(&node, PEER);
        stream.write_all(head.as_bytes()).expect("a head");
        let (said, sent) = endless(stream, &chunk, 1 << 30);
        assert!(sent < 64 << 20, "{path}: {sent} bytes were taken: {said}");
    }
    // A head without end, one line of it and many; a body's length that is none.
    let get = "GET /info HTTP/1.1\r\nHost: x\r\n";
    for (head, more) in [
        ("GET /", "x".repeat(1 << 16)),
        (get, "x: y\r\n".repeat(1 << 12)),
        (get, "y".repeat(1 << 16)),
    ] {
        let mut stream = connect(&node, PEER);
        stream.write_all(head.as_bytes()).expect("a head");
        let (said, sent) = endless(stream, more.as_bytes(), 1 << 30);
        assert!(
            sent < 64 << 20 && (said.is_empty() || (400..500).contains(&status(&said))),
            "{sent}: {said}"
        );
    }
    for length in ["-1", "18446744073709551616", "5, 6", "0x10"] {
        let said = ask(
            &node,
            &format!(
                "POST /import?name=b.db HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
            ),
        );
        assert_eq!(status(&said), 400, "{length}: {said}");
    }
    let huge = ask(
        &node,
        &format!(
            "POST /import?name=b.db HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
            1u64 << 60
        ),
    );
    assert_eq!(status(&huge), 507, "{huge}");
    assert!(!node.db("b.db").exists() && !node.db_data("b.db").exists());
    let grown = node.peak_memory() - before;
    assert!(grown < 64 << 20, "the node grew by {grown} bytes");
    sqlite3(&node.db("a.db"), "INSERT INTO t VALUES (1);");
}

#[test]
fn a_byte_at_a_time_is_not_enough() {
    let pair = Cluster::static_pair(120);
    replicated(&pair, "CREATE TABLE t (a);");
    let node = &pair.primary;
    let id = "Litefs-Id: 0000000000000001\r\n";
    let taken = ask(
        node,
        &format!(
            "POST /halt?name=a.db&id=9 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{id}Content-Length: 0\r\n\r\n"
        ),
    );
    assert_eq!(status(&taken), 200, "{taken}");
    let heads = [
        (
            "POST /import?name=b.db HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                .to_owned(),
            "1\r\nS\r\n",
            Some(408),
        ),
        (
            format!(
                "POST /tx?name=a.db&lockID=9 HTTP/1.1\r\nHost: x\r\n{id}Transfer-Encoding: chunked\r\n\r\n"
            ),
            "1\r\nL\r\n",
            Some(400),
        ),
        (
            "POST /common?name=a.db HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                .to_owned(),
            "1\r\n0\r\n",
            Some(408),
        ),
        ("GET /info HTTP/1.1\r\nHost: x\r\n".to_owned(), "a", None),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "\0", None),
    ];
    let began = Instant::now();
    std::thread::scope(|scope| {
        for (head, drip, code) in &heads {
            scope.spawn(move || {
                let mut stream = connect(node, PEER);
                stream
                    .set_read_timeout(Some(Duration::from_millis(300)))
                    .expect("a limit");
                stream.write_all(head.as_bytes()).expect("a head");
                let mut said = Vec::new();
                let mut buf = [0; 1024];
                while began.elapsed() < Duration::from_secs(30) {
                    match stream.read(&mut buf) {
                        Ok(0) => break,
                        Ok(n) => said.extend_from_slice(&buf[..n]),
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Err(_) => break,
                    }
                    if !said.starts_with(b"HTTP") && stream.write_all(drip.as_bytes()).is_err() {
                        break;
                    }
                    if said.starts_with(b"HTTP") {
                        break;
                    }
                }
                let said = String::from_utf8_lossy(&said);
                assert!(
                    began.elapsed() < Duration::from_secs(25),
                    "{head:?} is still there: {said}"
                );
                if let Some(code) = code {
                    assert_eq!(status(&said), *code, "{head:?}: {said}");
                }
            });
        }
    });
    let given_back = ask(
        node,
        "DELETE /halt?name=a.db&id=9 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    );
    assert_eq!(status(&given_back), 200);
    replicated(&pair, "INSERT INTO t VALUES (1);");
}

/// How long the API takes for a short answer; an error is none.
fn info_within(node: &Node) -> Duration {
    let begun = Instant::now();
    node.http_get("/info").expect("/info");
    begun.elapsed()
}

#[test]
fn two_thousand_connections_keep_nobody_out() {
    let mut pair = Cluster::static_pair(180);
    replicated(&pair, "CREATE TABLE t (a);");
    let before = pair.primary.peak_memory();
    // From an address of their own, then from the one that the nodes have.
    for from in [PEER, [127, 0, 0, 1]] {
        let mut held = Vec::new();
        for n in 0..2000 {
            let Ok(mut stream) = connect_from(from, &pair.primary.options.http) else {
                continue;
            };
            // Some say nothing, some begin a request, some have had an answer, some follow events.
            let _ = match n % 4 {
                0 => Ok(()),
                1 => stream.write_all(b"GET /info HTTP/1.1\r\n"),
                2 => stream.write_all(b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n"),
                _ => stream.write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"),
            };
            held.push(stream);
            if n == 500 {
                let took = info_within(&pair.primary);
                assert!(
                    took < Duration::from_secs(5),
                    "with 500 connections: {took:?}"
                );
            }
        }
        assert!(held.len() > 1900, "{} connections", held.len());
        let took = info_within(&pair.primary);
        println!(
            "/info with {} connections from {from:?}: {took:?}",
            held.len()
        );
        assert!(took < Duration::from_secs(5), "{took:?}");
        // The replica that was there still is; one that comes now gets in.
        let took = replicated(&pair, "INSERT INTO t VALUES (1);");
        println!("replicated in {took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert_eq!(pair.replica.stop(), Some(0));
        pair.replica.start();
        replicated(&pair, "INSERT INTO t VALUES (2);");
        let fds = fs::read_dir(format!("/proc/{}/fd", pair.primary.pid()))
            .expect("a list")
            .count();
        assert!(fds < 500, "{fds} descriptors are open");
    }
    let grown = pair.primary.peak_memory() - before;
    println!("the primary grew by {} KiB", grown >> 10);
    assert!(grown < 64 << 20, "{grown} bytes");
}

/// The memory that a node has now, in bytes.
fn memory(node: &Node) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).expect("a process");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("VmRSS");
    line.trim()
        .trim_end_matches(" kB")
        .parse::<u64>()
        .expect("a number")
        << 10
}

/// The map of one database at the position that `X-pos` says.
fn position_map(name: &str, pos: &str) -> Vec<u8> {
    let number = |hex: &str| {
        u64::from_str_radix(hex, 16)
            .expect("hex digits")
            .to_be_bytes()
    };
    let (txid, checksum) = pos.split_once('/').expect("a position");
    let mut map = vec![0, 0, 0, 1, 0, 0, 0, name.len() as u8];
    map.extend_from_slice(name.as_bytes());
    map.extend(number(txid));
    map.extend(number(checksum));
    map
}

#[test]
fn readers_that_do_not_read_cost_little_and_hold_up_nobody() {
    let pair = Cluster::static_pair_with(180, |options| Options {
        uncompressed: true,
        ..options
    });
    let insert = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 6000)
        INSERT INTO t SELECT randomblob(3500) FROM n;";
    replicated(&pair, "PRAGMA journal_mode=wal; CREATE TABLE t (a);");
    replicated(&pair, insert);
    let alone = replicated(&pair, "INSERT INTO t VALUES (1);");
    let base = memory(&pair.primary);
    // Streams that begin with nothing (a snapshot) and with everything (what comes from now on), exports,
    // and readers of events; none reads what it asked for.
    let mut held = Vec::new();
    let everything = position_map("a.db", &pair.primary.pos("a.db").expect("a position"));
    for n in 0..24 {
        let map = if n % 2 == 0 { &everything[..] } else { &[0; 4] };
        let mut stream = Connection::begin(connect(&pair.primary, PEER), 1 << 30).expect("HTTP/2");
        stream
            .ask(1, "POST", "/stream", Some(map))
            .expect("a request");
        stream.ask(3, "GET", "/events", None).expect("a request");
        held.push(stream.0);
    }
    for _ in 0..8 {
        let mut stream = connect(&pair.primary, PEER);
        stream
            .write_all(b"GET /export?name=a.db HTTP/1.1\r\nHost: x\r\n\r\n")
            .expect("a request");
        held.push(stream);
    }
    // Transactions of 24 MB each.
    let mut most = 0;
    for round in 0..6 {
        let took = replicated(&pair, insert);
        most = most.max(memory(&pair.primary));
        println!(
            "round {round}: 24 MB replicated in {took:?}, {} MiB",
            memory(&pair.primary) >> 20
        );
    }
    let small: Duration = (0..20)
        .map(|_| replicated(&pair, "INSERT INTO t VALUES (2);"))
        .max()
        .expect("some");
    println!(
        "a small transaction: {alone:?} alone, {small:?} at most beside {} readers",
        held.len()
    );
    assert!(small < Duration::from_secs(2), "{small:?}");
    let grown = most.saturating_sub(base);
    println!("{} MiB, {} MiB more than before", most >> 20, grown >> 20);
    assert!(grown < 160 << 20, "{grown} bytes");
    // They are cut off: the streams as nothing was taken for 30 s, the exports for 10.
    let gone = || match pair.primary.metric("litefs_subscriber_count") {
        1.0 => Ok(()),
        n => Err(n),
    };
    wait_until(
        "the streams to be cut off",
        SOON + Duration::from_secs(15),
        gone,
    );
    drop(held);
}

#[test]
fn floods_of_http2() {
    let pair = Cluster::static_pair(180);
    replicated(&pair, "CREATE TABLE t (a);");
    let node = &pair.primary;
    let before = node.peak_memory();
    let flood = |name: &str, what: &mut dyn FnMut(&mut Connection, u32) -> io::Result<()>| {
        let mut connection = Connection::begin(connect(node, PEER), 65_535).expect("HTTP/2");
        let begun = Instant::now();
        let mut sent = 0;
        while sent < 100_000
            && begun.elapsed() < Duration::from_secs(5)
            && what(&mut connection, sent).is_ok()
        {
            sent += 1;
        }
        let took = info_within(node);
        println!("{name}: {sent} rounds, /info in {took:?}");
        assert!(took < Duration::from_secs(3), "{name}: {took:?}");
        (connection, sent)
    };
    // Requests that are taken back at once.
    let (_, sent) = flood("rapid reset", &mut |c, n| {
        c.ask(2 * n + 1, "GET", "/metrics", None)?;
        c.send(h2::RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8])
    });
    assert!(sent < 100_000, "{sent} requests and resets were taken");
    // More requests at a time than are allowed: refused, or the connection is ended.
    let (mut connection, _) = flood("streams", &mut |c, n| match n {
        0..200 => c.ask(2 * n + 1, "GET", "/events", None),
        _ => Err(io::ErrorKind::Other.into()),
    });
    connection
        .0
        .set_read_timeout(Some(Duration::from_secs(1)))
        .expect("a limit");
    let counts = connection.drain();
    let headers = counts[usize::from(h2::HEADERS)];
    assert!(
        headers <= 32,
        "{headers} streams are open on one connection"
    );
    // A block of headers that never ends.
    let (_, sent) = flood("continuation", &mut |c, n| match n {
        0 => c.send(h2::HEADERS, 0, 1, &h2::request("GET", "/info")),
        _ => c.send(
            h2::CONTINUATION,
            0,
            1,
            &[0, 1, b'x', 100]
                .iter()
                .copied()
                .chain([b'y'; 100])
                .collect::<Vec<u8>>(),
        ),
    });
    assert!(sent < 10_000, "{sent} frames of one head were taken");
    // Frames that are answered, to one who does not read the answers.
    flood("pings", &mut |c, _| c.send(h2::PING, 0, 0, &[7; 8]));
    flood("settings", &mut |c, _| c.send(h2::SETTINGS, 0, 0, &[]));
    flood("empty data", &mut |c, n| match n {
        0 => c.send(
            h2::HEADERS,
            h2::END_HEADERS,
            1,
            &h2::request("POST", "/stream"),
        ),
        _ => c.send(h2::DATA, 0, 1, &[]),
    });
    let grown = node.peak_memory() - before;
    println!("the node grew by {} KiB", grown >> 10);
    assert!(grown < 64 << 20, "{grown} bytes");
    replicated(&pair, "INSERT INTO t VALUES (1);");
}
