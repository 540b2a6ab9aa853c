//! The cookie `__txid`: the newest transaction that a client has written, 16 hex digits.
//!
//! It comes from the network: whatever is no such cookie is as if there were none.

use std::time::SystemTime;

use http::{HeaderMap, HeaderValue, header};

use crate::ltx::parse_txid;

use super::COOKIE_LIFETIME;

const NAME: &[u8] = b"__txid";

/// The TXID that the client asks for; the highest, if it sends several cookies. `None`: any state will do.
pub fn wanted(headers: &HeaderMap) -> Option<u64> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
        .filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            let (name, value) = (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii());
            if name != NAME {
                return None;
            }
            parse_txid(std::str::from_utf8(value).ok()?)
        })
        .max()
        .filter(|txid| *txid > 0)
}

/// The header's value that gives the client a cookie of this TXID, set at `now`.
pub fn issued(txid: u64, now: SystemTime) -> Option<HeaderValue> {
    let expires = httpdate::fmt_http_date(now + COOKIE_LIFETIME);
    HeaderValue::try_from(format!(
        "__txid={txid:016x}; Path=/; Expires={expires}; HttpOnly"
    ))
    .ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn wanted_of(cookies: &[&[u8]]) -> Option<u64> {
        let mut headers = HeaderMap::new();
        for cookie in cookies {
            headers.append(header::COOKIE, HeaderValue::from_bytes(cookie).unwrap());
        }
        wanted(&headers)
    }

    #[test]
    fn cookies_are_read() {
        let two_a = Some(0x2a);
        for (cookies, txid) in [
            (&[b"__txid=000000000000002a" as &[u8]] as &[&[u8]], two_a),
            (&[b"a=b; __txid=000000000000002A ;c=d"], two_a),
            (&[b"a=b", b" __txid = 000000000000002a"], two_a),
            (
                &[b"__txid=0000000000000001; __txid=000000000000002a"],
                two_a,
            ),
            (&[b"__txid=x; __txid=000000000000002a; __txid="], two_a),
            (&[b"__txid=ffffffffffffffff"], Some(u64::MAX)),
        ] {
            assert_eq!(wanted_of(cookies), txid, "{cookies:?}");
        }
    }

    #[test]
    fn what_is_no_cookie_of_ours_is_ignored() {
        for cookie in [
            b"" as &[u8],
            b"=",
            b";;;",
            b"__txid",
            b"__txid=",
            b"__txid=2a",
            b"__txid=+00000000000002a",
            b"__txid=000000000000002g",
            b"__txid=000000000000002a0",
            b"__txid=0000000000000000",
            b"__txid=\xff\xfe00000000000000",
            b"x__txid=000000000000002a",
            b"__TXID=000000000000002a",
            b"a=__txid=000000000000002a",
        ] {
            assert_eq!(wanted_of(&[cookie]), None, "{cookie:?}");
        }
        assert_eq!(wanted_of(&[]), None);
    }

    #[test]
    fn cookies_are_issued() {
        let value = issued(0x2a, UNIX_EPOCH + Duration::from_secs(1_795_380_353));
        assert_eq!(
            value.unwrap(),
            "__txid=000000000000002a; Path=/; Expires=Sun, 22 Nov 2026 20:50:53 GMT; HttpOnly"
        );
    }
}
