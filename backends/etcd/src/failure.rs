//! What a failed request means: whether to try again, with what, or to give up.

use std::error::Error as _;
use std::io;

use etcd_client::Error;
use tenure_lease::LeaseError;
use tonic::{Code, Status};

/// Why a request on one connection has not succeeded.
pub(crate) enum Failure {
    /// The answer to the whole call; nothing is to be tried again.
    Answer(LeaseError),
    /// The request itself has failed.
    Request(Error),
}

impl From<LeaseError> for Failure {
    fn from(e: LeaseError) -> Self {
        Self::Answer(e)
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Request(e)
    }
}

/// What to do about a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cure {
    /// It may work a little later, or elsewhere.
    Wait,
    /// The token may have expired or been forgotten (by a restart): authenticate, and try again.
    /// If that does not help, it never will.
    Authenticate,
    /// Somebody must change something.
    None,
}

/// What to do about `error`.
pub(crate) fn cure(error: &Error) -> Cure {
    match error {
        Error::GRpcStatus(status) => cure_of_status(status),
        // None of these comes from the network: only a channel's TLS configuration is a
        // `TransportError` of its own, what fails later is a status.
        Error::InvalidArgs(_)
        | Error::InvalidUri(_)
        | Error::InvalidMetadataValue(_)
        | Error::TransportError(_) => Cure::None,
        _ => Cure::Wait,
    }
}

fn cure_of_status(status: &Status) -> Cure {
    if refused_certificate(status) {
        return Cure::None;
    }
    match status.code() {
        Code::Unauthenticated => Cure::Authenticate,
        // A watch whose token has expired is refused like one that lacks the permission.
        Code::PermissionDenied => Cure::Authenticate,
        // Users or roles were changed since the token was given out.
        Code::InvalidArgument if status.message().contains("auth store is old") => {
            Cure::Authenticate
        }
        // Wrong password, or none where one is needed; no authentication where there is a
        // password; not an etcd of version 3 at all.
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => Cure::None,
        _ if speaks_http_1(status) => Cure::None,
        _ => Cure::Wait,
    }
}

/// Whether the answer looks like HTTP/1: read as HTTP/2, "HTTP/1.1" begins a frame of 4 MiB.
fn speaks_http_1(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.to_string().contains("frame with invalid size") {
            return true;
        }
        cause = error.source();
    }
    status.message().contains("frame with invalid size")
}

/// What somebody may have to change, as the end of a sentence.
fn advice(status: &Status) -> &'static str {
    let of_users = ["auth", "user name"]
        .iter()
        .any(|w| status.message().contains(w));
    match status.code() {
        Code::PermissionDenied => {
            ": the role of lease.etcd.username must have the permission readwrite for all keys that begin with lease.etcd.key"
        }
        Code::Unauthenticated => CREDENTIALS,
        Code::InvalidArgument | Code::FailedPrecondition if of_users => CREDENTIALS,
        Code::Unimplemented => NOT_ETCD,
        _ if speaks_http_1(status) => NOT_ETCD,
        _ => "",
    }
}

const CREDENTIALS: &str = ": check lease.etcd.username and lease.etcd.password";
const NOT_ETCD: &str =
    ": no etcd answers there, or one that wants https: check lease.etcd.endpoints";

/// Whether TLS has failed over what one side said, not because the connection broke: a
/// certificate that is not accepted, no TLS on the other side. rustls' errors come as this kind.
fn refused_certificate(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.kind() == io::ErrorKind::InvalidData;
        }
        cause = error.source();
    }
    false
}

/// What has gone wrong, with its causes and what to do about it, in one line.
pub(crate) fn describe(error: &Error) -> String {
    let Error::GRpcStatus(status) = error else {
        return error.to_string();
    };
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    if text.is_empty() {
        text = status.code().to_string();
    }
    text + advice(status)
}

/// Whether `error` says that the lease does not exist.
pub(crate) fn no_such_lease(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => status.code() == Code::NotFound,
        // How etcd-client says that the TTL which came back is 0.
        Error::LeaseKeepAliveError(text) => text.contains("not found"),
        _ => false,
    }
}

/// Whether `error` says that a lease with the same ID exists.
pub(crate) fn lease_exists(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status)
        if status.code() == Code::FailedPrecondition && status.message().contains("already exists"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_time_or_a_token_may_cure_is_not_given_up() {
        let cure = |code, text: &str| cure(&Error::GRpcStatus(Status::new(code, text)));
        assert_eq!(cure(Code::Unavailable, "etcdserver: no leader"), Cure::Wait);
        assert_eq!(cure(Code::Unknown, "transport error"), Cure::Wait);
        assert_eq!(cure(Code::DeadlineExceeded, ""), Cure::Wait);
        let token = cure(Code::Unauthenticated, "etcdserver: invalid auth token");
        assert_eq!(token, Cure::Authenticate);
        let old = "etcdserver: revision of auth store is old";
        assert_eq!(cure(Code::InvalidArgument, old), Cure::Authenticate);
        let wrong = "etcdserver: authentication failed, invalid user ID or password";
        assert_eq!(cure(Code::InvalidArgument, wrong), Cure::None);
    }
}
