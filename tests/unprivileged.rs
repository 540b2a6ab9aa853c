//! Nodes of a user without privileges, who mounts by the set-user-ID program `fusermount3`.
//!
//! Run by root, the test gives up root's rights, in a mount namespace of its own in which
//! everybody may open /dev/fuse; run by somebody else, it needs that to be so already.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::node::{TENURE, free_address};
use common::run::run;

/// What the user runs, in the test's directory. `$1` is the program.
const SCRIPT: &str = r#"
set -eu
tenure=$1
die() { echo "$1" >&2; tail -n 20 ./*.log >&2; exit 1; }
# within TEXT COMMAND…: until it succeeds, for 20 s.
within() {
    what=$1; shift
    i=0
    until "$@" 2>/dev/null; do
        i=$((i + 1)); [ $i -lt 400 ] || die "not within 20 s: $what"
        sleep 0.05
    done
}
mounted() { grep -q " $PWD/$1/mnt .* - fuse" /proc/self/mountinfo; }
start() {
    "$tenure" mount -config "$1.yml" >>"$1.log" 2>&1 &
    eval "pid_$1=$!"
    within "the mount of $1" mounted "$1"
    within "the root of $1" ls "$1/mnt" >/dev/null
}
signal() { eval "kill -$2 \$pid_$1; code=0; wait \$pid_$1 || code=\$?"; }
trap 'for n in primary replica; do eval "kill \$pid_$n" 2>/dev/null || true; done; wait' EXIT
same() {
    [ "$(cat "primary/mnt/$1-pos")" = "$(cat "replica/mnt/$1-pos")" ]
}
rows() {
    within "$1 on the replica" same "$1"
    for n in primary replica; do
        got=$(sqlite3 -batch -init /dev/null "$n/mnt/$1" 'PRAGMA integrity_check; SELECT count(*) FROM t;' | tr '\n' ' ')
        [ "$got" = "ok $2 " ] || die "$1 on the $n: $got, not $2 rows"
    done
}
write() { sqlite3 -batch -init /dev/null "primary/mnt/$1" "$2"; }

[ "$(id -u)" != 0 ] || die "root runs this"
start primary
start replica
for mode in delete wal; do
    write $mode.db "PRAGMA journal_mode=$mode; CREATE TABLE t (n); INSERT INTO t VALUES (1);" >/dev/null
    write $mode.db "INSERT INTO t VALUES (2);"
    rows $mode.db 2
done
[ "$(stat -c %u primary/mnt/wal.db)" = "$(id -u)" ] || die "the files are not the user's"

# A clean stop, with a file open.
exec 3<replica/mnt/wal.db
for n in replica primary; do
    signal $n TERM
    [ "$code" = 0 ] || die "$n ended with $code"
    ! mounted $n || die "$n is still mounted"
done
exec 3<&-
start primary
start replica
for mode in delete wal; do
    write $mode.db "INSERT INTO t VALUES (3);"
    rows $mode.db 3
done

# In the rollback modes: a node that maps a WAL index without passthrough can hang when it is killed.
rm primary/mnt/wal.db
gone() { [ ! -e replica/mnt/wal.db ]; }
within "the end of wal.db" gone

# The mount of a node that was killed stays, dead; the next start gets rid of it.
for n in primary replica; do
    signal $n KILL
    mounted $n || echo "the mount of $n went with it"
    "$tenure" mount -config $n.yml >>$n.log 2>&1 &
    eval "pid_$n=$!"
    # Read, as names and attributes may come out of the dead mount's cache.
    within "the mount of $n after kill -9" cat $n/mnt/delete.db-pos >/dev/null
done
write delete.db "INSERT INTO t VALUES (4);"
rows delete.db 4
for n in replica primary; do
    signal $n TERM
    [ "$code" = 0 ] || die "$n ended with $code"
    ! mounted $n || die "$n is still mounted"
done
echo PASSED
"#;

/// What root does first: everybody may use FUSE, here.
const AS_ROOT: &str = r#"
set -eu
mknod ./fuse-device c 10 229
chmod 666 ./fuse-device
mount --bind ./fuse-device /dev/fuse
exec setpriv --reuid=65534 --regid=65534 --clear-groups sh ./script "$1"
"#;

fn yaml(dir: &Path, name: &str, http: &str, primary: &str) -> String {
    let dir = dir.join(name);
    format!(
        "fuse:\n  dir: {:?}\ndata:\n  dir: {:?}\nhttp:\n  addr: \"{http}\"\n\
         strict-verify: true\nlease:\n  type: static\n  hostname: primary\n  \
         advertise-url: \"http://{primary}\"\n  candidate: {}\n  reconnect-delay: 100ms\n",
        dir.join("mnt"),
        dir.join("data"),
        http == primary,
    )
}

#[test]
fn a_user_without_privileges_runs_nodes() {
    let found = run(
        Command::new("sh").args(["-c", "command -v fusermount3"]),
        b"",
        Duration::from_secs(10),
    );
    if !found.success() {
        println!("SKIPPED: there is no fusermount3 (package fuse3)");
        return;
    }
    // SAFETY: takes and returns a number.
    let root = unsafe { libc::geteuid() } == 0;
    let everybody = fs::metadata("/dev/fuse").is_ok_and(|m| m.mode() & 0o006 == 0o006);
    if !root && !everybody {
        println!("SKIPPED: this user may not open /dev/fuse");
        return;
    }
    // Not the build's directory: another user may not be able to reach that.
    let temporary = tempfile::tempdir().expect("temporary directory");
    let dir = temporary.path().canonicalize().expect("its path");
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    };
    mode(&dir, 0o777);
    let program = dir.join("tenure");
    fs::copy(TENURE, &program).expect("copy the program");
    mode(&program, 0o755);
    let primary = free_address();
    let nodes = [("primary", primary.clone()), ("replica", free_address())];
    for (name, http) in nodes {
        let sub = dir.join(name);
        fs::create_dir_all(sub.join("mnt")).expect("make a directory");
        mode(&sub, 0o777);
        if root {
            // The mount point must be the user's own.
            std::os::unix::fs::chown(sub.join("mnt"), Some(65534), Some(65534)).expect("chown");
        }
        let config = dir.join(format!("{name}.yml"));
        fs::write(&config, yaml(&dir, name, &http, &primary)).expect("write a file");
        mode(&config, 0o644);
    }
    fs::write(dir.join("script"), SCRIPT).expect("write the script");
    mode(&dir.join("script"), 0o644);
    let mut command;
    if root {
        let allowed = run(
            Command::new("unshare").args(["--mount", "true"]),
            b"",
            Duration::from_secs(10),
        );
        if !allowed.success() {
            println!("SKIPPED: no mount namespace: {}", allowed.stderr);
            return;
        }
        // All that is left behind goes with the namespaces, when their first process ends.
        command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["--propagation", "private", "sh", "-c", AS_ROOT, "sh"]);
    } else {
        command = Command::new("sh");
        command.arg("./script");
    }
    let done = run(
        command.arg(&program).current_dir(&dir),
        b"",
        Duration::from_secs(120),
    );
    assert!(
        done.success() && done.text().ends_with("PASSED\n"),
        "{}\n{}",
        done.text(),
        done.stderr
    );
}
