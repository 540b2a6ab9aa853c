//! `tenure export`: a database of a running node as a file.
//!
//! The file is written under a temporary name beside its own, flushed, and renamed: whoever finds
//! it under its name has all of it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::client::{self, ClientError, NodeClient, Target, cause, checked};

/// What `tenure export` takes.
#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    pub node: Target,
    /// The database.
    #[arg(long, value_name = "DB")]
    pub name: String,
    /// The file to write; one that is there is replaced.
    #[arg(value_name = "OUTPATH")]
    pub path: PathBuf,
}

/// Exports. The result is the process's exit code.
pub(super) fn run(args: ExportArgs) -> ExitCode {
    client::block_on(export(args))
}

async fn export(args: ExportArgs) -> Result<(), ClientError> {
    let node = NodeClient::new(&args.node)?;
    let dir = match args.path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let shown = args.path.display().to_string();
    let failed = |e| ClientError::File("cannot write", shown.clone(), e);
    let asked = node
        .http()
        .get(node.url("export", &args.name))
        .send()
        .await
        .map_err(|e| node.unreachable(e))?;
    let mut answer = checked(asked).await?;
    let size = answer.content_length();
    // After the answer: a refused export leaves nothing.
    let mut file = tempfile::Builder::new()
        .prefix(".tenure-export-")
        // The data is its owner's alone, as it is on the node.
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .tempfile_in(dir)
        .map_err(failed)?;
    let bar = client::progress("exporting", size);
    let broken = |e: reqwest::Error| ClientError::Broken("the export", cause(&e));
    let mut written = 0u64;
    while let Some(piece) = answer.chunk().await.map_err(broken)? {
        file.write_all(&piece).map_err(failed)?;
        written += piece.len() as u64;
        bar.set_position(written);
    }
    if size.is_some_and(|size| size != written) {
        let got = format!("{written} bytes of {}", size.unwrap_or(0));
        return Err(ClientError::Broken("the export", got));
    }
    file.as_file().sync_all().map_err(failed)?;
    file.persist(&args.path).map_err(|e| failed(e.error))?;
    std::fs::File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(failed)?;
    bar.finish();
    Ok(())
}
