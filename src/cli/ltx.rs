//! `tenure ltx`: looks into transaction files and log segments, without a running node.
//!
//! It only ever reads. Both kinds of file come down to a list of records ([`open_records`]), each
//! one LTX file; everything else here works on those. A bad file is reported on stderr and makes
//! the exit code 1; the other files are still looked at. When whoever reads the output goes away
//! (`| head`), the command ends quietly.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::ltx::{self, Decoder, Header, LtxError, Pos, Summary};
use crate::store::StoreError;
use crate::store::disk::Real;
use crate::store::segment::{self, ScanEnd, Segment};

/// Looks into LTX files (`*.ltx`) and log segments (`*.log`).
#[derive(Debug, clap::Subcommand)]
pub enum LtxCommand {
    /// Check files: format, checksums, completeness, and that the records of a segment follow one
    /// another
    Verify {
        /// LTX files or log segments
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Print a file's header, the number and checksum of each page, and the trailer
    Dump {
        /// An LTX file or a log segment
        file: PathBuf,
    },
    /// Print a table of the transactions in a directory
    List {
        /// A database's `ltx` or log directory
        dir: PathBuf,
        /// Print tab-separated columns, the same ones as LiteFS's tools
        #[arg(long)]
        tsv: bool,
    },
}

/// Runs the command on stdout and stderr. The exit code is 1 if any file was bad.
pub fn run(cmd: LtxCommand) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut report = Report {
        out: &mut out,
        err: &mut io::stderr().lock(),
        good: true,
    };
    match report.execute(&cmd).and_then(|()| report.out.flush()) {
        Ok(()) if report.good => ExitCode::SUCCESS,
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe && report.good => ExitCode::SUCCESS,
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            // Nothing is left to say it to if stderr is gone as well.
            let _ = writeln!(report.err, "ERROR: cannot write the output: {e}");
            ExitCode::FAILURE
        }
        _ => ExitCode::FAILURE,
    }
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Ltx(#[from] LtxError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("TXID {txid:016x}: {problem}")]
    Record { txid: u64, problem: Box<Problem> },
    #[error("it holds TXIDs {0:016x}-{1:016x}, its name or place says {2:016x}-{3:016x}")]
    Txids(u64, u64, u64, u64),
    #[error("data follows the end of the LTX file")]
    TrailingData,
    #[error("it needs position {need}, the record before it ends at {have}")]
    Chain { need: Pos, have: Pos },
    #[error("not a log segment: its header is missing or damaged")]
    NoSegmentHeader,
    #[error("the record of TXID {0:016x} is damaged, though it had been written to disk")]
    Corrupt(u64),
}

/// One LTX file, on its own or in a segment.
struct Record {
    /// The TXIDs (first, last) that the file's name or the segment give it.
    txids: Option<(u64, u64)>,
    reader: Box<dyn Read>,
}

impl Record {
    fn verify(mut self) -> Result<Summary, Problem> {
        let summary = ltx::verify(&mut self.reader)?;
        self.finish(&summary)?;
        Ok(summary)
    }

    /// The checks that remain once the LTX file has been read.
    fn finish(self, s: &Summary) -> Result<(), Problem> {
        let (min, max) = (s.header.min_txid, s.header.max_txid);
        match self.txids {
            Some((a, b)) if (a, b) != (min, max) => return Err(Problem::Txids(min, max, a, b)),
            _ => {}
        }
        if io::copy(&mut self.reader.take(1), &mut io::sink())? != 0 {
            return Err(Problem::TrailingData);
        }
        Ok(ltx::check_transition(&s.header, &s.trailer, s.pages)?)
    }
}

/// The records of a file, in order.
struct Records {
    list: Vec<Record>,
    /// The TXID of a record that was being written when the node died. It was never
    /// acknowledged, and recovery drops it: worth a remark, not an error.
    torn: Option<u64>,
    /// The TXID of a damaged record that was on disk; nothing behind it can be read.
    corrupt: Option<u64>,
}

