//! A TCP proxy whose connections a test can break: refused, delayed, cut or stalled.
//!
//! - A fault applies to the connections that are open as well as to new ones, and has begun when
//!   [`Proxy::set`] returns: nothing is forwarded after that which the fault forbids.
//! - What a stalled connection holds back is forwarded when the stall ends, even if the one who
//!   sent it has gone since: as after a network's outage.
//! - The port stays the proxy's while it refuses connections.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc as orders, watch};
use tokio::time::sleep;

/// What the proxy does to connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: all is forwarded.
    None,
    /// New connections are refused, as if nobody listened; open ones are reset.
    Refuse,
    /// What is read is forwarded that much later, in either direction, up to 64 KiB at a time.
    Delay(Duration),
    /// Open connections are reset, and new ones as soon as they are accepted.
    Cut,
    /// New connections are accepted, and nothing is forwarded.
    Stall,
}

impl Fault {
    fn breaks(self) -> bool {
        matches!(self, Fault::Refuse | Fault::Cut)
    }
}

/// A fault to be set, and who waits until it is.
type Order = (Fault, mpsc::Sender<()>);

/// A proxy on a port of the loopback interface. It ends, and its connections with it, when it is
/// dropped.
pub struct Proxy {
    addr: SocketAddr,
    orders: Option<orders::UnboundedSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy before `target`, which need not be up yet. Panics if there is no port.
    pub fn start(target: SocketAddr) -> Self {
        let (orders, incoming) = orders::unbounded_channel();
        let (started, addr) = mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime for the proxy");
            runtime.block_on(async {
                let socket = bound((Ipv4Addr::LOCALHOST, 0).into());
                let addr = socket.local_addr().expect("the address of the proxy");
                let listener = listening(socket);
                started.send(addr).expect("somebody waits for the proxy");
                serve(listener, addr, target, incoming).await;
            });
        });
        Self {
            addr: addr.recv().expect("the proxy has started"),
            orders: Some(orders),
            thread: Some(thread),
        }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes what happens to connections from now on. Blocks for well under a millisecond.
    pub fn set(&self, fault: Fault) {
        let (done, wait) = mpsc::channel();
        let orders = self.orders.as_ref().expect("it is not dropped");
        orders.send((fault, done)).expect("the proxy runs");
        wait.recv().expect("the proxy runs");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the proxy has panicked");
        }
    }
}

/// A socket that holds the port `addr` and does not listen.
fn bound(addr: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket for the proxy");
    socket.set_reuseaddr(true).expect("SO_REUSEADDR");
    socket
        .bind(addr)
        .unwrap_or_else(|e| panic!("binding the proxy to {addr}: {e}"));
    socket
}

fn listening(socket: TcpSocket) -> TcpListener {
    socket
        .listen(1024)
        .unwrap_or_else(|e| panic!("listening as a proxy: {e}"))
}

/// Accepts connections and carries orders out, until nobody can give any.
async fn serve(
    listener: TcpListener,
    addr: SocketAddr,
    target: SocketAddr,
    mut incoming: orders::UnboundedReceiver<Order>,
) {
    let (fault, _) = watch::channel(Fault::None);
    let mut listener = Some(listener);
    let mut reserved = None;
    loop {
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            order = incoming.recv() => {
                let Some((next, done)) = order else { return };
                if next == Fault::Refuse && listener.take().is_some() {
                    reserved = Some(bound(addr));
                } else if next != Fault::Refuse && let Some(socket) = reserved.take() {
                    listener = Some(listening(socket));
                }
                fault.send_replace(next);
                // Let the connections notice before whoever waits goes on.
                tokio::task::yield_now().await;
                // It may have stopped waiting.
                let _ = done.send(());
            }
            accepted = accept => {
                // A connection may be gone before it is accepted.
                if let Ok((client, _)) = accepted {
                    tokio::spawn(connection(client, target, fault.subscribe()));
                }
            }
        }
    }
}

/// Forwards a connection until it ends or is broken.
async fn connection(client: TcpStream, target: SocketAddr, mut fault: watch::Receiver<Fault>) {
    // Without the reset, whoever it is dropped by would see an orderly end.
    let _ = client.set_zero_linger();
    if pass(&mut fault).await.is_err() {
        return;
    }
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let _ = server.set_zero_linger();
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let both = async {
        tokio::try_join!(
            forward(from_client, to_server, fault.clone()),
            forward(from_server, to_client, fault.clone())
        )
    };
    let mut broken = fault.clone();
    tokio::select! {
        // An error resets both ends, an orderly end of both has been passed on.
        _ = both => {}
        _ = broken.wait_for(|fault| fault.breaks()) => {}
    }
}

