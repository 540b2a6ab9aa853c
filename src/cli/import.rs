//! `tenure import`: a file becomes a database of a running node.

use std::path::PathBuf;
use std::process::ExitCode;

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use reqwest::{Body, header};
use tokio::io::AsyncReadExt;

use super::client::{self, ClientError, NodeClient, Target, cause, checked};

/// Bytes sent at once.
const PIECE: usize = 256 << 10;

/// What `tenure import` takes.
#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// The primary.
    #[command(flatten)]
    pub node: Target,
    /// The database; one that is there is replaced.
    #[arg(long, value_name = "DB")]
    pub name: String,
    /// The SQLite database file to send. Nobody may have it open.
    #[arg(value_name = "INPATH")]
    pub path: PathBuf,
}

/// Imports. The result is the process's exit code.
pub(super) fn run(args: ImportArgs) -> ExitCode {
    client::block_on(import(args))
}

async fn import(args: ImportArgs) -> Result<(), ClientError> {
    let node = NodeClient::new(&args.node)?;
    let shown = args.path.display().to_string();
    let failed = |e| ClientError::File("cannot read", shown.clone(), e);
    let file = tokio::fs::File::open(&args.path).await.map_err(failed)?;
    let size = file.metadata().await.map_err(failed)?.len();
    check_wal(&args)?;
    node.check_primary().await?;
    let bar = client::progress("importing", Some(size));
    let sent = bar.clone();
    let pieces = stream::try_unfold(file.take(size), move |mut file| {
        let sent = sent.clone();
        async move {
            let mut piece = BytesMut::with_capacity(PIECE);
            let n = file.read_buf(&mut piece).await?;
            sent.inc(n as u64);
            let piece: Option<(Bytes, _)> = (n > 0).then(|| (piece.freeze(), file));
            Ok::<_, std::io::Error>(piece)
        }
    });
    let asked = node
        .http()
        .post(node.url("import", &args.name))
        .header(header::CONTENT_LENGTH, size)
        .body(Body::wrap_stream(pieces))
        .send()
        .await;
    let answer = asked.map_err(|e| match e.is_connect() {
        true => node.unreachable(e),
        false => ClientError::Broken("the import", cause(&e)),
    })?;
    checked(answer).await?;
    bar.finish();
    Ok(())
}

/// A WAL beside the file holds transactions that would be left out.
fn check_wal(args: &ImportArgs) -> Result<(), ClientError> {
    for suffix in ["-wal", "-journal"] {
        let mut path = args.path.clone().into_os_string();
        path.push(suffix);
        let begun = std::fs::metadata(&path).is_ok_and(|m| m.len() > 0);
        // A journal that is kept after its end begins with zeros.
        let active = begun && first_byte(&path) != Some(0);
        if active {
            return Err(ClientError::Refused(format!(
                "{} holds a part of the database: close the programs that use it, or open and close it once with sqlite3, or import a copy made by VACUUM INTO",
                path.display()
            )));
        }
    }
    Ok(())
}

fn first_byte(path: &std::ffi::OsStr) -> Option<u8> {
    let mut byte = [0];
    let mut file = std::fs::File::open(path).ok()?;
    std::io::Read::read_exact(&mut file, &mut byte).ok()?;
    Some(byte[0])
}
