//! Page checksums: the running total is that of the pages, and what is saved is loaded.

use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;

use crate::ltx::{CHECKSUM_FLAG, Pos};
use crate::store::disk::Real;
use crate::store::pages::PageList;
use crate::store::sums::{self, PageSums, SumsHeader};

fn total(model: &[u64]) -> u64 {
    model.iter().fold(0, |t, s| t ^ s) | CHECKSUM_FLAG
}

fn header(sequence: u64, of: &PageSums) -> SumsHeader {
    SumsHeader {
        sequence,
        pos: Pos {
            txid: sequence,
            checksum: of.checksum(),
        },
        page_size: 4096,
        pages: of.len(),
    }
}

fn save(path: &Path, sequence: u64, of: &mut PageSums) {
    let header = header(sequence, of);
    sums::save(&Real, path, &of.take_changes(), &header).unwrap();
}

fn entries(of: &PageSums) -> Vec<u64> {
    (1..=of.len()).map(|p| of.get(p)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Set(u32, u64),
    Resize(u32),
    Save,
    FailedSave,
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u32..1800, any::<u64>()).prop_map(|(p, s)| Step::Set(p, s)),
        2 => (0u32..1800).prop_map(Step::Resize),
        3 => Just(Step::Save),
        1 => Just(Step::FailedSave),
        1 => Just(Step::Reload),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn sums_are_a_list_with_a_total(steps in prop::collection::vec(step(), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checksums");
        let (mut sums, mut model) = (PageSums::default(), Vec::<u64>::new());
        let mut sequence = 0;
        for step in steps {
            match step {
                Step::Set(pgno, sum) => {
                    sums.set(pgno, sum);
                    model.resize(model.len().max(pgno as usize), 0);
                    model[pgno as usize - 1] = sum;
                }
                Step::Resize(pages) => {
                    sums.resize(pages);
                    // As a database grows: every new page has a checksum of its own.
                    for pgno in model.len() as u32 + 1..=pages {
                        sums.set(pgno, u64::from(pgno) << 8);
                    }
                    let old = model.len();
                    model.resize(pages as usize, 0);
                    for (i, sum) in model.iter_mut().enumerate().skip(old) {
                        *sum = (i as u64 + 1) << 8;
                    }
                }
                Step::Save => {
                    sequence += 1;
                    save(&path, sequence, &mut sums);
                }
                Step::FailedSave => {
                    sums.take_changes();
                    sums.mark_all_dirty();
                }
                Step::Reload => {
                    sequence += 1;
                    save(&path, sequence, &mut sums);
                    let (found, loaded) = sums::load(&Real, &path).unwrap().unwrap();
                    prop_assert_eq!(found, header(sequence, &sums));
                    prop_assert_eq!(entries(&loaded), model.clone());
                    prop_assert_eq!(loaded.recomputed(), loaded.checksum());
                    sums = loaded;
                }
            }
            prop_assert_eq!(sums.checksum(), total(&model));
            prop_assert_eq!(sums.recomputed(), total(&model));
            prop_assert_eq!(sums.len() as usize, model.len());
        }
    }

    #[test]
    fn the_checksum_of_a_change_is_known_before_it_is_made(
        old in prop::collection::vec(any::<u64>(), 0..50),
        pages in 0u32..60,
        seed in any::<u64>(),
    ) {
        let mut sums = PageSums::default();
        for (i, s) in old.iter().enumerate() {
            sums.set(i as u32 + 1, *s);
        }
        // Every new page, and some of the old ones.
        let changed: PageList = (1..=pages)
            .filter(|p| *p as usize > old.len() || seed >> (p % 64) & 1 == 1)
            .map(|p| (p, seed.wrapping_mul(u64::from(p) + 3)))
            .collect();
        let predicted = sums.checksum_with(&changed, pages);
        sums.resize(pages);
        changed.iter().for_each(|(p, s)| sums.set(p, s));
        prop_assert_eq!(predicted, sums.recomputed());
        prop_assert_eq!(predicted, sums.checksum());
    }
}

#[test]
fn there_is_no_page_0_and_none_beyond_the_end() {
    let mut sums = PageSums::default();
    sums.set(3, 7);
    assert_eq!(entries(&sums), [0, 0, 7]);
    assert_eq!((sums.get(0), sums.get(4), sums.get(u32::MAX)), (0, 0, 0));
}

#[test]
fn the_header_goes_to_two_places_in_turn_and_a_torn_one_does_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checksums");
    assert!(sums::load(&Real, &path).unwrap().is_none(), "no file");
    let mut sums = PageSums::default();
    for sequence in 1..=4 {
        sums.set(sequence as u32, sequence * 11);
        save(&path, sequence, &mut sums);
        assert_eq!(
            sums::load(&Real, &path).unwrap().unwrap().0.sequence,
            sequence
        );
    }
    let whole = std::fs::read(&path).unwrap();
    let slot = |sequence: u64| (sequence % 2 * 512) as usize;
    for at in 0..48 {
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[whole[slot(4) + at] ^ 1], (slot(4) + at) as u64)
            .unwrap();
        let (found, loaded) = sums::load(&Real, &path).unwrap().unwrap();
        assert_eq!(
            (found.sequence, loaded.len()),
            (3, 3),
            "byte {at} of header 4 flipped"
        );
        assert_eq!(entries(&loaded), [11, 22, 33]);
        std::fs::write(&path, &whole).unwrap();
    }
    let mut torn = whole.clone();
    torn[slot(3)] ^= 1;
    torn[slot(4)] ^= 1;
    std::fs::write(&path, torn).unwrap();
    assert!(
        sums::load(&Real, &path).unwrap().is_none(),
        "neither counts"
    );
}

#[test]
fn a_file_that_is_cut_off_never_loads_as_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checksums");
    let mut sums = PageSums::default();
    (1..=600).for_each(|p| sums.set(p, u64::from(p) * 3));
    save(&path, 1, &mut sums);
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 1, 511, 512, 559, 560, 4096, 4100, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        match sums::load(&Real, &path) {
            Ok(None) => assert!(len < 560, "the header is whole at {len}"),
            Err(e) => assert!(e.to_string().contains("shorter"), "{e}"),
            Ok(Some(_)) => panic!("loaded from {len} bytes of {}", whole.len()),
        }
    }
    // A header that claims more than there is costs an error and no memory.
    let claim = SumsHeader {
        sequence: 9,
        pages: u32::MAX,
        ..header(9, &sums)
    };
    std::fs::write(&path, &whole).unwrap();
    sums::save(&Real, &path, &PageSums::default().take_changes(), &claim).unwrap();
    assert!(sums::load(&Real, &path).is_err());
}