/// Opens a log segment if the name ends in `.log`, and else an LTX file.
fn open_records(path: &Path) -> Result<Records, Problem> {
    if path.extension().is_none_or(|e| e != "log") {
        let reader = Box::new(BufReader::with_capacity(64 << 10, File::open(path)?));
        let name = path.file_name().and_then(|n| n.to_str());
        let record = Record {
            txids: name.and_then(ltx::parse_file_name),
            reader,
        };
        return Ok(Records {
            list: vec![record],
            torn: None,
            corrupt: None,
        });
    }
    let scanned = Segment::inspect(&Real, path)?;
    let Some(segment) = scanned.segment else {
        return Err(Problem::NoSegmentHeader);
    };
    let mut list = Vec::with_capacity(segment.len());
    for offset in segment.record_offsets() {
        let h = segment::read_header(&*segment.file, segment.salt, offset)?;
        let reader = BufReader::with_capacity(16 << 10, segment.body_reader(offset, h.length));
        list.push(Record {
            txids: Some((h.min_txid, h.max_txid)),
            reader: Box::new(reader),
        });
    }
    let (mut torn, mut corrupt) = (None, None);
    if let ScanEnd::BadRecord { txid } = scanned.end {
        let was_flushed = segment.later_record_says_flushed(txid)?;
        *if was_flushed { &mut corrupt } else { &mut torn } = Some(txid);
    }
    Ok(Records {
        list,
        torn,
        corrupt,
    })
}

/// Where the results go.
struct Report<'a> {
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    /// Whether no file was bad so far.
    good: bool,
}

impl Report<'_> {
    /// Fails only if the output cannot be written; bad files are reported.
    fn execute(&mut self, cmd: &LtxCommand) -> io::Result<()> {
        match cmd {
            LtxCommand::Verify { files } => files.iter().try_for_each(|f| self.verify(f)),
            LtxCommand::Dump { file } => self.dump(file),
            LtxCommand::List { dir, tsv } => self.list(dir, *tsv),
        }
    }

    fn bad(&mut self, path: &Path, problem: &Problem) -> io::Result<()> {
        self.good = false;
        self.remark(path, problem)
    }

    fn remark(&mut self, path: &Path, what: &dyn std::fmt::Display) -> io::Result<()> {
        // In order, should both go to one terminal.
        self.out.flush()?;
        writeln!(self.err, "{}: {what}", path.display())
    }

    /// Gives each record of a file to `each` until that finds a problem, and reports any. Whether
    /// there was none.
    fn each_record(
        &mut self,
        path: &Path,
        mut each: impl FnMut(&mut Self, Record) -> io::Result<Result<(), Problem>>,
    ) -> io::Result<bool> {
        let records = match open_records(path) {
            Ok(records) => records,
            Err(problem) => return self.bad(path, &problem).map(|()| false),
        };
        for record in records.list {
            let in_segment = path.extension().is_some_and(|e| e == "log");
            let txid = record.txids.map_or(0, |(_, max)| max);
            if let Err(problem) = each(self, record)? {
                let problem = match in_segment {
                    true => Problem::Record {
                        txid,
                        problem: Box::new(problem),
                    },
                    false => problem,
                };
                return self.bad(path, &problem).map(|()| false);
            }
        }
        if let Some(txid) = records.corrupt {
            return self.bad(path, &Problem::Corrupt(txid)).map(|()| false);
        }
        if let Some(txid) = records.torn {
            let what = "was being written when the node died; recovery will drop it";
            self.remark(
                path,
                &format_args!("note: the record of TXID {txid:016x} {what}"),
            )?;
        }
        Ok(true)
    }

    fn verify(&mut self, path: &Path) -> io::Result<()> {
        let (mut records, mut pages) = (0u64, 0u64);
        let mut ends: Option<(Header, Summary)> = None;
        let good = self.each_record(path, |_, record| {
            Ok(record.verify().and_then(|s| {
                let first = ends.map_or(s.header, |(first, _)| first);
                check_chain(ends.map(|(_, last)| last), &s)?;
                (records, pages) = (records + 1, pages + u64::from(s.pages));
                ends = Some((first, s));
                Ok(())
            }))
        })?;
        match ends {
            _ if !good => Ok(()),
            None => writeln!(self.out, "{}: OK, no records", path.display()),
            Some((first, last)) => writeln!(
                self.out,
                "{}: OK, TXIDs {:016x}-{:016x} in {records} record(s), {pages} page(s), commit {}, checksum {:016x} to {:016x}",
                path.display(),
                first.min_txid,
                last.header.max_txid,
                last.header.commit,
                first.pre_apply_checksum,
                last.trailer.post_apply_checksum,
            ),
        }
    }

    fn dump(&mut self, path: &Path) -> io::Result<()> {
        self.each_record(path, |report, record| {
            let out = &mut *report.out;
            // One of the two kinds of error ends the output, the other is about the file.
            match dump_record(out, record) {
                Ok(()) => Ok(Ok(())),
                Err(DumpError::Output(e)) => Err(e),
                Err(DumpError::Input(problem)) => Ok(Err(problem)),
            }
        })
        .map(|_| ())
    }

    fn list(&mut self, dir: &Path, tsv: bool) -> io::Result<()> {
        let names = match transaction_files(dir) {
            Ok(names) => names,
            Err(e) => return self.bad(dir, &Problem::Io(e)),
        };
        writeln!(self.out, "{}", if tsv { tsv_head() } else { table_head() })?;
        for name in names {
            self.each_record(&dir.join(&name), |report, mut record| {
                let summary = match ltx::verify(&mut record.reader) {
                    Ok(summary) => summary,
                    Err(e) => return Ok(Err(e.into())),
                };
                let row = if tsv {
                    tsv_row(&summary)
                } else {
                    table_row(&name, &summary)
                };
                writeln!(report.out, "{row}")?;
                Ok(record.finish(&summary))
            })?;
        }
        Ok(())
    }
}

