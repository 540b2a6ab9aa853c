//! HTTP/2 by hand: frames as a hostile peer sends them, without a library that would not.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Types of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

/// Flags of frames.
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The bytes of a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// The fields of a request, as a block of headers.
pub fn request(method: &str, path: &str) -> Vec<u8> {
    // :scheme http, then literals without indexing whose names are in the static table.
    let mut block = vec![0x86];
    for (index, value) in [(2u8, method), (4, path), (1, "x")] {
        block.extend([index, value.len() as u8]);
        block.extend_from_slice(value.as_bytes());
    }
    block
}

/// A connection with HTTP/2 begun on it.
pub struct Connection(pub TcpStream);

impl Connection {
    /// Connects; what the server sends on a stream is limited by `window`, and nothing more is ever
    /// allowed.
    pub fn open(address: &str, window: u32) -> io::Result<Connection> {
        Connection::begin(TcpStream::connect(address)?, window)
    }

    /// Begins HTTP/2 on a connection.
    pub fn begin(stream: TcpStream, window: u32) -> io::Result<Connection> {
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let mut connection = Connection(stream);
        connection.0.write_all(PREFACE)?;
        let initial_window = [&[0, 4][..], &window.to_be_bytes()].concat();
        connection.send(SETTINGS, 0, 0, &initial_window)?;
        Ok(connection)
    }

    /// Sends a frame.
    pub fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        self.0.write_all(&frame(kind, flags, stream, payload))
    }

    /// Sends a request whose body, if it has one, is these bytes.
    pub fn ask(
        &mut self,
        stream: u32,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
    ) -> io::Result<()> {
        let flags = if body.is_some() {
            END_HEADERS
        } else {
            END_HEADERS | END_STREAM
        };
        self.send(HEADERS, flags, stream, &request(method, path))?;
        match body {
            Some(body) => self.send(DATA, END_STREAM, stream, body),
            None => Ok(()),
        }
    }

    /// The next frame: its type, flags, stream and payload.
    pub fn receive(&mut self) -> io::Result<(u8, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head)?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; len];
        self.0.read_exact(&mut payload)?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Ok((head[3], head[4], stream, payload))
    }

    /// Reads until the server ends the connection, and says so at the end or does not; how many frames
    /// of each type came.
    pub fn drain(&mut self) -> [usize; 16] {
        let mut counts = [0; 16];
        while let Ok((kind, ..)) = self.receive() {
            counts[usize::from(kind).min(15)] += 1;
        }
        counts
    }
}

/// A connection to `address` that comes from `from`, an address of this machine.
pub fn connect_from(from: [u8; 4], address: &str) -> io::Result<TcpStream> {
    let to: SocketAddr = address.parse().expect("an address");
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect_timeout(&to.into(), Duration::from_secs(10))?;
    Ok(socket.into())
}
