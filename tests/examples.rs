//! The examples run.

#[path = "../examples/quick_start.rs"]
mod quick_start;
#[path = "../examples/select_shutdown.rs"]
mod select_shutdown;

#[test]
fn quick_start_counts_every_trade() {
    quick_start::main().unwrap();
}

#[test]
fn select_shutdown_loses_nothing() {
    select_shutdown::main().unwrap();
}
