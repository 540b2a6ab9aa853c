//! Servers that answer as Consul never should, or only after its snapshot was restored.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tenure_lease::{LeaseError, Leaser};
use tenure_lease_consul::{ConsulLeaser, ConsulOptions, MIN_TTL, TlsOptions};

/// Gives each connection one of `answers`; the first line of each request comes back.
fn serve(answers: Vec<String>) -> (SocketAddr, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (requests, received) = mpsc::channel();
    thread::spawn(move || {
        for answer in answers {
            let (mut connection, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let length = connection.read(&mut request).unwrap();
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            let line = request.lines().next().unwrap_or_default().to_owned();
            // The test may have ended; the client may have had enough.
            let _ = requests.send(line);
            let _ = connection.write_all(answer.as_bytes());
        }
    });
    (address, received)
}

fn leaser(address: SocketAddr) -> ConsulLeaser {
    ConsulLeaser::new(ConsulOptions {
        url: format!("http://{address}"),
        key: "k".into(),
        ttl: MIN_TTL,
        lock_delay: Duration::ZERO,
        tls: TlsOptions::default(),
        hostname: "a".into(),
        advertise_url: "http://a:20202".into(),
    })
    .unwrap()
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}

/// The key as it was written at `version`, at the index `index`.
fn key(index: u64, version: u64) -> String {
    let session = "56c5d282-ffdb-3ab2-04ba-b0c941aa2134";
    // {"hostname":"b","advertise-url":"u"}
    let value = "eyJob3N0bmFtZSI6ImIiLCJhZHZlcnRpc2UtdXJsIjoidSJ9";
    let entry = format!(
        r#"[{{"LockIndex":1,"Key":"k","Flags":0,"Value":"{value}","Session":"{session}","CreateIndex":1,"ModifyIndex":{version}}}]"#
    );
    answer("200 OK", &format!("X-Consul-Index: {index}\r\n"), &entry)
}

#[tokio::test]
async fn an_index_that_goes_back_is_not_waited_for() {
    let answers = [key(100, 7), key(100, 7), key(5, 7), key(6, 7), key(8, 8)];
    let (address, requests) = serve(answers.into());
    let leaser = leaser(address);
    assert_eq!(leaser.primary_info().await.unwrap().hostname, "b");
    leaser.watch_primary().await.unwrap();
    let asked: Vec<String> = requests.iter().collect();
    let index = |line: &String| {
        let after = line.split_once("&index=")?.1;
        after.split_once('&')?.0.parse::<u64>().ok()
    };
    let indexes: Vec<_> = asked.iter().map(index).collect();
    let expected = [None, Some(100), Some(100), Some(0), Some(6)];
    assert_eq!(indexes, expected, "{asked:?}");
    assert_eq!(asked[0], "GET /v1/kv/k?consistent HTTP/1.1");
}

#[tokio::test]
async fn what_is_not_consul_is_said_to_be_none() {
    let index = "X-Consul-Index: 1\r\n";
    for wrong in [
        answer("404 Not Found", "", "no such page"),
        answer("200 OK", "", "[]"),
        answer("200 OK", index, "<html>"),
        answer("200 OK", index, r#"[{"Key":"k"}]"#),
        answer("301 Moved", "Location: http://127.0.0.1:1/\r\n", ""),
        answer("200 OK", index, &" ".repeat(9 << 20)),
    ] {
        let (address, _requests) = serve(vec![wrong.clone()]);
        let result = leaser(address).primary_info().await;
        let start = &wrong[..wrong.len().min(60)];
        assert!(
            matches!(result, Err(LeaseError::Fatal { .. })),
            "{start}: {result:?}"
        );
    }
    for passing in [
        answer("500 Internal Server Error", "", "No cluster leader"),
        answer("429 Too Many Requests", "", ""),
        "HTTP/1.1 200 OK\r\nX-Consul-Index: 1\r\nContent-Length: 100\r\n\r\n[".to_owned(),
        String::new(),
    ] {
        let (address, _requests) = serve(vec![passing.clone()]);
        let error = leaser(address).primary_info().await.unwrap_err();
        assert!(error.is_transient(), "{passing}: {error}");
    }
}

#[tokio::test]
async fn a_server_that_never_answers_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let leaser = leaser(listener.local_addr().unwrap());
    let start = Instant::now();
    let error = leaser.acquire().await.err().unwrap();
    assert!(error.is_transient(), "{error}");
    let took = start.elapsed();
    let limit = MIN_TTL / 3;
    assert!(limit <= took && took < limit * 5 / 4, "{took:?}");
}
