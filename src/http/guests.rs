//! Who may hold how much of the server.
//!
//! A guest is whoever connects from one address (an IPv4 address, or a network of 64 bits in IPv6).
//! Invariants:
//! - There are at most [`Limits::connections`] connections, and at most [`Limits::share`] of one guest.
//! - Nobody keeps others out by holding connections: where there is no room for a new one, the one goes
//!   that has carried no request for longest, of the guest that wants more than its share, or else of
//!   the guest that has most. Only where all carry requests is the new one refused.
//! - What a request may hold for long (a thread, a stream, a transfer) has a [`Quota`] of its own,
//!   again with a share for each guest. All quotas together leave room for connections that carry short
//!   requests, and each of those has a deadline.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// An address, as guests are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Guest(u64);

impl Guest {
    /// Whoever is behind this address.
    pub fn behind(addr: IpAddr) -> Guest {
        match addr.to_canonical() {
            IpAddr::V4(v4) => Guest(u64::from(v4.to_bits())),
            // No network of IPv6 begins with 32 zero bits, but the one of the loopback address.
            IpAddr::V6(v6) => Guest((v6.to_bits() >> 64) as u64 | 1 << 63),
        }
    }
}

/// How many connections there may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of all guests.
    pub connections: usize,
    /// Of one.
    pub share: usize,
}

impl Limits {
    /// Those of a node: 1024 connections, 256 of one guest, and never more than a quarter of the files
    /// that the process may have open: the mount needs the rest.
    pub fn of_process() -> Limits {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the call fills the structure, which outlives it.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0;
        let files = if known {
            usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX)
        } else {
            1024
        };
        let connections = (files / 4).clamp(16, 1024);
        Limits {
            connections,
            share: connections / 4,
        }
    }
}

/// The connections that are open.
#[derive(Debug)]
pub(super) struct Guests {
    limits: Limits,
    open: Mutex<HashMap<u64, Arc<Seat>>>,
    next: AtomicU64,
}

/// One connection's place.
#[derive(Debug)]
struct Seat {
    guest: Guest,
    state: Mutex<State>,
    /// It is to end at once.
    aborted: Notify,
}

#[derive(Debug)]
struct State {
    /// Requests that are not answered to the end.
    requests: usize,
    /// Since when there is none.
    idle_since: Instant,
}

/// A connection's right to be there, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Admission {
    guests: Arc<Guests>,
    id: u64,
    seat: Arc<Seat>,
}

impl Seat {
    fn new(guest: Guest) -> Seat {
        let state = State {
            requests: 0,
            idle_since: Instant::now(),
        };
        Seat {
            guest,
            state: Mutex::new(state),
            aborted: Notify::new(),
        }
    }
}

impl Guests {
    pub fn new(limits: Limits) -> Arc<Guests> {
        Arc::new(Guests {
            limits,
            open: Mutex::default(),
            next: AtomicU64::new(0),
        })
    }

    /// Admits a connection, if need be in the place of another; `None`: there is no room.
    pub fn admit(self: &Arc<Guests>, addr: IpAddr) -> Option<Admission> {
        let guest = Guest::behind(addr);
        let mut open = self.open.lock();
        let mut counts: HashMap<Guest, usize> = HashMap::new();
        if open.len() >= self.limits.share {
            for seat in open.values() {
                *counts.entry(seat.guest).or_default() += 1;
            }
        }
        let held = counts.get(&guest).copied().unwrap_or(0);
        let host = if held >= self.limits.share {
            Some(guest)
        } else if open.len() >= self.limits.connections {
            let most = counts.into_iter().max_by_key(|(_, held)| *held);
            most.map(|(guest, _)| guest)
        } else {
            None
        };
        if let Some(host) = host {
            let idle = open
                .iter()
                .filter(|(_, seat)| seat.guest == host)
                .filter_map(|(id, seat)| {
                    let state = seat.state.lock();
                    (state.requests == 0).then_some((state.idle_since, *id))
                });
            let (_, longest) = idle.min()?;
            if let Some(seat) = open.remove(&longest) {
                seat.aborted.notify_one();
            }
        }
        let seat = Arc::new(Seat::new(guest));
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        open.insert(id, Arc::clone(&seat));
        Some(Admission {
            guests: Arc::clone(self),
            id,
            seat,
        })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.guests.open.lock().remove(&self.id);
    }
}