/// In a segment, each record starts where the one before it ended.
fn check_chain(last: Option<Summary>, next: &Summary) -> Result<(), Problem> {
    let Some(last) = last else { return Ok(()) };
    let have = Pos {
        txid: last.header.max_txid,
        checksum: last.trailer.post_apply_checksum,
    };
    let need = next.header.pre_apply_pos();
    if need == have || next.header.is_snapshot() {
        Ok(())
    } else {
        Err(Problem::Chain { need, have })
    }
}

enum DumpError {
    Output(io::Error),
    Input(Problem),
}

impl<E: Into<Problem>> From<E> for DumpError {
    fn from(e: E) -> Self {
        DumpError::Input(e.into())
    }
}

fn dump_record(out: &mut dyn Write, mut record: Record) -> Result<(), DumpError> {
    let mut decoder = Decoder::new(&mut record.reader)?;
    let h = *decoder.header();
    dump_header(out, &h).map_err(DumpError::Output)?;
    let mut data = vec![0; h.page_size as usize];
    let mut pages = 0;
    while let Some(pgno) = decoder.page(&mut data)? {
        pages += 1;
        let checksum = ltx::page_checksum(pgno, &data);
        writeln!(out, "page {pgno:>10}  {checksum:016x}").map_err(DumpError::Output)?;
    }
    let (_, trailer) = decoder.finish()?;
    writeln!(
        out,
        "pages:               {pages}\npost-apply checksum: {:016x}\nfile checksum:       {:016x}\n",
        trailer.post_apply_checksum, trailer.file_checksum
    )
    .map_err(DumpError::Output)?;
    Ok(record.finish(&Summary {
        header: h,
        trailer,
        pages,
    })?)
}

