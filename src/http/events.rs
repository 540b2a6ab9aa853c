//! `/events`: what happens on the node, as one JSON object a line.
//!
//! The first line says what the node is and goes out at once. A reader has room for
//! [`MAX_BEHIND`] events that it has not taken yet; one more and it is disconnected, so that a reader
//! that stalls costs a bounded amount of memory and learns that it has missed something.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep_until};

use crate::store::{Event, Role};

use super::timestamp::rfc3339;

/// How many events a reader may fall behind.
pub const MAX_BEHIND: usize = 1024;

/// How long a reader may take nothing of what there is for it.
pub const STALL: Duration = Duration::from_secs(30);

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "camelCase")]
enum Line<'a> {
    Init { data: Primary<'a> },
    Tx { db: &'a str, data: Tx },
    PrimaryChange { data: Primary<'a> },
    Divergent { db: &'a str, data: Divergent },
    Fault { db: &'a str, data: Fault<'a> },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Primary<'a> {
    is_primary: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hostname: Option<&'a str>,
}

#[derive(Serialize)]
struct Tx {
    #[serde(rename = "txID")]
    txid: String,
    #[serde(rename = "postApplyChecksum")]
    post_apply_checksum: String,
    #[serde(rename = "pageSize")]
    page_size: u32,
    commit: u32,
    timestamp: String,
}

#[derive(Serialize)]
struct Divergent {
    #[serde(rename = "minTXID")]
    min_txid: String,
    #[serde(rename = "maxTXID")]
    max_txid: String,
    path: String,
}

#[derive(Serialize)]
struct Fault<'a> {
    file: &'static str,
    what: &'a str,
    action: &'static str,
}

/// The first line of the answer.
pub(super) fn init_line(role: &Role) -> Bytes {
    let data = match role {
        Role::Primary => Primary {
            is_primary: true,
            hostname: None,
        },
        Role::Replica { hostname } => Primary {
            is_primary: false,
            hostname: hostname.as_deref(),
        },
    };
    line(&Line::Init { data })
}

fn event_line(event: &Event) -> Bytes {
    line(&match event {
        Event::Tx {
            db,
            pos,
            page_size,
            commit,
            timestamp,
        } => Line::Tx {
            db,
            data: Tx {
                txid: format!("{:016x}", pos.txid),
                post_apply_checksum: format!("{:016x}", pos.checksum),
                page_size: *page_size,
                commit: *commit,
                timestamp: rfc3339(*timestamp),
            },
        },
        Event::PrimaryChange {
            is_primary,
            hostname,
        } => Line::PrimaryChange {
            data: Primary {
                is_primary: *is_primary,
                hostname: hostname.as_deref(),
            },
        },
        Event::Divergent { db, from, to, path } => Line::Divergent {
            db,
            data: Divergent {
                min_txid: format!("{from:016x}"),
                max_txid: format!("{to:016x}"),
                path: path.display().to_string(),
            },
        },
        Event::Fault {
            db,
            place,
            what,
            action,
        } => Line::Fault {
            db,
            data: Fault {
                file: place.name(),
                what,
                action: action.name(),
            },
        },
    })
}

fn line(line: &Line<'_>) -> Bytes {
    // Strings and integers only: there is nothing that could fail to be JSON.
    let mut text = serde_json::to_string(line).unwrap_or_default();
    text.push('\n');
    text.into()
}

/// Why the answer ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The node's store is gone, or it stops.
    Stopped,
    /// The reader went away.
    Gone,
    /// The reader fell too far behind.
    Behind,
    /// The reader takes nothing.
    Stalled,
}

/// Sends events to one reader until it goes away or falls behind, or `stop` resolves.
pub(super) async fn run(
    mut events: broadcast::Receiver<Event>,
    out: &tokio::sync::mpsc::Sender<Bytes>,
    stop: impl Future<Output = ()>,
) -> End {
    let mut waiting: VecDeque<Bytes> = VecDeque::new();
    tokio::pin!(stop);
    // When the reader last took something, or something began to wait for it.
    let mut taken = Instant::now();
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Ok(_) if waiting.len() == MAX_BEHIND => return End::Behind,
                Ok(event) => {
                    if waiting.is_empty() {
                        taken = Instant::now();
                    }
                    waiting.push_back(event_line(&event));
                }
                Err(broadcast::error::RecvError::Lagged(_)) => return End::Behind,
                Err(broadcast::error::RecvError::Closed) => return End::Stopped,
            },
            room = out.reserve(), if !waiting.is_empty() => match room {
                Ok(room) => {
                    taken = Instant::now();
                    room.send(waiting.pop_front().unwrap_or_default());
                }
                Err(_) => return End::Gone,
            },
            () = sleep_until(taken + STALL), if !waiting.is_empty() => return End::Stalled,
            () = out.closed() => return End::Gone,
            () = &mut stop => return End::Stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ltx::Pos;

    #[test]
    fn lines_are_those_of_litefs() {
        let golden = std::fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../shared/fixtures/http/events-consul-a.ndjson"
        ))
        .unwrap();
        let pos = Pos {
            txid: 1,
            checksum: 0xf6e9_e3d7_c3db_b858,
        };
        let change = |is_primary, hostname: Option<&str>| Event::PrimaryChange {
            is_primary,
            hostname: hostname.map(str::to_owned),
        };
        let mut ours = init_line(&Role::Primary).to_vec();
        for event in [
            Event::Tx {
                db: "c.db".into(),
                pos,
                page_size: 4096,
                commit: 2,
                timestamp: 1_795_380_417_814,
            },
            change(false, None),
            change(false, Some("a")),
        ] {
            ours.extend_from_slice(&event_line(&event));
        }
        let golden: Vec<&str> = golden.lines().collect();
        let want = [golden[0], golden[1], golden[3], golden[4]].join("\n") + "\n";
        assert_eq!(String::from_utf8(ours).unwrap(), want);
        assert_eq!(
            init_line(&Role::Replica {
                hostname: Some("a".into())
            }),
            "{\"type\":\"init\",\"data\":{\"isPrimary\":false,\"hostname\":\"a\"}}\n"
        );
    }

    #[test]
    fn what_was_set_aside_is_named() {
        let event = Event::Divergent {
            db: "c.db".into(),
            from: 10,
            to: 31,
            path: "/data/divergent/c.db/1795380417814".into(),
        };
        let want = "{\"type\":\"divergent\",\"db\":\"c.db\",\"data\":{\"minTXID\":\"000000000000000a\",\"maxTXID\":\"000000000000001f\",\"path\":\"/data/divergent/c.db/1795380417814\"}}\n";
        assert_eq!(event_line(&event), want);
    }

    #[test]
    fn a_fault_is_described() {
        let event = Event::Fault {
            db: "c.db".into(),
            place: crate::store::FaultPlace::Checksums,
            what: "its header".into(),
            action: crate::store::FaultAction::Repaired,
        };
        let want = "{\"type\":\"fault\",\"db\":\"c.db\",\"data\":{\"file\":\"checksums\",\"what\":\"its header\",\"action\":\"repaired\"}}\n";
        assert_eq!(event_line(&event), want);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_disconnected() {
        let (events, _) = broadcast::channel(16);
        let (out, mut taken) = tokio::sync::mpsc::channel(1);
        let event = Event::PrimaryChange {
            is_primary: true,
            hostname: None,
        };
        let subscribed = events.subscribe();
        let begun = Instant::now();
        let reader =
            tokio::spawn(async move { run(subscribed, &out, std::future::pending()).await });
        // Nothing to take is no reason.
        tokio::time::sleep(2 * STALL).await;
        events.send(event.clone()).unwrap();
        events.send(event.clone()).unwrap();
        assert_eq!(taken.recv().await.unwrap(), event_line(&event));
        tokio::time::sleep(STALL / 2).await;
        // The second one is in the channel, the third waits.
        events.send(event).unwrap();
        assert_eq!(reader.await.unwrap(), End::Stalled);
        assert_eq!(begun.elapsed(), 3 * STALL + STALL / 2);
    }

    #[tokio::test]
    async fn a_reader_that_falls_behind_is_disconnected() {
        let (events, _) = broadcast::channel(2048);
        let (out, mut taken) = tokio::sync::mpsc::channel(1);
        let subscribed = events.subscribe();
        let reader =
            tokio::spawn(async move { run(subscribed, &out, std::future::pending()).await });
        let event = Event::PrimaryChange {
            is_primary: true,
            hostname: None,
        };
        // One line in the channel and MAX_BEHIND waiting are fine.
        for _ in 0..MAX_BEHIND + 1 {
            events.send(event.clone()).unwrap();
        }
        while !events.is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!reader.is_finished());
        events.send(event.clone()).unwrap();
        assert_eq!(reader.await.unwrap(), End::Behind);
        assert_eq!(taken.recv().await.unwrap(), event_line(&event));
    }
}
