//! Small files that hold certificates, keys and tokens.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::config::{HttpConfig, TokenSource};
use crate::private;

use super::AccessError;

/// The largest file that is read, in bytes: a bundle of all authorities of a system has some 250 KiB.
const MAX_FILE: u64 = 1 << 20;

/// The content of a file that the key `key` names.
pub(super) fn read(key: &str, path: &Path) -> Result<Vec<u8>, AccessError> {
    let fail = |problem: String| AccessError::new(key, format!("{}: {problem}", path.display()));
    let mut bytes = Vec::new();
    let open = || {
        // Opening a pipe would wait for who writes it.
        if !path.metadata()?.is_file() {
            return Err(std::io::Error::other("it is not a file"));
        }
        File::open(path)
    };
    open()
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(|e| fail(e.to_string()))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(fail(format!("it is larger than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

/// A warning if everybody on this machine can read a file that holds a secret.
pub(super) fn exposed(key: &str, path: &Path) -> Option<String> {
    private::is_open(path).then(|| {
        format!(
            "{key}: everybody on this machine can read {}: chmod 600",
            path.display()
        )
    })
}

/// Changes when the content of any file changes that `config` names.
pub(super) fn digest(config: &HttpConfig) -> [u8; 32] {
    let mut hash = Sha256::new();
    let mut add = |path: &Path| match read("", path) {
        Ok(bytes) => {
            hash.update([1]);
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        }
        Err(error) => {
            hash.update([0]);
            hash.update(error.problem);
        }
    };
    if let Some(tls) = &config.tls {
        add(&tls.cert);
        add(&tls.key);
        tls.ca.iter().for_each(|ca| add(ca));
    }
    for token in config.auth.iter().flat_map(|auth| &auth.tokens) {
        if let TokenSource::File(path) = &token.source {
            add(path);
        }
    }
    hash.finalize().into()
}
