//! A certificate authority of a test's own, and what it issues, as PEM files.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::process::write;

/// A private certificate authority, which no system trusts.
pub struct Authority {
    dir: PathBuf,
    ca: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate with its private key and its authority: PEM files in the authority's directory.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key, PKCS#8.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority, whose files are kept in `dir` (which exists).
    pub fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let name = &mut params.distinguished_name;
        let number: u32 = rand::random();
        name.push(
            DnType::CommonName,
            format!("Tenure test authority {number}"),
        );
        let key = made("the authority's key", KeyPair::generate());
        let issuer = made("the authority", CertifiedIssuer::self_signed(params, key));
        let ca = dir.join("ca.pem");
        write(&ca, &issuer.pem());
        let dir = dir.to_owned();
        Self { dir, ca, issuer }
    }

    /// The authority's certificate.
    pub fn ca(&self) -> &Path {
        &self.ca
    }

    /// Issues a certificate that serves a server and a client alike, for the name `name` (its
    /// common name, too, and that of its files) and the addresses `ips`.
    pub fn issue(&self, name: &str, ips: &[IpAddr]) -> Identity {
        self.issue_with(name, ips, |_| {})
    }

    /// As [`Authority::issue`], of a certificate that has expired long ago.
    pub fn issue_expired(&self, name: &str, ips: &[IpAddr]) -> Identity {
        self.issue_with(name, ips, |params| {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        })
    }

    /// As [`Authority::issue`], of a certificate that serves a server only.
    pub fn issue_for_servers(&self, name: &str, ips: &[IpAddr]) -> Identity {
        self.issue_with(name, ips, |params| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        })
    }

    fn issue_with(
        &self,
        name: &str,
        ips: &[IpAddr],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Identity {
        let params = CertificateParams::new(vec![name.to_owned()]);
        let mut params = made("a certificate's name", params);
        params.distinguished_name.push(DnType::CommonName, name);
        let addresses = ips.iter().map(|ip| SanType::IpAddress(*ip));
        params.subject_alt_names.extend(addresses);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        let key = made("a key", KeyPair::generate());
        let cert = made("a certificate", params.signed_by(&key, &self.issuer));
        let identity = Identity {
            ca: self.ca.clone(),
            cert: self.dir.join(format!("{name}.pem")),
            key: self.dir.join(format!("{name}.key")),
        };
        write(&identity.cert, &cert.pem());
        write(&identity.key, &key.serialize_pem());
        identity
    }
}

fn made<T, E: fmt::Display>(what: &str, result: Result<T, E>) -> T {
    result.unwrap_or_else(|e| panic!("making {what}: {e}"))
}
