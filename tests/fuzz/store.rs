//! libFuzzer makes the bytes that logs are made of. `make fuzz` builds and runs it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tickbus::look_at_any_log(bytes));
