//! The log: lines on standard error, short at their default level.
//!
//! The default level is for operators: a line for what they must know, none a transaction.
//! Libraries say nothing below a warning unless they are asked, at any level of ours: what they
//! call debug is a line a request. `RUST_LOG`, in its usual notation, replaces all of that.

use std::fmt;
use std::io::IsTerminal;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::config::{LogConfig, LogFormat};

/// What is logged beside the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verbosity {
    /// Every message there is, of Tenure's own. (`log.debug` asks for debug messages only.)
    pub trace: bool,
    /// Each FUSE request too.
    pub fuse: bool,
}

/// Starts logging to standard error, as `log` says; once a process, later calls do nothing.
pub fn init(log: &LogConfig, verbosity: Verbosity) {
    let filter = match std::env::var("RUST_LOG") {
        Ok(spec) if !spec.is_empty() => EnvFilter::new(spec),
        _ => EnvFilter::new(directives(log.debug, verbosity)),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // The only way to fail is that a log is there already, which then serves as well.
    let _ = match (log.format, log.timestamp) {
        (LogFormat::Json, true) => builder.json().flatten_event(true).try_init(),
        (LogFormat::Json, false) => builder.json().flatten_event(true).without_time().try_init(),
        (LogFormat::Text, timestamp) => builder
            .with_ansi(std::io::stderr().is_terminal())
            .event_format(Line { timestamp })
            .try_init(),
    };
}

/// The filter for a level, in the notation of `RUST_LOG`.
fn directives(debug: bool, verbosity: Verbosity) -> String {
    let own = match (verbosity.trace, debug) {
        (true, _) => "trace",
        (false, true) => "debug",
        (false, false) => "info",
    };
    // Its warnings are of requests that are not supported, and of mounts that are gone already.
    let fuse = if verbosity.fuse { "debug" } else { "error" };
    format!("warn,tenure={own},tenure_lease={own},tenure_lease_static={own},fuser={fuse}")
}

/// A line of text: the time if it is wanted, the level unless it is info, where it comes from if
/// that is not Tenure itself, and what there is to say.
struct Line {
    timestamp: bool,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.timestamp {
            SystemTime.format_time(&mut out)?;
            out.write_char(' ')?;
        }
        let meta = event.metadata();
        let (name, colour) = match *meta.level() {
            Level::ERROR => ("ERROR: ", "31"),
            Level::WARN => ("WARNING: ", "33"),
            Level::INFO => ("", "0"),
            Level::DEBUG => ("debug: ", "2"),
            Level::TRACE => ("trace: ", "2"),
        };
        if out.has_ansi_escapes() && !name.is_empty() {
            write!(out, "\x1b[{colour}m{name}\x1b[0m")?;
        } else {
            out.write_str(name)?;
        }
        if !meta.target().starts_with("tenure") {
            write!(out, "{}: ", meta.target())?;
        }
        ctx.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What a few messages look like in the log.
    fn logged(timestamp: bool, filter: String) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(filter))
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(Line { timestamp })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "tenure::role", db = "a.db", "following the primary");
            tracing::warn!(target: "tenure", "lost it");
            tracing::debug!(target: "tenure::stream", "a frame");
            tracing::trace!(target: "tenure::fuse", "a request");
            tracing::info!(target: "hyper::proto", "chatter");
            tracing::warn!(target: "hyper::proto", "broken");
            tracing::debug!(target: "fuser::request", "FUSE(1)");
        });
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_default_is_short_and_libraries_are_quiet() {
        assert_eq!(
            logged(false, directives(false, Verbosity::default())),
            "following the primary db=\"a.db\"\nWARNING: lost it\nWARNING: hyper::proto: broken\n"
        );
    }

    #[test]
    fn more_is_shown_when_asked_for() {
        let text = logged(false, directives(true, Verbosity::default()));
        assert!(
            text.contains("debug: a frame\n") && !text.contains("a request"),
            "{text}"
        );
        assert!(
            !text.contains("FUSE(1)") && !text.contains("chatter"),
            "{text}"
        );
        let all = Verbosity {
            trace: true,
            fuse: true,
        };
        let text = logged(false, directives(false, all));
        assert!(text.contains("trace: a request\n"), "{text}");
        assert!(text.contains("fuser::request: FUSE(1)"), "{text}");
    }

    #[test]
    fn a_timestamp_stands_first() {
        let text = logged(true, directives(false, Verbosity::default()));
        let first = text.lines().next().unwrap();
        let (time, rest) = first.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        assert!(rest.starts_with("following"), "{rest}");
    }
}
