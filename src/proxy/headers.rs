//! What a proxy changes in the headers of what it passes on (RFC 9110, section 7.6).
//!
//! Fields that are meant for one connection end with it; the framing of a body (its length, chunks) is
//! the HTTP library's. An upgrade is the one thing of a connection that is passed on.

use std::net::IpAddr;

use http::header::{self, HeaderName};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Version};

/// Fields of one connection, besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The words of a list like that of `Connection`, over all its fields.
fn words(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|word| !word.is_empty())
}

/// The protocol that a message wants to change to or changes to, if it does.
pub fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asks = words(headers, header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade"));
    headers.get(header::UPGRADE).filter(|_| asks).cloned()
}

/// Takes off what was meant for the connection that the message came on.
pub fn end_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = words(headers, header::CONNECTION)
        .filter_map(|word| word.parse().ok())
        .collect();
    // Two lengths are how requests are smuggled: chunks win, as they do in the library.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    // A sender may name any field; without these the message would be another one.
    let kept = [header::CONTENT_LENGTH, header::HOST];
    for name in named.iter().filter(|name| !kept.contains(name)) {
        headers.remove(name);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    let trailers = words(headers, header::TE).any(|word| word.eq_ignore_ascii_case("trailers"));
    headers.remove(header::TE);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// Has a message ask for, or agree to, a change of protocol.
pub fn set_upgrade(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, protocol);
}

/// Makes a request that came from `client` one that can be passed on over HTTP/1.1. The host that the
/// client asked for stays.
pub fn pass_on(parts: &mut Parts, client: IpAddr) {
    end_hop(&mut parts.headers);
    parts.version = Version::HTTP_11;
    // HTTP/2's `:authority`, or a request in absolute form: what it says counts.
    if let Some(authority) = parts.uri.authority() {
        let host = authority.as_str();
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        if let Ok(host) = HeaderValue::from_str(host) {
            parts.headers.insert(header::HOST, host);
        }
    }
    // HTTP/2 may send cookies one by one; HTTP/1.1 knows one field.
    join(&mut parts.headers, header::COOKIE, "; ", None);
    let client = client.to_canonical().to_string();
    join(&mut parts.headers, X_FORWARDED_FOR, ", ", Some(&client));
    parts
        .headers
        .entry(X_FORWARDED_PROTO)
        .or_insert(HeaderValue::from_static("http"));
}

/// Makes one field of all those of this name and of `more`; leaves a single one, or none, as it is.
fn join(headers: &mut HeaderMap, name: HeaderName, separator: &str, more: Option<&str>) {
    let fields = headers.get_all(&name).iter().map(HeaderValue::as_bytes);
    let all: Vec<&[u8]> = fields.chain(more.map(str::as_bytes)).collect();
    if all.len() < 2 && more.is_none() {
        return;
    }
    if let Ok(value) = HeaderValue::from_bytes(&all.join(separator.as_bytes())) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(fields: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri("/");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn fields_of_a_connection_end_with_it() {
        let mut request = parts(&[
            ("connection", "keep-alive, X-Mine,, host"),
            ("connection", "content-length"),
            ("keep-alive", "timeout=5"),
            ("x-mine", "1"),
            ("proxy-connection", "close"),
            ("te", "gzip, Trailers"),
            ("upgrade", "h2c"),
            ("host", "app"),
            ("content-length", "3"),
            ("x-other", "2"),
        ]);
        end_hop(&mut request.headers);
        let mut left: Vec<&str> = request.headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "te", "x-other"]);
        assert_eq!(request.headers["te"], "trailers");
    }

    #[test]
    fn chunks_and_a_length_are_chunks() {
        let mut request = parts(&[("transfer-encoding", "chunked"), ("content-length", "3")]);
        end_hop(&mut request.headers);
        assert!(request.headers.is_empty());
    }

    #[test]
    fn upgrades_are_found() {
        let asked = parts(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
        ]);
        assert_eq!(upgrade(&asked.headers).unwrap(), "websocket");
        assert!(upgrade(&parts(&[("upgrade", "websocket")]).headers).is_none());
        assert!(upgrade(&parts(&[("connection", "upgrade")]).headers).is_none());
    }

    #[test]
    fn the_client_is_told() {
        let client: IpAddr = "::ffff:10.0.0.9".parse().unwrap();
        let mut request = parts(&[("cookie", "a=b"), ("host", "app:80")]);
        pass_on(&mut request, client);
        assert_eq!(request.headers["x-forwarded-for"], "10.0.0.9");
        assert_eq!(request.headers["x-forwarded-proto"], "http");
        assert_eq!(request.headers["cookie"], "a=b");
        assert_eq!(request.headers["host"], "app:80");

        let mut request = parts(&[
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-for", "2.2.2.2"),
            ("x-forwarded-proto", "https"),
            ("cookie", "a=b"),
            ("cookie", "c=d"),
            ("host", "other"),
        ]);
        request.uri = "http://u:p@app:81/".parse().unwrap();
        pass_on(&mut request, client);
        assert_eq!(
            request.headers["x-forwarded-for"],
            "1.1.1.1, 2.2.2.2, 10.0.0.9"
        );
        assert_eq!(request.headers["x-forwarded-proto"], "https");
        assert_eq!(request.headers["cookie"], "a=b; c=d");
        assert_eq!(request.headers["host"], "app:81");
    }
}
