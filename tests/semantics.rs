//! `SEMANTICS.md`, `README.md` and `tests/README.md` name tests; those tests are there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Tests that a document names as `FILE.rs::TEST`, outside of its code blocks.
fn named(document: &str) -> BTreeSet<(String, String)> {
    let spans = document.split('`').skip(1).step_by(2);
    spans
        .filter_map(|span| span.split_once(".rs::"))
        .map(|(file, test)| (format!("{file}.rs"), test.to_owned()))
        .collect()
}

/// Where a document's file lies: in `tests/` unless its path says otherwise.
fn find(root: &Path, file: &str) -> PathBuf {
    match file.contains('/') {
        true => root.join(file),
        false => root.join("tests").join(file),
    }
}

fn is_a_test(source: &str, name: &str) -> bool {
    let head = format!("fn {name}(");
    let mut lines = source.lines();
    let mut test = false;
    lines.any(|line| {
        let line = line.trim_start();
        let here = line.trim_start_matches("async ").starts_with(&head);
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            test = true;
        } else if !line.starts_with("#[") && !here {
            test = false;
        }
        here && test
    })
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (document, least) in [
        ("SEMANTICS.md", 80),
        ("tests/README.md", 0),
        ("README.md", 0),
    ] {
        let text = std::fs::read_to_string(root.join(document)).expect(document);
        let tests = named(&text);
        assert!(
            tests.len() >= least,
            "{document} names {} tests",
            tests.len()
        );
        for (file, test) in tests {
            let path = find(root, &file);
            let source = std::fs::read_to_string(&path)
                .unwrap_or_else(|e| panic!("{document} names {}: {e}", path.display()));
            assert!(
                is_a_test(&source, &test),
                "{document} names {test}, which {} does not have",
                path.display()
            );
        }
    }
}

#[test]
fn every_statement_has_a_number_of_its_own_and_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("SEMANTICS.md")).unwrap();
    let mut numbers = BTreeSet::new();
    // What is said to those who come from LiteFS has no numbers.
    let (promises, _) = text.split_once("\n## For those").expect("the last section");
    for statement in promises.split("\n- **").skip(1) {
        let (number, rest) = statement.split_once("**").expect("a number");
        assert!(
            numbers.insert(number.to_owned()),
            "two statements are {number}"
        );
        // The one that promises nothing has nothing to check.
        let nothing_promised = number == "4.1";
        let checked = !named(rest).is_empty();
        assert!(checked || nothing_promised, "{number} names no test");
    }
    assert!(numbers.len() >= 40, "{} statements", numbers.len());
}