impl Admission {
    /// What requests know of their connection.
    pub fn connection(&self, quotas: &Arc<Quotas>) -> Connection {
        Connection {
            seat: Arc::clone(&self.seat),
            quotas: Arc::clone(quotas),
        }
    }

    /// Resolves when the connection is to end at once.
    pub async fn aborted(&self) {
        self.seat.aborted.notified().await;
    }

    /// Since when it has carried no request; `None`: it carries one.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.seat.state.lock();
        (state.requests == 0).then_some(state.idle_since)
    }
}

/// What a request knows of its connection, as an extension of the request.
#[derive(Debug)]
pub(crate) struct Connection {
    seat: Arc<Seat>,
    quotas: Arc<Quotas>,
}

impl Connection {
    /// Ends the connection at once, with whatever is still to be sent.
    pub fn abort(&self) {
        self.seat.aborted.notify_one();
    }

    /// One without a socket, which nothing is held against.
    #[cfg(test)]
    pub fn simulated() -> Arc<Connection> {
        let limits = Limits {
            connections: 64,
            share: 64,
        };
        Arc::new(Connection {
            seat: Arc::new(Seat::new(Guest(0))),
            quotas: Arc::new(Quotas::new(limits)),
        })
    }

    /// Resolves when it is to end at once.
    #[cfg(test)]
    pub async fn aborted(&self) {
        self.seat.aborted.notified().await;
    }

    /// The connection carries one more request for as long as the guard lives.
    pub(super) fn begin(&self) -> Open {
        self.seat.state.lock().requests += 1;
        Open(Arc::clone(&self.seat))
    }

    /// A place of this kind for the guest. It also makes the connection one that carries a request.
    pub(super) fn place(
        &self,
        kind: impl Fn(&Quotas) -> &Quota,
    ) -> Result<Place, (StatusCode, String)> {
        let quota = kind(&self.quotas);
        quota.take(self.seat.guest)?;
        Ok(Place {
            quota: quota.clone(),
            guest: self.seat.guest,
            _open: self.begin(),
        })
    }
}

/// A request that is open.
#[derive(Debug)]
pub(super) struct Open(Arc<Seat>);

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.requests -= 1;
        state.idle_since = Instant::now();
    }
}

/// What requests hold for long.
#[derive(Debug)]
pub(super) struct Quotas {
    pub streams: Quota,
    pub events: Quota,
    pub transfers: Quota,
    /// Halt locks, their transactions, metrics, common positions, changes of the primary.
    pub jobs: Quota,
}

impl Quotas {
    /// Those that go with so many connections: with 1024 of them there may be 128 replicas (32 of one
    /// guest), 256 readers of `/events` (64), 32 exports and imports (16), and 128 requests that hold
    /// a thread or a body of some size for a moment (64).
    pub fn new(limits: Limits) -> Quotas {
        let of = |part: usize| (limits.connections / part).max(4);
        let quota = |what, total: usize, share: usize| Quota {
            what,
            total,
            share: total / share,
            held: Arc::default(),
        };
        Quotas {
            streams: quota("replicas", of(8), 4),
            events: quota("readers of /events", of(4), 4),
            transfers: quota("exports and imports", of(16).min(32), 2),
            jobs: quota("requests of this kind", of(8), 2),
        }
    }
}

/// How many there may be of something.
#[derive(Clone, Debug)]
pub(super) struct Quota {
    what: &'static str,
    total: usize,
    share: usize,
    held: Arc<Mutex<HashMap<Guest, usize>>>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Place {
    quota: Quota,
    guest: Guest,
    _open: Open,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.quota.held.lock();
        if let Some(n) = held.get_mut(&self.guest) {
            *n -= 1;
            if *n == 0 {
                held.remove(&self.guest);
            }
        }
    }
}

