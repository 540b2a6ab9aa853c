//! What a leaser is made with, and what is right and wrong in that.

use std::path::PathBuf;
use std::time::Duration;

use tonic::transport::Endpoint;

/// The shortest TTL: etcd makes shorter ones longer.
const LEAST_TTL: Duration = Duration::from_secs(2);
/// The longest time that a call may take, however long the TTL.
const LONGEST_CALL: Duration = Duration::from_secs(5);

/// What an [`EtcdLeaser`](crate::EtcdLeaser) is made with.
#[derive(Clone)]
pub struct EtcdOptions {
    /// The members' client URLs, `http://…` or `https://…` (or `host:port`, which is the latter if
    /// there is anything in `tls`). One is used at a time, the next when that fails.
    pub endpoints: Vec<String>,
    /// The key that names the primary. What else the cluster keeps is under `KEY/`.
    pub key: String,
    /// How long a lease lasts without being renewed: whole seconds, 2 at least.
    pub ttl: Duration,
    /// The user to authenticate as, if etcd asks for that. It needs to read and write `key` and all
    /// keys that begin with `KEY/`.
    pub username: Option<String>,
    /// The user's password.
    pub password: Option<String>,
    /// For `https://…` endpoints.
    pub tls: Tls,
    /// This node's host name, which is published when it becomes primary.
    pub hostname: String,
    /// This node's base URL, which is published when it becomes primary.
    pub advertise_url: String,
}

/// PEM files for TLS. They are read anew for every connection: a renewed certificate is used from
/// the next one on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    /// The certificates of the authority that has signed etcd's own. Without it the system's
    /// authorities are trusted.
    pub ca: Option<PathBuf>,
    /// A client certificate, if etcd asks for one.
    pub cert: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
}

impl EtcdOptions {
    /// Checks the key and the TTL.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.key.is_empty() || self.key.ends_with('/') {
            let key = &self.key;
            return Err(format!(
                "the key is {key:?}: it must not be empty, nor end in a slash"
            ));
        }
        if self.ttl < LEAST_TTL || self.ttl.subsec_nanos() != 0 {
            let ttl = self.ttl;
            return Err(format!(
                "the TTL is {ttl:?}: it must be a whole number of seconds, 2s at least"
            ));
        }
        if self.tls.cert.is_some() != self.tls.key.is_some() {
            return Err(
                "a client certificate needs its key, and the key its certificate: \
                 set both tls.cert and tls.key, or neither"
                    .into(),
            );
        }
        Ok(())
    }

    /// The endpoints as URLs.
    pub(crate) fn endpoint_urls(&self) -> Result<Vec<String>, String> {
        let secure = self.tls != Tls::default();
        let url = |endpoint: &String| {
            let url = match (endpoint.contains("://"), secure) {
                (true, _) => endpoint.clone(),
                (false, true) => format!("https://{endpoint}"),
                (false, false) => format!("http://{endpoint}"),
            };
            if !url.starts_with("http://") && !url.starts_with("https://") {
                return Err(format!(
                    "the endpoint {endpoint:?} must begin with http:// or https://"
                ));
            }
            if secure && url.starts_with("http://") {
                return Err(format!(
                    "the endpoint {endpoint:?} must begin with https://, since tls is set"
                ));
            }
            Endpoint::from_shared(url.clone())
                .map_err(|e| format!("the endpoint {endpoint:?} is no URL: {e}"))?;
            Ok(url)
        };
        if self.endpoints.is_empty() {
            return Err("there are no endpoints: name etcd's client URLs".into());
        }
        self.endpoints.iter().map(url).collect()
    }

    /// User and password, if both are set.
    pub(crate) fn credentials(&self) -> Result<Option<(String, String)>, String> {
        match (&self.username, &self.password) {
            (Some(user), Some(password)) => Ok(Some((user.clone(), password.clone()))),
            (None, None) => Ok(None),
            _ => Err("a user needs a password, and a password its user: \
                 set both username and password, or neither"
                .into()),
        }
    }

    /// How long a call may take: short enough that renewing, which begins at half of the TTL, can
    /// fail and be tried again before the lease is over.
    pub(crate) fn deadline(&self) -> Duration {
        LONGEST_CALL.min(self.ttl / 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> EtcdOptions {
        EtcdOptions {
            endpoints: vec!["http://127.0.0.1:2379".into(), "other:2379".into()],
            key: "tenure/primary".into(),
            ttl: Duration::from_secs(10),
            username: None,
            password: None,
            tls: Tls::default(),
            hostname: "a".into(),
            advertise_url: "http://a:20202".into(),
        }
    }

    #[test]
    fn endpoints_are_urls_of_one_kind() {
        let urls = ["http://127.0.0.1:2379", "http://other:2379"];
        assert_eq!(options().endpoint_urls().unwrap(), urls);
        let with = |endpoint: &str, tls: Tls| {
            let endpoints = vec![endpoint.to_owned()];
            EtcdOptions {
                endpoints,
                tls,
                ..options()
            }
            .endpoint_urls()
        };
        let tls = Tls {
            ca: Some("ca.pem".into()),
            ..Tls::default()
        };
        assert_eq!(with("a:1", tls.clone()).unwrap(), ["https://a:1"]);
        assert!(with("http://a:1", tls).unwrap_err().contains("https://"));
        assert!(with("ftp://a:1", Tls::default()).is_err());
        assert!(with("http://a b", Tls::default()).is_err());
        let none = EtcdOptions {
            endpoints: vec![],
            ..options()
        };
        assert!(none.endpoint_urls().is_err());
    }

    #[test]
    fn what_belongs_together_is_set_together() {
        assert!(options().check().is_ok());
        for ttl in [Duration::from_secs(1), Duration::from_millis(2500)] {
            assert!(EtcdOptions { ttl, ..options() }.check().is_err());
        }
        for key in ["", "tenure/"] {
            let key = key.to_owned();
            assert!(EtcdOptions { key, ..options() }.check().is_err());
        }
        let tls = Tls {
            cert: Some("cert.pem".into()),
            ..Tls::default()
        };
        assert!(EtcdOptions { tls, ..options() }.check().is_err());
        let username = Some("tenure".to_owned());
        assert!(
            EtcdOptions {
                username,
                ..options()
            }
            .credentials()
            .is_err()
        );
    }

    #[test]
    fn a_call_can_fail_and_be_made_again_within_half_of_the_ttl() {
        assert_eq!(options().deadline(), Duration::from_secs(10) / 3);
        let ttl = Duration::from_secs(60);
        assert_eq!(EtcdOptions { ttl, ..options() }.deadline(), LONGEST_CALL);
    }
}
