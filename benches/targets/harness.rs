//! How a target is measured: cases that take turns in rounds, what they publish, and the table.

use core_affinity::CoreId;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Events that a ring holds, and that are published before they are read.
pub(crate) const CAPACITY: usize = 1_024;
const BATCH: u64 = CAPACITY as u64;
/// Batches of a round for one reader; for more readers there are fewer, but never fewer than
/// `LEAST_BATCHES`.
const BATCHES: usize = 1_024;
const LEAST_BATCHES: usize = 128;
const WARM_UP_BATCHES: usize = 16;
const LEAST_ROUNDS: usize = 5;
const PRODUCER_SHIFT: u32 = 48;

/// What is published: 32 bytes, all of which follow from the number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Trade {
    pub(crate) sequence: u64,
    pub(crate) price: u64,
    pub(crate) quantity: u64,
    pub(crate) ts_event: u64,
}

const _: () = assert!(size_of::<Trade>() == 32);

impl Trade {
    #[inline]
    pub(crate) fn numbered(sequence: u64) -> Self {
        let (price, quantity) = (sequence ^ 0x5555, sequence.wrapping_add(0x1234_5678));
        Self { sequence, price, quantity, ts_event: !sequence }
    }

    /// Returns an event of one of several producers.
    #[inline]
    pub(crate) fn of_producer(producer: usize, number: u64) -> Self {
        Self::numbered((producer as u64) << PRODUCER_SHIFT | number)
    }

    /// Returns who published it, and which of its events it is.
    #[inline]
    pub(crate) fn origin(&self) -> (usize, u64) {
        let number = self.sequence & ((1 << PRODUCER_SHIFT) - 1);
        ((self.sequence >> PRODUCER_SHIFT) as usize, number)
    }
}

/// Places in what a case returns, in nanoseconds; a case without percentiles returns its median
/// only.
pub(crate) const P50: usize = 0;
pub(crate) const P99: usize = 1;
pub(crate) const P999: usize = 2;

/// A case: runs once and returns its figures.
pub(crate) type Case = (&'static str, Box<dyn FnMut() -> Vec<f64>>);

/// Returns a case.
pub(crate) fn case(name: &'static str, mut run: impl FnMut() -> f64 + 'static) -> Case {
    (name, Box::new(move || vec![run()]))
}

/// What a row promises of `ours` and the best of those it names.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// Nothing.
    None,
    /// It costs at least so many times less.
    TimesLess(f64),
    /// It costs at most so many times as much.
    TimesAsMuch(f64),
}

/// How a cost is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Unit {
    Nanoseconds,
    MillionsPerSecond,
}

impl Unit {
    pub(crate) fn show(self, nanoseconds: f64) -> String {
        match self {
            Self::Nanoseconds if nanoseconds < 10_000.0 => format!("{nanoseconds:.2} ns"),
            Self::Nanoseconds => format!("{:.1} us", nanoseconds / 1e3),
            Self::MillionsPerSecond => format!("{:.1} M/s", 1e3 / nanoseconds),
        }
    }
}

/// A line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) ours: &'static str,
    pub(crate) against: &'static [&'static str],
    pub(crate) target: Target,
    /// Which of the figures.
    pub(crate) figure: usize,
    pub(crate) unit: Unit,
}

impl Row {
    /// Returns a line about medians in nanoseconds.
    pub(crate) fn new(
        name: impl Into<String>,
        ours: &'static str,
        against: &'static [&'static str],
        target: Target,
    ) -> Self {
        let (figure, unit) = (P50, Unit::Nanoseconds);
        Self { name: name.into(), ours, against, target, figure, unit }
    }
}

/// Cases that take turns, and the lines that they make.
pub(crate) struct Comparison {
    pub(crate) cases: Vec<Case>,
    pub(crate) rows: Vec<Row>,
}

/// What the command line asked for.
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) rounds: usize,
    only: String,
}

impl Arguments {
    /// Reads `--rounds` and `--only`; cargo adds `--bench`.
    pub(crate) fn parse() -> Self {
        let mut parsed = Self { rounds: 7, only: String::new() };
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
        while let Some(word) = words.next() {
            match (word.as_str(), words.next()) {
                ("--rounds", Some(rounds)) => {
                    parsed.rounds = rounds.parse().expect("--rounds takes a number");
                }
                ("--only", Some(only)) => parsed.only = only,
                _ => panic!("{word:?}: only --rounds N and --only TEXT are known"),
            }
        }
        assert!(parsed.rounds >= LEAST_ROUNDS, "--rounds must be at least {LEAST_ROUNDS}");
        parsed
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }
}

/// Measures comparisons, prints the table, and returns how many targets were missed.
pub(crate) fn measure(comparisons: Vec<Comparison>, arguments: &Arguments) -> usize {
    println!("| measured | tickbus | compared with | target | ratio | verdict | others |");
    println!("|---|---:|---|---:|---:|---|---|");
    let mut missed = 0;
    for Comparison { cases, rows } in comparisons {
        let rows: Vec<Row> = rows.into_iter().filter(|row| arguments.wants(&row.name)).collect();
        if !rows.is_empty() {
            let medians = medians(cases, arguments.rounds);
            let ours: Vec<_> = rows.iter().map(|row| row.ours).collect();
            missed += rows.iter().filter(|row| print(row, &ours, &medians)).count();
        }
    }
    missed
}

/// By case, its figures.
pub(crate) type Medians = BTreeMap<&'static str, Vec<f64>>;

