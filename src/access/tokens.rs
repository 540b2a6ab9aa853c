//! Bearer tokens: what is accepted, for which rights, and what this node sends.
//!
//! A token that is accepted is kept as its SHA-256 alone. One that is shown is compared with each of
//! them in a time that does not depend on its content or on where it differs.

use std::path::Path;

use http::HeaderValue;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::config::{HttpAuth, Right, TokenConfig, TokenSource};

use super::{AccessError, files};

/// The shortest token, in characters: 16 hexadecimal digits are 64 random bits.
pub const MIN_LEN: usize = 16;
/// The longest token, in characters.
pub const MAX_LEN: usize = 512;
/// Tokens of one file: an old one, a new one, and some.
const MAX_LINES: usize = 16;

/// Why a request is not served.
#[derive(Debug, PartialEq, Eq)]
pub enum Denied<'a> {
    /// It shows no token.
    NoToken,
    /// It shows one that nobody has.
    Unknown,
    /// This one, by its name, does not allow it.
    Right(&'a str),
}

/// The tokens of a node.
pub struct Tokens {
    accepted: Vec<Accepted>,
    /// The value of `Authorization` in this node's own requests.
    send: Option<HeaderValue>,
    /// What is to be said about the files.
    warnings: Vec<String>,
}

struct Accepted {
    name: String,
    digest: [u8; 32],
    rights: Vec<Right>,
}

impl Tokens {
    /// Reads the tokens of `http.auth`. Blocks on the disk.
    ///
    /// # Errors
    /// A file that is not there, or is not what it should be.
    pub fn load(config: &HttpAuth) -> Result<Tokens, AccessError> {
        let mut tokens = Tokens {
            accepted: Vec::new(),
            send: None,
            warnings: Vec::new(),
        };
        for (i, entry) in config.tokens.iter().enumerate() {
            let (key, texts) = tokens.texts(i, entry)?;
            if config.send.as_ref() == Some(&entry.name) {
                tokens.send = texts.first().map(|text| bearer(&key, text)).transpose()?;
            }
            tokens.accepted.extend(texts.iter().map(|text| Accepted {
                name: entry.name.clone(),
                digest: Sha256::digest(text).into(),
                rights: entry.rights.clone(),
            }));
        }
        Ok(tokens)
    }

    /// The tokens of an entry, and the key of the configuration that names them.
    fn texts(
        &mut self,
        i: usize,
        entry: &TokenConfig,
    ) -> Result<(String, Vec<String>), AccessError> {
        let at = format!("http.auth.tokens[{i}]");
        match &entry.source {
            TokenSource::File(path) => {
                let key = format!("{at}.file");
                self.warnings.extend(files::exposed(&key, path));
                Ok((key.clone(), read(&key, path)?))
            }
            TokenSource::Env(name) => {
                let key = format!("{at}.env");
                let text = std::env::var(name).map_err(|_| {
                    AccessError::new(&key, format!("the environment has no {name}"))
                })?;
                let texts = lines(&key, name, text.as_bytes())?;
                Ok((key, texts))
            }
        }
    }

    /// Whether a request that shows this `Authorization` may do what needs `right`; the name of its
    /// token.
    ///
    /// # Errors
    /// When it may not.
    pub fn check(
        &self,
        authorization: Option<&HeaderValue>,
        right: Right,
    ) -> Result<&str, Denied<'_>> {
        let shown = authorization.and_then(|value| token_of(value.as_bytes()));
        let shown: [u8; 32] = match shown {
            None => return Err(Denied::NoToken),
            Some(token) => Sha256::digest(token).into(),
        };
        let mut known = NOBODY;
        let mut allowed = NOBODY;
        for (i, token) in (0..).zip(&self.accepted) {
            let equal = token.digest.ct_eq(&shown);
            let right = Choice::from(u8::from(token.allows(right)));
            known.conditional_assign(&i, equal);
            allowed.conditional_assign(&i, equal & right);
        }
        match (self.name(allowed), self.name(known)) {
            (Some(name), _) => Ok(name),
            (None, Some(name)) => Err(Denied::Right(name)),
            (None, None) => Err(Denied::Unknown),
        }
    }

    fn name(&self, i: u32) -> Option<&str> {
        let token = self.accepted.get(usize::try_from(i).ok()?)?;
        Some(&token.name)
    }

    /// The `Authorization` of this node's own requests, if it is to have one.
    pub fn send(&self) -> Option<HeaderValue> {
        self.send.clone()
    }

    /// What is to be said about the files.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// The number of no token.
const NOBODY: u32 = u32::MAX;

impl Accepted {
    fn allows(&self, right: Right) -> bool {
        self.rights.contains(&right) || self.rights.contains(&Right::Admin)
    }
}

/// The token in the value of an `Authorization`.
fn token_of(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, token) = value.split_at_checked(SCHEME.len())?;
    scheme
        .eq_ignore_ascii_case(SCHEME)
        .then(|| token.trim_ascii())
        .filter(|token| !token.is_empty())
}

/// The value of an `Authorization` that shows this token; nothing prints it.
pub fn bearer(key: &str, token: &str) -> Result<HeaderValue, AccessError> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}"))
        .map_err(|_| AccessError::new(key, "a token has characters that no header can have"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The tokens in a file, which the key `key` names; one at least.
pub fn read(key: &str, path: &Path) -> Result<Vec<String>, AccessError> {
    lines(key, &path.display().to_string(), &files::read(key, path)?)
}

/// The tokens in what the key `key` names: one a line; one at least.
pub fn lines(key: &str, place: &str, bytes: &[u8]) -> Result<Vec<String>, AccessError> {
    let fail = |problem: String| Err(AccessError::new(key, format!("{place}: {problem}")));
    let Ok(text) = std::str::from_utf8(bytes) else {
        return fail("it is no text".into());
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~+/=".contains(c);
    let mut tokens = Vec::new();
    for (i, line) in (1..).zip(text.lines()) {
        let token = line.trim();
        if token.is_empty() {
            continue;
        }
        // The token itself is not repeated.
        if !(MIN_LEN..=MAX_LEN).contains(&token.len()) {
            return fail(format!(
                "line {i} has {} characters: a token has {MIN_LEN} to {MAX_LEN}; \"openssl rand -hex 32\" makes one",
                token.len()
            ));
        }
        if !token.chars().all(plain) {
            return fail(format!(
                "line {i} has other characters than letters, digits and -._~+/="
            ));
        }
        if tokens.len() == MAX_LINES {
            return fail(format!("it has more than {MAX_LINES} tokens"));
        }
        tokens.push(token.to_owned());
    }
    if tokens.is_empty() {
        return fail("there is no token in it".into());
    }
    Ok(tokens)
}