fn dump_header(out: &mut dyn Write, h: &Header) -> io::Result<()> {
    writeln!(
        out,
        "compressed:          {}",
        if h.compressed { "LZ4" } else { "no" }
    )?;
    writeln!(out, "page size:           {}", h.page_size)?;
    writeln!(out, "commit:              {}", h.commit)?;
    writeln!(out, "min TXID:            {:016x}", h.min_txid)?;
    writeln!(out, "max TXID:            {:016x}", h.max_txid)?;
    writeln!(
        out,
        "timestamp:           {} ({} ms)",
        rfc3339(h.timestamp),
        h.timestamp
    )?;
    writeln!(out, "pre-apply checksum:  {:016x}", h.pre_apply_checksum)?;
    writeln!(out, "WAL offset:          {}", h.wal_offset)?;
    writeln!(out, "WAL size:            {}", h.wal_size)?;
    writeln!(
        out,
        "WAL salt:            {:08x} {:08x}",
        h.wal_salt1, h.wal_salt2
    )?;
    writeln!(out, "node ID:             {:016x}", h.node_id)
}

/// The names of the LTX files and log segments in a directory, sorted, and so in the order of
/// their TXIDs. Other files are passed over, as by a node.
fn transaction_files(dir: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        if let Ok(name) = entry?.file_name().into_string() {
            let known =
                ltx::parse_file_name(&name).is_some() || segment::parse_file_name(&name).is_some();
            names.extend(known.then_some(name));
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn table_head() -> String {
    format!(
        "{:<37}  {:<16}  {:<16}  {:>10}  {:>10}  {:<16}  {:<16}  timestamp",
        "file", "min", "max", "commit", "pages", "pre", "post"
    )
}

fn table_row(name: &str, s: &Summary) -> String {
    let (h, t) = (&s.header, &s.trailer);
    format!(
        "{name:<37}  {:016x}  {:016x}  {:>10}  {:>10}  {:016x}  {:016x}  {}",
        h.min_txid,
        h.max_txid,
        h.commit,
        s.pages,
        h.pre_apply_checksum,
        t.post_apply_checksum,
        rfc3339(h.timestamp)
    )
}

fn tsv_head() -> String {
    let columns = [
        "min_txid",
        "max_txid",
        "commit",
        "pages",
        "preapply",
        "postapply",
        "timestamp",
        "wal_offset",
        "wal_size",
        "wal_salt",
    ];
    columns.join("\t")
}

fn tsv_row(s: &Summary) -> String {
    let (h, t) = (&s.header, &s.trailer);
    format!(
        "{:016x}\t{:016x}\t{}\t{}\t{:016x}\t{:016x}\t{}\t{}\t{}\t{:08x} {:08x}",
        h.min_txid,
        h.max_txid,
        h.commit,
        s.pages,
        h.pre_apply_checksum,
        t.post_apply_checksum,
        rfc3339(h.timestamp),
        h.wal_offset,
        h.wal_size,
        h.wal_salt1,
        h.wal_salt2
    )
}

/// Milliseconds since the Unix epoch as a date and time in UTC, to the second.
fn rfc3339(ms: i64) -> String {
    let seconds = ms.div_euclid(1000);
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

/// The date (year, month, day) that lies `days` after 1970-01-01, in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Years are counted from 1 March here, so that the leap day is the last of its year, and in
    // eras of 400 years, which all have the same 146097 days.
    let since_era_0 = days + 719_468;
    let (era, day) = (
        since_era_0.div_euclid(146_097),
        since_era_0.rem_euclid(146_097),
    );
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let (month, carry) = if month_from_march < 10 {
        (month_from_march + 3, 0)
    } else {
        (month_from_march - 9, 1)
    };
    (era * 400 + year + carry, month, day_of_month)
}

#[cfg(test)]
#[path = "ltx_tests.rs"]
mod tests;
