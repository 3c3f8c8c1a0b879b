//! Measures the Rust targets and prints for each the target, the ratio and pass or fail, then the
//! promised figures; the exit status is 1 when one was missed.
//!
//! What is compared takes turns in rounds of one run; a figure is the median over the rounds.

#[path = "../../tests/support/counting.rs"]
mod counting;
mod harness;
mod lmax;
mod peers;
mod promises;
mod publish;
mod threads;

use harness::Arguments;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Others would wait for ever for a thread that found something wrong.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::exit(101);
    }));
    println!(
        "tickbus {}; disruptor {}, rtrb {}, tokio {}, {}; medians of {} alternating rounds",
        env!("CARGO_PKG_VERSION"),
        version_of("disruptor"),
        version_of("rtrb"),
        version_of("tokio"),
        lmax::about(),
        arguments.rounds,
    );
    println!("the empty loop of the publishing cases takes {:.2} ns\n", harness::empty_loop());
    let mut comparisons = publish::comparisons();
    comparisons.extend(threads::comparisons());
    let mut missed = harness::measure(comparisons, &arguments);
    println!();
    missed += promises::measure(&arguments);
    println!(
        "\n{}",
        if missed == 0 { "all targets met".into() } else { format!("{missed} missed") }
    );
    ExitCode::from(u8::from(missed > 0))
}

/// Returns which version of a peer the lock file names.
fn version_of(package: &str) -> &'static str {
    let lock = include_str!("../../Cargo.lock");
    let entry = lock.split_once(&format!("name = \"{package}\"\nversion = \""));
    entry.and_then(|(_, rest)| rest.split_once('"')).map_or("?", |(version, _)| version)
}
