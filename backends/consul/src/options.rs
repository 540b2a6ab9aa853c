//! How a node reaches Consul, and under which key its cluster's lease is.
//!
//! Everything that can be wrong without asking Consul is found here, when the node starts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::{Certificate, Identity, Url};
use tenure_lease::LeaseError;

/// The least TTL that Consul takes for a session.
pub const MIN_TTL: Duration = Duration::from_secs(10);
/// The greatest TTL that Consul takes for a session.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);
/// The greatest lock-delay that Consul takes.
pub const MAX_LOCK_DELAY: Duration = Duration::from_secs(60);

/// The configuration of the Consul backend: `lease.consul`, and who this node is. It holds the
/// token and is therefore not printable.
#[derive(Clone)]
pub struct ConsulOptions {
    /// `http://HOST:PORT` or `https://…`. A password in it (`http://:TOKEN@HOST:PORT`) is the ACL
    /// token; a path becomes a prefix of every key and of the name of the sessions' catalog node.
    pub url: String,
    /// The key that the primary holds; what else the cluster stores is below it.
    pub key: String,
    /// How long the lease lasts without being renewed: [`MIN_TTL`] to [`MAX_TTL`]. Consul may take
    /// up to twice as long until it notices.
    pub ttl: Duration,
    /// How long nobody can have the key after its holder was lost (not: gave up); at most
    /// [`MAX_LOCK_DELAY`].
    pub lock_delay: Duration,
    /// For `https`.
    pub tls: TlsOptions,
    /// The host name that is published when this node is primary.
    pub hostname: String,
    /// The base URL that is published when this node is primary.
    pub advertise_url: String,
}

/// PEM files for `https`, read once.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// The authorities that may have signed Consul's certificate, in place of the system's.
    pub ca: Option<PathBuf>,
    /// This node's certificate, where Consul asks for one; with `key`.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
}

/// What a URL holds beside the address.
pub(crate) struct Address {
    /// Scheme, host and port: no path, no user.
    pub base: Url,
    pub token: Option<HeaderValue>,
    /// The path without slashes at its ends; empty if there is none.
    pub prefix: String,
}

fn wrong(what: &str, why: impl Into<String>) -> LeaseError {
    LeaseError::fatal(
        format!("reading the configuration lease.consul.{what}"),
        why.into(),
    )
}

/// Takes the configured URL apart. The errors do not repeat it: it may hold a token.
pub(crate) fn address(url: &str) -> Result<Address, LeaseError> {
    let mut base = Url::parse(url).map_err(|e| {
        wrong(
            "url",
            format!("{e}: it should look like http://localhost:8500"),
        )
    })?;
    if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
        return Err(wrong(
            "url",
            "it must begin with http://HOST or https://HOST",
        ));
    }
    if base.query().is_some() || base.fragment().is_some() {
        return Err(wrong("url", "it must have no query and no fragment"));
    }
    let token = match base.password() {
        None | Some("") => None,
        Some(token) => {
            let token = percent_decoded(token)?;
            let mut token = HeaderValue::from_str(&token)
                .map_err(|_| wrong("url", "its password is no Consul token"))?;
            token.set_sensitive(true);
            Some(token)
        }
    };
    let prefix = percent_decoded(base.path())?;
    let prefix = clean_path("url", prefix.trim_start_matches('/'), true)?;
    // Both fail only for URLs without a host.
    let _ = base.set_password(None);
    let _ = base.set_username("");
    base.set_path("/");
    Ok(Address {
        base,
        token,
        prefix,
    })
}

fn percent_decoded(text: &str) -> Result<String, LeaseError> {
    let invalid = || {
        wrong(
            "url",
            "it has a % that is not followed by two hexadecimal digits of UTF-8",
        )
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(invalid());
        };
        bytes.push((high << 4 | low) as u8);
    }
    String::from_utf8(bytes).map_err(|_| invalid())
}

/// A key as LiteFS would write it: no empty parts. Parts that a URL would swallow are refused.
fn clean_path(what: &str, path: &str, may_be_empty: bool) -> Result<String, LeaseError> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| matches!(*part, "." | "..")) {
        return Err(wrong(what, "it must not have the parts . and .."));
    }
    if parts.is_empty() && !may_be_empty {
        return Err(wrong(what, "it must not be empty"));
    }
    if path.len() > 400 || path.contains(char::is_control) {
        return Err(wrong(
            what,
            "it must have at most 400 bytes and no control characters",
        ));
    }
    Ok(parts.join("/"))
}

/// The whole key, with the URL's prefix.
pub(crate) fn key(prefix: &str, key: &str) -> Result<String, LeaseError> {
    if key.starts_with('/') {
        return Err(wrong("key", "it must not begin with a /"));
    }
    let key = clean_path("key", key, false)?;
    Ok(if prefix.is_empty() {
        key
    } else {
        format!("{prefix}/{key}")
    })
}

/// Checks what Consul would refuse at every acquisition.
pub(crate) fn check_times(ttl: Duration, lock_delay: Duration) -> Result<(), LeaseError> {
    if !(MIN_TTL..=MAX_TTL).contains(&ttl) {
        return Err(wrong(
            "ttl",
            format!("it is {ttl:?}, but Consul takes 10s to 24h"),
        ));
    }
    if lock_delay > MAX_LOCK_DELAY {
        return Err(wrong(
            "lock-delay",
            format!("it is {lock_delay:?}, but Consul takes at most 60s"),
        ));
    }
    Ok(())
}

