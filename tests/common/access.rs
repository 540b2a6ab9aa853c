//! Certificates and tokens for the nodes of a test, and what the test itself shows to them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tenure_test_services::tls::{Authority, Identity};

/// What one node's `http` says, and what the test shows to it.
#[derive(Clone, Debug, Default)]
pub struct Secure {
    /// Lines of `http`: `tls` and `auth`.
    pub lines: String,
    /// The certificate that the test shows, and the authority that it trusts; none: there is no TLS.
    pub tls: Option<Identity>,
    /// The token that the test shows.
    pub token: Option<String>,
}

/// The files of a cluster: an authority, certificates, tokens.
pub struct Keys {
    dir: PathBuf,
    /// Who issues.
    pub authority: Authority,
}

/// The token of the nodes.
pub const NODE_TOKEN: &str = "n0de-sesame-0123456789abcdef";
/// The token of an operator.
pub const ADMIN_TOKEN: &str = "adm1n-sesame-0123456789abcdef";
/// The token of a monitor.
pub const READ_TOKEN: &str = "re4d-sesame-0123456789abcdef";

/// Writes a file that nobody else can read.
pub fn write_secret(path: &Path, text: &str) {
    fs::write(path, text).expect("write a secret");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("chmod");
}

impl Keys {
    /// Makes them in `dir`.
    pub fn new(dir: &Path) -> Keys {
        for (name, token) in [
            ("node", NODE_TOKEN),
            ("admin", ADMIN_TOKEN),
            ("read", READ_TOKEN),
        ] {
            write_secret(&dir.join(format!("{name}.token")), token);
        }
        Keys {
            dir: dir.to_owned(),
            authority: Authority::new(dir),
        }
    }

    /// A certificate for 127.0.0.1.
    pub fn issue(&self, name: &str) -> Identity {
        private(self.authority.issue(name, &[[127, 0, 0, 1].into()]))
    }

    /// The file of the token of this name.
    pub fn token(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.token"))
    }

    /// `auth` with all tokens; nodes show that of this name.
    pub fn auth(&self, send: &str) -> String {
        let entry = |name: &str, rights: &str| {
            let file = self.token(name);
            format!("      - {{name: {name}, file: {file:?}, rights: [{rights}]}}\n")
        };
        let node = entry("node", "replicate, admin");
        let (admin, read) = (entry("admin", "admin"), entry("read", "read"));
        format!("  auth:\n    send: {send}\n    tokens:\n{node}{admin}{read}")
    }

    /// A node with mutual TLS, by a certificate of this name, and tokens.
    pub fn secure(&self, name: &str) -> Secure {
        let identity = self.issue(name);
        Secure {
            lines: tls(&identity) + &self.auth("node"),
            tls: Some(identity),
            token: Some(ADMIN_TOKEN.into()),
        }
    }
}

/// `tls` with this certificate.
pub fn tls(identity: &Identity) -> String {
    format!(
        "  tls:\n    cert: {:?}\n    key: {:?}\n    ca: {:?}\n",
        identity.cert, identity.key, identity.ca
    )
}

/// The same, its key readable by its owner alone.
pub fn private(identity: Identity) -> Identity {
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).expect("chmod");
    identity
}

/// A request over TLS: the body of a 200, else what came instead.
pub fn request(method: &str, url: &str, secure: &Secure) -> Result<String, String> {
    let files = secure.tls.as_ref();
    let mut client = reqwest::Client::builder()
        .no_proxy()
        .timeout(std::time::Duration::from_secs(30));
    if let Some(files) = files {
        let tls = tenure::access::tls::client(
            ["ca", "cert", "key"],
            Some(&files.ca),
            Some(&files.cert),
            Some(&files.key),
        );
        client = client.use_preconfigured_tls(tls.map_err(|e| e.to_string())?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let client = client.build().expect("a client");
        let mut request = client.request(method.parse().expect("a method"), url);
        if let Some(token) = &secure.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(|e| format!("{e:?}"))?;
        let status = answer.status();
        let text = answer.text().await.map_err(|e| format!("{e:?}"))?;
        match status.as_u16() {
            200 => Ok(text),
            _ => Err(format!("{status}: {text}")),
        }
    })
}
