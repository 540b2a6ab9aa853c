//! One program for all targets: the body is that of the program's own name. Without arguments of
//! libFuzzer's own but with `TENURE_SEEDS=DIR` it writes the target's seeds there before it begins.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tenure::fuzz::{Body, body, seeds};

static BODY: std::sync::OnceLock<Body> = std::sync::OnceLock::new();

fuzz_target!(
    init: {
        let target = env!("CARGO_BIN_NAME");
        if let Some(dir) = std::env::var_os("TENURE_SEEDS") {
            let inputs = seeds::seeds(target).into_iter().chain(seeds::crashers(target));
            for (n, input) in inputs.enumerate() {
                let path = std::path::Path::new(&dir).join(format!("seed-{n}"));
                std::fs::write(path, input).expect("a seed is written");
            }
        }
        BODY.get_or_init(|| body(target));
    },
    |data: &[u8]| BODY.get().expect("it was set at the beginning")(data)
);
