//! Real lease services for tests: etcd and Consul, run by hand on free ports of one address.
//!
//! - No service of the system is used or started. The programs come from Debian's packages,
//!   unpacked into `target/services` by the script `fetch` ([`program`]).
//! - Every service has ports, a data directory and a log of its own, so that any number of them run
//!   beside each other; and none outlives the test process, however that ends
//!   ([`process::Process`]).
//! - The functions panic, with the service's log where there is one: a test can do nothing without
//!   its service. All of them block; asynchronous tests wrap what takes long (starting) in
//!   `spawn_blocking`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

pub mod consul;
pub mod etcd;
pub mod process;
pub mod proxy;
pub mod tls;

/// The path of a service's program, `etcd`, `etcdctl` or `consul`, or of `libfaketime.so.1`, which
/// changes the clocks of a program that is started with it (`LD_PRELOAD`). It is looked for in
/// `$TENURE_SERVICES/bin` (the default is `target/services` of the source tree); if it is not there,
/// the script `fetch` beside this crate brings all of them, which takes about a minute.
pub fn program(name: &str) -> PathBuf {
    static FETCHING: Mutex<()> = Mutex::new(());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let services = std::env::var_os("TENURE_SERVICES")
        .map_or_else(|| here.join("../../target/services"), PathBuf::from);
    let program = services.join("bin").join(name);
    let _guard = FETCHING.lock().unwrap_or_else(|e| e.into_inner());
    if !program.exists() {
        let script = here.join("fetch");
        let fetched = Command::new(&script).arg(&services).output();
        let fetched = fetched.unwrap_or_else(|e| panic!("running {}: {e}", script.display()));
        assert!(
            fetched.status.success() && program.exists(),
            "{} failed ({}):\n{}",
            script.display(),
            fetched.status,
            String::from_utf8_lossy(&fetched.stderr)
        );
    }
    program
}