impl Quota {
    fn take(&self, guest: Guest) -> Result<(), (StatusCode, String)> {
        let mut held = self.held.lock();
        let all: usize = held.values().sum();
        let own = held.get(&guest).copied().unwrap_or(0);
        let most = if own >= self.share {
            format!("{} {} from one address", self.share, self.what)
        } else if all >= self.total {
            format!("{} {}", self.total, self.what)
        } else {
            held.insert(guest, own + 1);
            return Ok(());
        };
        let text = format!("there are {most} already, the most there may be: try again later");
        Err((StatusCode::SERVICE_UNAVAILABLE, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guests(connections: usize, share: usize) -> Arc<Guests> {
        Guests::new(Limits { connections, share })
    }

    fn addr(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    fn is_aborted(admission: &Admission) -> bool {
        use futures_util::FutureExt;
        admission.aborted().now_or_never().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn the_idlest_connection_of_the_greediest_guest_makes_room() {
        let guests = guests(4, 3);
        let quotas = Arc::new(Quotas::new(guests.limits));
        let mut greedy = Vec::new();
        for _ in 0..3 {
            greedy.push(guests.admit(addr(1)).unwrap());
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
        let request = greedy[0].connection(&quotas).begin();
        // Its own share is full: its own idlest goes.
        greedy.push(guests.admit(addr(1)).unwrap());
        assert!(is_aborted(&greedy[1]) && !is_aborted(&greedy[0]));
        // All is full: the greedy guest makes room for the others.
        let second = guests.admit(addr(2)).unwrap();
        let third = guests.admit(addr(3)).unwrap();
        assert!(is_aborted(&greedy[2]) && !is_aborted(&second));
        drop(request);
        assert!(greedy[0].idle_since().is_some());
        drop((greedy, second, third));
        assert!(guests.open.lock().is_empty());
    }

    #[tokio::test]
    async fn what_carries_a_request_is_never_ended_for_another() {
        let guests = guests(2, 2);
        let quotas = Arc::new(Quotas::new(guests.limits));
        let all = [
            guests.admit(addr(1)).unwrap(),
            guests.admit(addr(1)).unwrap(),
        ];
        let open: Vec<Open> = all.iter().map(|a| a.connection(&quotas).begin()).collect();
        assert!(guests.admit(addr(2)).is_none() && guests.admit(addr(1)).is_none());
        drop(open);
        assert!(guests.admit(addr(2)).is_some());
        assert!(all.iter().any(is_aborted));
    }

    #[tokio::test]
    async fn quotas_have_a_share_for_each_guest() {
        let guests = guests(1000, 1000);
        let quotas = Arc::new(Quotas::new(Limits {
            connections: 1024,
            share: 256,
        }));
        let connection = |n| guests.admit(addr(n)).unwrap().connection(&quotas);
        let (greedy, other) = (connection(1), connection(2));
        let held: Vec<Place> = std::iter::from_fn(|| greedy.place(|q| &q.transfers).ok()).collect();
        assert_eq!(held.len(), 16);
        let (status, text) = greedy.place(|q| &q.transfers).unwrap_err();
        assert!(status == StatusCode::SERVICE_UNAVAILABLE && text.contains("from one address"));
        let more: Vec<Place> = std::iter::from_fn(|| other.place(|q| &q.transfers).ok()).collect();
        assert_eq!(held.len() + more.len(), 32);
        assert!(connection(3).place(|q| &q.transfers).is_err());
        assert!(greedy.place(|q| &q.streams).is_ok());
        drop((held, more));
        assert!(quotas.transfers.held.lock().is_empty());
    }

    #[test]
    fn networks_are_one_guest() {
        let guest = |text: &str| Guest::behind(text.parse().unwrap());
        assert_eq!(guest("2001:db8::1"), guest("2001:db8::ffff:1"));
        assert_ne!(guest("2001:db8::1"), guest("2001:db8:0:1::1"));
        assert_eq!(guest("::ffff:10.0.0.1"), guest("10.0.0.1"));
        assert_ne!(guest("10.0.0.1"), guest("10.0.0.2"));
    }
}
