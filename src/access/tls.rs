//! TLS 1.3: what a node shows and whom it trusts, as a server and as a client.
//!
//! A node has one certificate, which it shows to those who connect and to those to whom it connects.
//! Both sides check against `http.tls.ca`; a client checks the name in the URL besides. No session is
//! resumed: each connection proves itself by the certificates of its own time.

use std::error::Error as StdError;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, Error, InvalidMessage, RootCertStore, ServerConfig};

use crate::config::{ClientAuth, HttpTls};

use super::{AccessError, files};

/// How long before its end a certificate is complained of.
const SOON: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// A time that no certificate reaches: the year 9999.
const FAR: Duration = Duration::from_secs(253_402_300_799);

/// A node's TLS.
pub struct Tls {
    server: Arc<ServerConfig>,
    client: ClientConfig,
    chain: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    /// Whether `roots` are the configuration's, which are to have signed this certificate too.
    own_authority: bool,
    mutual: bool,
    warnings: Vec<String>,
}

/// The cryptography: the same as that of the clients of Consul and etcd.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Tls {
    pub(crate) fn load(config: &HttpTls) -> Result<Tls, AccessError> {
        const CERT: &str = "http.tls.cert";
        const KEY: &str = "http.tls.key";
        const CA: &str = "http.tls.ca";
        let chain = certificates(CERT, &config.cert)?;
        let key = private_key(KEY, &config.key)?;
        let roots = Arc::new(match &config.ca {
            Some(path) => authorities(CA, path)?,
            None => system_authorities(),
        });
        let fail = |key: &str, e: &dyn std::fmt::Display| AccessError::new(key, e.to_string());
        let server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| fail("http.tls", &e))?;
        let server = match config.client_auth {
            ClientAuth::None => server.with_no_client_auth(),
            ClientAuth::Required => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(roots.clone(), provider());
                let verifier = verifier.build().map_err(|e| fail(CA, &e))?;
                server.with_client_cert_verifier(verifier)
            }
        };
        let mut server = server
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|e| match e {
                Error::InconsistentKeys(_) => AccessError::new(
                    KEY,
                    format!(
                        "{} is not the key of the certificate in {}",
                        config.key.display(),
                        config.cert.display()
                    ),
                ),
                e => AccessError::new(CERT, format!("{}: {}", config.cert.display(), told(&e))),
            })?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        server.send_tls13_tickets = 0;
        let identity = Some((chain.clone(), key));
        Ok(Tls {
            server: Arc::new(server),
            client: client_config(roots.clone(), identity).map_err(|e| fail(CERT, &e))?,
            chain,
            roots,
            own_authority: config.ca.is_some(),
            mutual: config.client_auth == ClientAuth::Required,
            warnings: files::exposed(KEY, &config.key).into_iter().collect(),
        })
    }

    /// For connections that are taken.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For connections that are made. Which protocols they offer (ALPN) is the caller's to say.
    pub fn client(&self) -> ClientConfig {
        self.client.clone()
    }

    /// Whether a client has to show a certificate.
    pub fn mutual(&self) -> bool {
        self.mutual
    }

    /// When the certificate ends.
    pub fn valid_until(&self) -> Option<SystemTime> {
        let [cert, rest @ ..] = self.chain.as_slice() else {
            return None;
        };
        // Its time is the first thing that is looked at.
        let far = UnixTime::since_unix_epoch(FAR);
        match verify(cert, rest, &self.roots, far) {
            Err(Error::InvalidCertificate(CertificateError::ExpiredContext {
                not_after, ..
            })) => Some(SystemTime::UNIX_EPOCH + Duration::from_secs(not_after.as_secs())),
            _ => None,
        }
    }

    /// What is wrong with the certificate, so that others will not accept it: its time, its
    /// authority, its purpose, and the name `host` that others know this node by, if it is given.
    pub fn flaws(&self, host: Option<&str>) -> Vec<String> {
        let [cert, rest @ ..] = self.chain.as_slice() else {
            return Vec::new();
        };
        let mut flaws = Vec::new();
        let now = UnixTime::now();
        let mut found = |result: Result<(), Error>| {
            if let Err(e) = result {
                flaws.push(format!("http.tls.cert: {}", told(&e)));
            }
        };
        if self.own_authority {
            let as_server = verify(cert, rest, &self.roots, now);
            let trusted = as_server.is_ok();
            found(as_server);
            if trusted && self.mutual {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider());
                // It was built before.
                if let Ok(verifier) = verifier.build() {
                    let as_client = verifier.verify_client_cert(cert, rest, now);
                    found(as_client.map(drop));
                }
            }
        } else if self
            .valid_until()
            .is_some_and(|end| end < SystemTime::now())
        {
            found(Err(CertificateError::Expired.into()));
        }
        if let Some(host) = host {
            let named = ServerName::try_from(host).ok().map(|name| {
                ParsedCertificate::try_from(cert).and_then(|c| verify_server_name(&c, &name))
            });
            if named.is_none_or(|named| named.is_err()) {
                flaws.push(format!(
                    "http.tls.cert: the certificate is not for {host}, by which the others know this node (lease.advertise-url)"
                ));
            }
        }
        flaws
    }

    /// What is to be said about the files.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings.clone();
        let now = SystemTime::now();
        if let Some(end) = self.valid_until()
            && end > now
            && end < now + SOON
        {
            warnings.push(format!(
                "http.tls.cert: the certificate ends on {}",
                date(end)
            ));
        }
        warnings
    }
}

