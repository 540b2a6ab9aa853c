//! Text: the configuration, and what stands in URLs, headers and file names.

use std::path::{Component, Path};
use std::time::{Duration, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};

use super::memory::bounded;
use crate::config::{Config, ProxyConfig, parse_with, split_addr};
use crate::ltx::{self, Pos};
use crate::proxy::{cookie, headers, route};
use crate::store::{Name, check_database, segment};
use crate::stream::{format_node_id, parse_node_id};

/// A configuration file. The variables that it may use are these.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let environment = |name: &str| match name {
        "A" => Some("a".to_owned()),
        "DOLLAR" => Some("$A ${A}".to_owned()),
        "YAML" => Some("\n  x: [".to_owned()),
        _ => None,
    };
    // The parser's own state, and a tree of bounded size.
    let limit = 256 * data.len() + (64 << 20);
    let parse = || parse_with(text, "f.yml", Some(&environment));
    match bounded("a configuration", limit, parse) {
        Ok(config) => check_config(&config),
        Err(error) => assert!(error.to_string().contains("f.yml"), "{error} names no file"),
    }
    let _ = parse_with(text, "f.yml", None);
}

/// What can be relied on without further checks.
fn check_config(c: &Config) {
    assert!(c.fuse.dir.is_absolute() && c.data.dir.is_absolute());
    assert_ne!(c.fuse.dir, c.data.dir);
    assert!(split_addr(&c.http.addr).is_some());
    assert!(
        c.lease
            .databases
            .iter()
            .all(|name| check_database(name).is_ok())
    );
    let century = Duration::from_secs(101 * 365 * 24 * 3600);
    for duration in [
        c.data.retention,
        c.http.snapshot_timeout,
        c.proxy.max_lag,
        c.lease.reconnect_delay,
    ] {
        assert!(duration < century);
    }
    assert!(c.exec.iter().all(|e| !e.cmd.is_empty()));
}

/// Small texts from the network and from directories: names, positions, IDs, cookies, paths, headers.
pub fn values(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    name(&text);
    file_names(&text);
    if let Ok(pos) = text.parse::<Pos>() {
        assert_eq!(pos.to_string(), text.to_ascii_lowercase());
    }
    if let Some(id) = parse_node_id(&text) {
        assert_eq!(format_node_id(id), text.to_ascii_uppercase());
    }
    if let Some((host, port)) = split_addr(&text) {
        assert!(!host.contains('/') && text.ends_with(&port.to_string()));
    }
    if let Some(ms) = data.first_chunk().map(|b| i64::from_be_bytes(*b)) {
        // LiteFS's clients read it as RFC 3339, which ends with the year 9999.
        let shown = crate::http::timestamp::rfc3339(ms);
        let since = Duration::from_millis(ms.unsigned_abs());
        if let Some(at) = UNIX_EPOCH
            .checked_add(since)
            .filter(|_| (0..253_402_300_800_000).contains(&ms))
        {
            let whole = humantime::format_rfc3339_millis(at).to_string();
            let short = whole
                .trim_end_matches('Z')
                .trim_end_matches('0')
                .trim_end_matches('.');
            assert!(
                shown.starts_with(short) || shown.starts_with(&whole[..19]),
                "{shown} {whole}"
            );
        }
    }
    requests(data);
}

/// A name that is a database's is one file in the directory and nothing else.
fn name(text: &str) {
    let accepted = check_database(text).is_ok();
    let parts: Vec<Component> = Path::new(text).components().collect();
    if accepted {
        assert!(
            matches!(parts[..], [Component::Normal(part)] if part == text),
            "{text:?} is no file's name"
        );
        assert!(!text.chars().any(char::is_control), "{text:?}");
        for suffix in ["-journal", "-wal", "-shm", "-pos", "-lock"] {
            let file = format!("{text}{suffix}");
            assert!(file.len() <= 255 && check_database(&file).is_err());
            assert_ne!(Name::parse(&file), Name::Invalid);
        }
    }
    match Name::parse(text) {
        Name::File(_, db) | Name::Pos(db) | Name::Lock(db) => {
            check_database(db).expect("a database's file")
        }
        Name::SuperJournal(name) => assert!(!name.contains('/') && name.len() <= 255, "{name:?}"),
        Name::Primary | Name::Lag | Name::LockDir | Name::Invalid => assert!(!accepted),
    }
}

fn file_names(text: &str) {
    if let Some((min, max)) = ltx::parse_file_name(text) {
        assert_eq!(ltx::file_name(min, max), text);
    }
    if let Some(txid) = segment::parse_file_name(text) {
        assert_eq!(segment::file_name(txid), text);
    }
}

/// Lines as headers, and the first one as a path.
fn requests(data: &[u8]) {
    let mut map = HeaderMap::new();
    let lines: Vec<&[u8]> = data.split(|b| *b == b'\n').take(64).collect();
    for line in &lines {
        let mut halves = line.splitn(2, |b| *b == b':');
        let (name, value) = (
            halves.next().unwrap_or_default(),
            halves.next().unwrap_or_default(),
        );
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            map.append(name, value);
        }
    }
    if let Some(txid) = cookie::wanted(&map) {
        let issued = cookie::issued(txid, UNIX_EPOCH).expect("a header");
        let mut again = HeaderMap::new();
        again.insert(header::COOKIE, issued);
        assert_eq!(cookie::wanted(&again), Some(txid));
    }
    let path = String::from_utf8_lossy(lines[0]);
    let pattern = String::from_utf8_lossy(lines.get(1).unwrap_or(&&b""[..]));
    let rules = route::Rules::new(&ProxyConfig {
        passthrough: vec![pattern.to_string()],
        ..ProxyConfig::default()
    });
    let decoded: Vec<u8> = percent_encoding::percent_decode_str(&path).collect();
    let health = path == route::HEALTH_PATH;
    let passed = rules.route(&Method::GET, &path, false) == route::Route::Passthrough;
    if pattern.len() * decoded.len() < 4096 {
        assert_eq!(
            passed,
            !health && naive_match(pattern.as_bytes(), &decoded),
            "{pattern:?} {path:?}"
        );
    }
    let Ok(mut request) = Request::builder().uri(&*path).body(()) else {
        return;
    };
    *request.headers_mut() = map;
    let mut parts = request.into_parts().0;
    headers::pass_on(&mut parts, [127, 0, 0, 1].into());
    let left = &parts.headers;
    let gone = [
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "upgrade",
    ];
    assert!(gone.iter().all(|name| !left.contains_key(*name)));
    let client = left["x-forwarded-for"].as_bytes();
    assert!(client.ends_with(b"127.0.0.1") && left.get_all("x-forwarded-for").iter().count() == 1);
}

/// Whether a pattern is the whole of a text, by trying everything.
fn naive_match(pattern: &[u8], text: &[u8]) -> bool {
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    for byte in pattern {
        if *byte == b'*' {
            let first = reached.iter().position(|r| *r).unwrap_or(reached.len());
            reached[first..].fill(true);
            continue;
        }
        for at in (0..text.len()).rev() {
            reached[at + 1] = reached[at] && text[at] == *byte;
        }
        reached[0] = false;
    }
    reached[text.len()]
}