/// Forwards one direction to its end.
async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut fault: watch::Receiver<Fault>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await;
        pass(&mut fault).await?;
        match read? {
            0 => return to.shutdown().await,
            n => to.write_all(&buffer[..n]).await?,
        }
    }
}

/// Waits as long as the fault demands it before something is passed on.
async fn pass(fault: &mut watch::Receiver<Fault>) -> io::Result<()> {
    let gone = || io::Error::from(io::ErrorKind::ConnectionReset);
    loop {
        let now = *fault.borrow_and_update();
        match now {
            Fault::None => return Ok(()),
            Fault::Refuse | Fault::Cut => return Err(gone()),
            Fault::Stall => fault.changed().await.map_err(|_| gone())?,
            Fault::Delay(delay) => tokio::select! {
                () = sleep(delay) => return Ok(()),
                changed = fault.changed() => changed.map_err(|_| gone())?,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;

    const SHORT: Duration = Duration::from_millis(200);

    /// Sends back what it gets, on every connection.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        thread::spawn(move || {
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                thread::spawn(move || {
                    let mut out = connection.try_clone().unwrap();
                    io::copy(&mut connection, &mut out)
                });
            }
        });
        addr
    }

    fn connect(proxy: &Proxy) -> io::Result<TcpStream> {
        let connection = TcpStream::connect_timeout(&proxy.addr(), 10 * SHORT)?;
        connection.set_read_timeout(Some(SHORT))?;
        Ok(connection)
    }

    /// Sends `byte` and waits for it to come back.
    fn ask(mut connection: &TcpStream, byte: u8) -> io::Result<()> {
        connection.write_all(&[byte])?;
        answer(connection, byte)
    }

    fn answer(mut connection: &TcpStream, byte: u8) -> io::Result<()> {
        let mut back = [0];
        connection.read_exact(&mut back)?;
        assert_eq!(back, [byte]);
        Ok(())
    }

    fn is_reset(result: io::Result<()>) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        // A write may find the end first, and takes the error with it.
        result.is_err_and(|e| matches!(e.kind(), ConnectionReset | BrokenPipe | UnexpectedEof))
    }

    #[test]
    fn without_a_fault_it_forwards_ends_included() {
        let proxy = Proxy::start(echo());
        let mut connection = connect(&proxy).unwrap();
        ask(&connection, 1).unwrap();
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(connection.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_stall_holds_everything_back_until_it_ends() {
        let proxy = Proxy::start(echo());
        let old = connect(&proxy).unwrap();
        ask(&old, 1).unwrap();
        proxy.set(Fault::Stall);
        let new = connect(&proxy).unwrap();
        for (connection, byte) in [(&old, 2), (&new, 3)] {
            let error = ask(connection, byte).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        }
        proxy.set(Fault::None);
        answer(&old, 2).unwrap();
        answer(&new, 3).unwrap();
    }

    #[test]
    fn cut_and_refused_connections_break_and_new_ones_heal() {
        let proxy = Proxy::start(echo());
        for fault in [Fault::Cut, Fault::Refuse] {
            let old = connect(&proxy).unwrap();
            ask(&old, 1).unwrap();
            proxy.set(fault);
            assert!(is_reset(ask(&old, 2)), "{fault:?}");
            match connect(&proxy) {
                Ok(new) => assert!(fault == Fault::Cut && is_reset(ask(&new, 3))),
                Err(e) if fault == Fault::Refuse => {
                    assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
                }
                // It was reset before the call had returned.
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset),
            }
            proxy.set(Fault::None);
            ask(&connect(&proxy).unwrap(), 4).unwrap();
        }
    }

    #[test]
    fn a_delay_delays_each_way_and_may_be_changed() {
        let proxy = Proxy::start(echo());
        let connection = connect(&proxy).unwrap();
        proxy.set(Fault::Delay(SHORT / 4));
        let start = Instant::now();
        ask(&connection, 1).unwrap();
        assert!(start.elapsed() >= SHORT / 2);
        proxy.set(Fault::Delay(100 * SHORT));
        assert!(ask(&connection, 2).is_err());
        proxy.set(Fault::None);
        answer(&connection, 2).unwrap();
    }

    #[test]
    fn who_is_not_there_resets_the_client() {
        let nobody = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let proxy = Proxy::start(nobody);
        // The reset may come before the connection is reported.
        let asked = connect(&proxy).and_then(|connection| ask(&connection, 1));
        assert!(is_reset(asked));
    }
}