/// An HTTP client. It keeps no connection for the next request: one that hangs (a stalled agent, a
/// firewall that drops) then harms the request that met it and no other.
pub(crate) fn http_client(tls: &TlsOptions) -> Result<reqwest::Client, LeaseError> {
    // Of a peer that has vanished, the kernel knows after about 11 s; a watch waits for longer.
    let mut client = reqwest::Client::builder()
        .no_proxy()
        .http1_only()
        .use_rustls_tls()
        .redirect(reqwest::redirect::Policy::none())
        .pool_max_idle_per_host(0)
        .tcp_keepalive(Duration::from_secs(5))
        .tcp_keepalive_interval(Duration::from_secs(2))
        .tcp_keepalive_retries(3);
    if let Some(path) = &tls.ca {
        let pem = pem("tls.ca", path)?;
        let invalid = |why: String| wrong("tls.ca", format!("{}: {why}", path.display()));
        let all = Certificate::from_pem_bundle(&pem).map_err(|e| invalid(e.to_string()))?;
        if all.is_empty() {
            return Err(invalid("there is no PEM certificate in it".into()));
        }
        client = client.tls_built_in_root_certs(false);
        for certificate in all {
            client = client.add_root_certificate(certificate);
        }
    }
    match (&tls.cert, &tls.key) {
        (None, None) => {}
        (Some(cert), Some(key)) => {
            let mut both = pem("tls.cert", cert)?;
            both.push(b'\n');
            both.extend(pem("tls.key", key)?);
            let identity = Identity::from_pem(&both).map_err(|e| {
                let files = format!("{} and {}", cert.display(), key.display());
                wrong(
                    "tls.cert",
                    format!("{files} are no certificate and private key: {e}"),
                )
            })?;
            client = client.identity(identity);
        }
        _ => return Err(wrong("tls", "cert and key must be given together")),
    }
    client
        .build()
        .map_err(|e| LeaseError::fatal("setting up the client of Consul", e))
}

fn pem(what: &str, path: &Path) -> Result<Vec<u8>, LeaseError> {
    std::fs::read(path).map_err(|e| wrong(what, format!("reading {}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_holds_token_and_prefix() {
        let a = address("https://x:se%2Fcret@consul:8501//a%20b/c/").unwrap();
        assert_eq!(a.base.as_str(), "https://consul:8501/");
        assert_eq!(a.token.unwrap().to_str().unwrap(), "se/cret");
        assert_eq!(a.prefix, "a b/c");
        let a = address("http://localhost:8500").unwrap();
        assert_eq!((a.token, a.prefix.as_str()), (None, ""));
    }

    #[test]
    fn urls_that_are_none_are_refused_without_repeating_them() {
        for url in [
            "",
            "consul",
            "localhost:8500",
            "ftp://:secret@x",
            "http://:secret@x?y=1",
            "http://:sec%zzret@x",
            "http://:sec%0aret@x",
            "http://:secret@x:99999",
        ] {
            let error = address(url).err().unwrap_or_else(|| panic!("took {url:?}"));
            assert!(matches!(error, LeaseError::Fatal { .. }), "{error:?}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn keys_are_cleaned_as_litefs_does() {
        assert_eq!(key("", "litefs/primary").unwrap(), "litefs/primary");
        assert_eq!(
            key("a/b", "litefs//primary/").unwrap(),
            "a/b/litefs/primary"
        );
        for bad in ["", "/x", "a/../b", "./a", "a\nb", "//"] {
            assert!(key("", bad).is_err(), "took {bad:?}");
        }
        assert!(key("", &"x".repeat(401)).is_err());
    }

    #[test]
    fn times_are_those_that_consul_takes() {
        let second = Duration::from_secs(1);
        check_times(MIN_TTL, second).unwrap();
        check_times(MAX_TTL, MAX_LOCK_DELAY).unwrap();
        let error = check_times(second, second).unwrap_err();
        assert!(error.to_string().contains("lease.consul.ttl"), "{error}");
        assert!(check_times(MAX_TTL + second, second).is_err());
        assert!(check_times(MIN_TTL, MAX_LOCK_DELAY + second).is_err());
    }

    #[test]
    fn missing_and_senseless_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.pem");
        let of = |ca: Option<&Path>, cert: Option<&Path>, key: Option<&Path>| {
            let [ca, cert, key] = [ca, cert, key].map(|path| path.map(Path::to_owned));
            http_client(&TlsOptions { ca, cert, key })
        };
        assert!(of(None, None, None).is_ok());
        let error = of(Some(&file), None, None).unwrap_err().to_string();
        assert!(
            error.contains("tls.ca") && error.contains("x.pem"),
            "{error}"
        );
        std::fs::write(&file, "nothing").unwrap();
        assert!(of(Some(&file), None, None).is_err());
        assert!(of(None, Some(&file), Some(&file)).is_err());
        assert!(of(None, Some(&file), None).is_err());
    }
}