/// Runs the cases in turn, and returns by case the median of each figure over the rounds.
pub(crate) fn medians(mut cases: Vec<Case>, rounds: usize) -> Medians {
    let mut found = BTreeMap::<_, Vec<Vec<f64>>>::new();
    for _ in 0..rounds {
        for (name, run) in &mut cases {
            found.entry(*name).or_default().push(run());
        }
    }
    let of_figures = |rounds: Vec<Vec<f64>>| {
        let figures = 0..rounds[0].len();
        figures.map(|figure| median(rounds.iter().map(|round| round[figure]))).collect()
    };
    found.into_iter().map(|(name, rounds)| (name, of_figures(rounds))).collect()
}

/// Prints a line, among those about `ours`, and returns whether its target was missed.
fn print(row: &Row, ours: &[&str], medians: &Medians) -> bool {
    let cost = |name: &str| medians[name][row.figure];
    let shown = |name: &str| format!("{name} {}", row.unit.show(cost(name)));
    let known = |name: &&&str| medians.contains_key(**name);
    let mut against: Vec<&str> = row.against.iter().filter(known).copied().collect();
    against.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
    let Some(&best) = against.first() else {
        println!("| {} | {} | | | | | |", row.name, row.unit.show(cost(row.ours)));
        return false;
    };
    let is_other = |name: &&str| *name != best && !ours.contains(name);
    let mut others: Vec<&str> = medians.keys().copied().filter(is_other).collect();
    others.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
    let (times_less, times_as_much) = (cost(best) / cost(row.ours), cost(row.ours) / cost(best));
    let (target, ratio, is_met) = match row.target {
        Target::None => (String::new(), times_less, None),
        Target::TimesLess(least) => (format!(">= {least}x"), times_less, Some(times_less >= least)),
        Target::TimesAsMuch(most) => {
            (format!("<= {most}x"), times_as_much, Some(times_as_much <= most))
        }
    };
    println!(
        "| {} | {} | {} | {target} | {ratio:.2}x | {} | {} |",
        row.name,
        row.unit.show(cost(row.ours)),
        shown(best),
        verdict(is_met),
        others.iter().map(|name| shown(name)).collect::<Vec<_>>().join(", "),
    );
    is_met == Some(false)
}

/// Returns how a verdict is written.
pub(crate) fn verdict(is_met: Option<bool>) -> &'static str {
    match is_met {
        None => "",
        Some(true) => "pass",
        Some(false) => "FAIL",
    }
}

/// Returns the median.
pub(crate) fn median(figures: impl Iterator<Item = f64>) -> f64 {
    percentiles(figures.collect(), &[0.5])[0]
}

/// Returns the given quantiles.
pub(crate) fn percentiles(mut figures: Vec<f64>, quantiles: &[f64]) -> Vec<f64> {
    figures.sort_by(f64::total_cmp);
    let last = figures.len() - 1;
    quantiles.iter().map(|quantile| figures[(last as f64 * quantile).round() as usize]).collect()
}

pub(crate) fn nanoseconds(spent: Duration) -> f64 {
    spent.as_nanos() as f64
}

/// Times that are averaged before a median is taken of them: a clock counts in steps of 10 ns on some
/// systems.
const AVERAGED: usize = 16;

/// Returns the median of means of a few times that follow one another.
pub(crate) fn median_of_means(times: &[f64]) -> f64 {
    median(times.chunks_exact(AVERAGED).map(|few| few.iter().sum::<f64>() / AVERAGED as f64))
}

/// Returns what a pair of looks at the clock takes, in nanoseconds.
pub(crate) fn clock_cost() -> f64 {
    let looks = (0..16_384).map(|_| nanoseconds(Instant::now().elapsed()));
    median_of_means(&looks.collect::<Vec<_>>())
}

/// Returns what publishing an event costs, in nanoseconds: the median over batches of as many
/// events as a ring holds, each event made just before, as a feed makes them. `check` reads each
/// batch outside of the time.
#[inline]
pub(crate) fn publish_cost(
    readers: usize,
    mut publish: impl FnMut(Trade),
    mut check: impl FnMut(Range<u64>),
) -> f64 {
    let count = WARM_UP_BATCHES + (BATCHES / readers.max(1)).max(LEAST_BATCHES);
    let spent = (0..count as u64).map(|number| {
        let batch = number * BATCH..(number + 1) * BATCH;
        let start = Instant::now();
        for number in batch.clone() {
            publish(Trade::numbered(number));
        }
        let spent = nanoseconds(start.elapsed());
        check(batch);
        spent / BATCH as f64
    });
    median(spent.skip(WARM_UP_BATCHES))
}

/// Returns what the loop of [`publish_cost`] takes around nothing.
pub(crate) fn empty_loop() -> f64 {
    publish_cost(1, |trade| _ = black_box(trade), |_| ())
}

/// Compares everything that can be read with what was published.
pub(crate) fn assert_all_arrived(
    published: impl IntoIterator<Item = u64>,
    mut read: impl FnMut() -> Option<Trade>,
) {
    for number in published {
        assert_eq!(read(), Some(Trade::numbered(number)), "an event is missing or another one");
    }
    assert_eq!(read(), None, "there are more events than were published");
}

/// The CPUs on which the two threads of a case run, and keep running.
pub(crate) fn two_cpus() -> [CoreId; 2] {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    match cpus[..] {
        [one, other, ..] => [one, other],
        _ => panic!("cases with two threads need two CPUs"),
    }
}

/// Binds the thread to a CPU.
pub(crate) fn pin(cpu: CoreId) {
    assert!(core_affinity::set_for_current(cpu), "a thread can be bound to a CPU of the process");
}
