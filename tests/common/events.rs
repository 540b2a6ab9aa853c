//! A node's `/events`, read as they come.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{Node, SOON};

/// The lines of a node's `/events`.
pub struct Events(BufReader<TcpStream>);

impl Events {
    /// Returns once the first line has come.
    pub fn of(node: &Node) -> Events {
        let connect = || TcpStream::connect(&node.options.http).expect("connect to the node");
        let mut stream = node.in_namespace(connect);
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .expect("set a limit");
        write!(stream, "GET /events HTTP/1.0\r\n\r\n").expect("ask for events");
        let mut events = Events(BufReader::new(stream));
        events.next("init");
        events
    }

    /// The next line of this type.
    pub fn next(&mut self, kind: &str) -> String {
        let begin = format!("{{\"type\":\"{kind}\",");
        let deadline = Instant::now() + SOON;
        let mut line = String::new();
        loop {
            assert!(Instant::now() < deadline, "no event {kind}");
            match self.0.read_line(&mut line) {
                Ok(0) => panic!("the events have ended before one of {kind}"),
                Ok(_) if line.starts_with(&begin) => return line.trim().to_string(),
                Ok(_) => line.clear(),
                // It goes on with the rest of the line.
                Err(_) => {}
            }
        }
    }
}