/// A day, as people write it.
pub fn date(time: SystemTime) -> String {
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.split('T').next().unwrap_or_default().to_owned()
}

/// A client that trusts the authorities of the file `ca`, or the system's, and shows the certificate
/// of the files `cert` and `key` if it is asked.
///
/// # Errors
/// A file that is not there, or is not what it should be; `keys` name them in the error, in the order
/// of the files.
pub fn client(
    keys: [&str; 3],
    ca: Option<&Path>,
    cert: Option<&Path>,
    key: Option<&Path>,
) -> Result<ClientConfig, AccessError> {
    let roots = match ca {
        Some(path) => authorities(keys[0], path)?,
        None => system_authorities(),
    };
    let identity = match (cert, key) {
        (None, None) => None,
        (Some(cert), Some(key)) => Some((certificates(keys[1], cert)?, private_key(keys[2], key)?)),
        _ => {
            let problem = format!("{} and {} must be given together", keys[1], keys[2]);
            return Err(AccessError::new(keys[1], problem));
        }
    };
    client_config(Arc::new(roots), identity).map_err(|e| AccessError::new(keys[1], told(&e)))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client_config(
    roots: Arc<RootCertStore>,
    identity: Option<Identity>,
) -> Result<ClientConfig, Error> {
    let client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots);
    let mut client = match identity {
        Some((chain, key)) => client.with_client_auth_cert(chain, key)?,
        None => client.with_no_client_auth(),
    };
    client.resumption = Resumption::disabled();
    Ok(client)
}

fn verify(
    cert: &CertificateDer<'_>,
    rest: &[CertificateDer<'_>],
    roots: &RootCertStore,
    at: UnixTime,
) -> Result<(), Error> {
    let parsed = ParsedCertificate::try_from(cert)?;
    let algorithms = provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, rest, at, algorithms)
}

/// All certificates of a PEM file.
fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, AccessError> {
    let bad = |why: String| AccessError::new(key, format!("{}: {why}", path.display()));
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files::read(key, path)?).collect();
    match all {
        Ok(all) if all.is_empty() => Err(bad("there is no PEM certificate in it".into())),
        Ok(all) => Ok(all),
        Err(e) => Err(bad(format!("it is no PEM file: {e}"))),
    }
}

fn private_key(key: &str, path: &Path) -> Result<PrivateKeyDer<'static>, AccessError> {
    let read = PrivateKeyDer::from_pem_slice(&files::read(key, path)?);
    // What is in the file is not for a message.
    read.map_err(|_| {
        let problem = format!(
            "{}: there is no PEM private key in it (one without a password)",
            path.display()
        );
        AccessError::new(key, problem)
    })
}

fn authorities(key: &str, path: &Path) -> Result<RootCertStore, AccessError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(key, path)? {
        roots.add(certificate).map_err(|e| {
            let problem = format!("{}: a certificate cannot be used: {e}", path.display());
            AccessError::new(key, problem)
        })?;
    }
    Ok(roots)
}

/// Those that the system trusts; what of them cannot be read is left out.
fn system_authorities() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// What TLS has against the other side, if that is why something failed.
pub fn reason(error: &(dyn StdError + 'static)) -> Option<String> {
    let mut error = Some(error);
    while let Some(at) = error {
        let mut inner = at;
        // What an I/O error wraps is not its source.
        while let Some(wrapped) = inner.downcast_ref().and_then(io::Error::get_ref) {
            inner = wrapped;
        }
        if let Some(tls) = inner.downcast_ref::<Error>() {
            return Some(told(tls));
        }
        // HTTP/2 keeps only the text.
        if let Some(alert) = inner.to_string().strip_prefix("received fatal alert: ") {
            return Some(refused(alert));
        }
        error = inner.source();
    }
    None
}

/// An error of TLS, in words that name what to do.
pub fn told(error: &Error) -> String {
    use CertificateError as C;
    match error {
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "what is there does not speak TLS: either it is to have http.tls, or its URL begins with http"
                .into()
        }
        Error::PeerIncompatible(why) => {
            format!("the other side does not speak TLS 1.3 as it is needed here ({why:?})")
        }
        Error::NoCertificatesPresented => {
            "it shows no certificate, and http.tls.client-auth asks for one".into()
        }
        // The latter if two authorities have one name.
        Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => {
            "the certificate is by an authority that is not in the CA file".into()
        }
        Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => {
            "the certificate has expired".into()
        }
        Error::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            "the certificate is not valid yet: are the clocks right?".into()
        }
        Error::InvalidCertificate(C::InvalidPurpose | C::InvalidPurposeContext { .. }) => {
            "the certificate is not for this purpose: its extended key usage must have both serverAuth and clientAuth".into()
        }
        Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => {
            "the certificate is for another host name".into()
        }
        Error::AlertReceived(alert) => refused(&format!("{alert:?}")),
        other => other.to_string(),
    }
}

/// What the other side means by an alert of this name.
fn refused(alert: &str) -> String {
    match alert {
        "CertificateRequired" => {
            "the other side asks for a certificate, and there is none to show".into()
        }
        "UnknownCA" => {
            "the other side does not know the authority of this side's certificate".into()
        }
        "CertificateExpired" => {
            "the other side says that this side's certificate has expired".into()
        }
        _ => format!("the other side refuses TLS: {alert}"),
    }
}
