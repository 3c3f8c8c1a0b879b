//! libFuzzer makes the bytes that logs are made of, or an entry of a ledger. `make fuzz` builds and runs
//! it.
#![no_main]

use std::path::PathBuf;

/// What bytes begin with that are an entry of a ledger.
const ENTRY: u8 = 254;

/// Writes real logs and entries, with which a fuzzer begins, into the folder `SEEDS`.
fn write_seeds() {
    let Some(folder) = std::env::var_os("SEEDS").map(PathBuf::from) else { return };
    let mut seeds = tickbus::real_logs();
    seeds.extend(tickbus::real_entries().into_iter().map(|entry| [&[ENTRY], &*entry].concat()));
    std::fs::create_dir_all(&folder).expect("there is room");
    for (number, seed) in seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("real-{number}")), seed).expect("there is room");
    }
}

libfuzzer_sys::fuzz_target!(init: write_seeds(), |bytes: &[u8]| match bytes.split_first() {
    Some((&ENTRY, entry)) => tickbus::look_at_any_entry(entry),
    _ => tickbus::look_at_any_log(bytes),
});
