//! The configuration of a node: a YAML file, LiteFS's keys, nothing ignored.
//!
//! The way of a file: [`expand`] puts environment variables into the text, [`yaml`] makes a tree
//! of it that knows its lines, `read` lays the tree over the defaults and refuses what it does not
//! know, `validate` checks what keys say together and fills in the defaults that depend on others.
//! A [`Config`] that comes out can be used without further checks.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

mod duration;
mod expand;
mod model;
mod read;
mod section;
mod validate;
mod yaml;

pub use model::{
    BackupConfig, ClientAuth, Config, ConsulConfig, DataConfig, EtcdConfig, ExecConfig, FuseConfig,
    HttpAuth, HttpConfig, HttpTls, LeaseConfig, LeaseKind, LogConfig, LogFormat, ProxyConfig,
    ProxyForward, Right, Secret, TlsConfig, TokenConfig, TokenSource, TracingConfig, WalCapture,
};
pub use validate::{http_host, split_addr};

use section::{Section, Source};

/// The largest configuration file that is read, in bytes.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// Why there is no configuration. The messages name the file, the line, the key, and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No file was named and none was found.
    #[error(
        "no configuration file found (looked for {searched}): name one with -config FILE, or mount \
         a single node without any by giving a directory: tenure mount DIR"
    )]
    NotFound {
        /// The files that were looked for.
        searched: String,
    },
    /// A file cannot be read.
    #[error("cannot read the configuration file {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The text is no YAML, or has a broken `${…}`.
    #[error("{file}:{line}: {problem}")]
    Syntax {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A key is unknown, or its value makes no sense.
    #[error("{file}{}: {key}: {problem}", line.map(|n| format!(":{n}")).unwrap_or_default())]
    Invalid {
        /// The file.
        file: String,
        /// The line, from 1, if the key is in the file.
        line: Option<usize>,
        /// The key with all its sections: `lease.consul.url`.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory given to `tenure mount DIR` cannot be one.
    #[error("cannot mount at {}: {problem}", dir.display())]
    MountDir {
        /// The directory.
        dir: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl Config {
    /// Reads the file at `path`, or else the first there is of `./litefs.yml`, `~/litefs.yml` and
    /// `/etc/litefs.yml`. `expand_env`: put environment variables into it.
    ///
    /// # Errors
    /// When there is no file, it cannot be read, or [`Config::parse`] refuses it.
    pub fn load(path: Option<&Path>, expand_env: bool) -> Result<Self, ConfigError> {
        let (file, text) = match path {
            Some(path) => (path.to_owned(), read_file(path)),
            None => find_file()?,
        };
        match text {
            Ok(text) => Self::parse(&text, &file.display().to_string(), expand_env),
            Err(source) => Err(ConfigError::Read { file, source }),
        }
    }

    /// The configuration that `text` says; `file_name` is for error messages.
    ///
    /// # Errors
    /// The first thing that is wrong: the syntax, an unknown key, a value, a contradiction.
    pub fn parse(text: &str, file_name: &str, expand_env: bool) -> Result<Self, ConfigError> {
        let environment: expand::Lookup = &variable;
        parse_with(text, file_name, expand_env.then_some(environment))
    }

    /// The configuration of `tenure mount DIR`: a single static primary, mounted at `mount_dir`,
    /// its data in a directory of the same name with a dot before it, beside it.
    ///
    /// # Errors
    /// When `mount_dir` has no name (`/`), so that there is no place beside it.
    pub fn single(mount_dir: &Path) -> Result<Self, ConfigError> {
        let fail = |problem: String| ConfigError::MountDir {
            dir: mount_dir.to_owned(),
            problem,
        };
        let dir = validate::absolute(mount_dir).map_err(|e| fail(e.to_string()))?;
        let Some(name) = dir.file_name() else {
            return Err(fail("it has no name; give a directory other than /".into()));
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        let mut config = Self::default();
        config.data.dir = dir.with_file_name(hidden);
        config.fuse.dir = dir;
        validate::complete(&mut config, &Source::new("tenure mount DIR"))?;
        Ok(config)
    }

    /// Whether `lease.advertise-url` is this node's own: on a static replica it is the primary's.
    pub fn advertises_itself(&self) -> bool {
        self.lease.kind != LeaseKind::Static || self.lease.candidate
    }

    /// The file of the rolling trace log, if one is to be written.
    pub fn tracing_file(&self) -> Option<&Path> {
        self.tracing
            .path
            .as_deref()
            .filter(|_| self.tracing.enabled)
    }
}

pub(crate) fn parse_with(
    text: &str,
    file: &str,
    environment: Option<expand::Lookup>,
) -> Result<Config, ConfigError> {
    let syntax = |line, problem| ConfigError::Syntax {
        file: file.to_owned(),
        line,
        problem,
    };
    let text = match environment {
        Some(lookup) => &expand::expand(text, lookup).map_err(|e| syntax(e.line, e.problem))?,
        None => text,
    };
    let tree = yaml::parse(text).map_err(|e| syntax(e.line, e.problem))?;
    let source = Source::new(file);
    let mut config = read::config(Section::new(&source, String::new(), &tree)?)?;
    validate::complete(&mut config, &source)?;
    Ok(config)
}

/// An environment variable; `HOSTNAME` is the machine's name if it is not set.
fn variable(name: &str) -> Option<String> {
    match env::var_os(name) {
        Some(value) => Some(value.to_string_lossy().into_owned()),
        None if name == "HOSTNAME" => validate::machine_name(),
        None => None,
    }
}

/// The first of the usual files that exists, and what reading it gave.
fn find_file() -> Result<(PathBuf, io::Result<String>), ConfigError> {
    let mut candidates = vec![PathBuf::from("litefs.yml")];
    candidates.extend(env::home_dir().map(|home| home.join("litefs.yml")));
    candidates.push("/etc/litefs.yml".into());
    for path in &candidates {
        match read_file(path) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            result => return Ok((path.clone(), result)),
        }
    }
    let names: Vec<_> = candidates.iter().map(|p| p.display().to_string()).collect();
    Err(ConfigError::NotFound {
        searched: names.join(", "),
    })
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = fs::File::open(path)?;
    file.take(MAX_FILE_SIZE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_SIZE {
        return Err(io::Error::other(format!(
            "it is larger than {MAX_FILE_SIZE} bytes"
        )));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
