//! Which way a request goes: by its method and its path.
//!
//! Paths are compared after percent-decoding, as the application sees them: `/%77rite` must not slip
//! past a pattern for `/write`. The query is no part of a path.

use http::Method;
use percent_encoding::percent_decode_str;

use crate::config::ProxyConfig;

/// The path of the health check, which no pattern can take away.
pub const HEALTH_PATH: &str = "/litefs/health";

/// The way that a request goes; see the module `proxy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The proxy's own answer.
    Health,
    /// To the application untouched.
    Passthrough,
    /// To the application, once this node is as new as the client's cookie.
    Read,
    /// To the primary's application.
    Write,
}

/// What the configuration says of paths.
#[derive(Debug)]
pub struct Rules {
    passthrough: Vec<Vec<u8>>,
    always_forward: Vec<Vec<u8>>,
}

impl Rules {
    /// Those of `proxy.passthrough` and `proxy.always-forward`.
    pub fn new(config: &ProxyConfig) -> Rules {
        let bytes = |patterns: &[String]| patterns.iter().map(|p| p.clone().into_bytes()).collect();
        Rules {
            passthrough: bytes(&config.passthrough),
            always_forward: bytes(&config.always_forward),
        }
    }

    /// The way of a request. `forwarded`: another node has sent it here as a write.
    pub fn route(&self, method: &Method, path: &str, forwarded: bool) -> Route {
        let decoded: Vec<u8> = percent_decode_str(path).collect();
        let any = |patterns: &[Vec<u8>]| patterns.iter().any(|p| matches(p, &decoded));
        let reads = matches!(*method, Method::GET | Method::HEAD);
        if reads && path == HEALTH_PATH {
            Route::Health
        } else if any(&self.passthrough) {
            Route::Passthrough
        } else if reads && !forwarded && !any(&self.always_forward) {
            Route::Read
        } else {
            Route::Write
        }
    }
}

/// Whether `pattern`, in which `*` stands for any bytes or none, is the whole of `text`.
///
/// Takes at most `pattern.len() * text.len()` steps, whatever the two are.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where the last star is, and how far into the text it has been stretched.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(byte) if *byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, end)) = star else {
                    return false;
                };
                star = Some((at, end + 1));
                p = at + 1;
                t = end + 1;
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_paths() {
        for (pattern, path, expected) in [
            ("/a", "/a", true),
            ("/a", "/ab", false),
            ("/a", "/", false),
            ("", "", true),
            ("", "/", false),
            ("*", "", true),
            ("*", "/x/y", true),
            ("/a/*", "/a/", true),
            ("/a/*", "/a/b/c", true),
            ("/a/*", "/a", false),
            ("*.png", "/x/y.png", true),
            ("*.png", "/x/y.png.exe", false),
            ("/a*b*c", "/abc", true),
            ("/a*b*c", "/a-b-b-c", true),
            ("/a*b*c", "/a-c-b", false),
            ("/a**", "/a", true),
            ("/a.c", "/abc", false),
            ("/[a]", "/a", false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), path.as_bytes()),
                expected,
                "{pattern} {path}"
            );
        }
    }

    #[test]
    fn a_hostile_path_costs_little() {
        let path = "a".repeat(60_000);
        let started = std::time::Instant::now();
        assert!(!matches("*a*a*a*a*a*a*a*a*b".as_bytes(), path.as_bytes()));
        assert!(started.elapsed().as_secs() < 5);
    }

    #[test]
    fn methods_and_paths_decide() {
        let rules = Rules::new(&ProxyConfig {
            passthrough: vec!["/static/*".into(), "*.css".into()],
            always_forward: vec!["/write*".into(), "/static/x".into()],
            ..ProxyConfig::default()
        });
        for (method, path, forwarded, route) in [
            (Method::GET, "/", false, Route::Read),
            (Method::HEAD, "/", false, Route::Read),
            (Method::POST, "/", false, Route::Write),
            (Method::OPTIONS, "/", false, Route::Write),
            (Method::GET, "/", true, Route::Write),
            (Method::GET, "/write", false, Route::Write),
            (Method::GET, "/%77rite/1", false, Route::Write),
            (Method::GET, "/rewrite", false, Route::Read),
            (Method::GET, "/static/x", false, Route::Passthrough),
            (Method::POST, "/a.css", false, Route::Passthrough),
            (Method::GET, "/litefs/health", false, Route::Health),
            (Method::POST, "/litefs/health", false, Route::Write),
            (Method::GET, "/%ff%zz%", false, Route::Read),
        ] {
            assert_eq!(
                rules.route(&method, path, forwarded),
                route,
                "{method} {path}"
            );
        }
        let all = Rules::new(&ProxyConfig {
            passthrough: vec!["*".into()],
            ..ProxyConfig::default()
        });
        let health = all.route(&Method::GET, HEALTH_PATH, false);
        assert_eq!(health, Route::Health, "a pattern hides the health check");
    }
}
