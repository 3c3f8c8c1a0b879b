//! How a row is measured: cases that take turns, each beside the raw loop, and the table.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

const LEAST_ROUNDS: usize = 5;
/// A comparison whose raw loop varied by more than this is repeated, so often at most.
const MOST_SPREAD: f64 = 2.0;
const ATTEMPTS: usize = 3;

/// A case: runs once and returns its cost in nanoseconds.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: Box<dyn FnMut() -> f64>,
}

/// Returns a case.
pub(crate) fn case(name: &'static str, run: impl FnMut() -> f64 + 'static) -> Case {
    Case { name, run: Box::new(run) }
}

/// What a row promises of `ours` and the one it names.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// Nothing.
    None,
    /// It costs at least so many times less.
    TimesLess(f64),
    /// It costs at most so many times as much.
    TimesAsMuch(f64),
}

/// A line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) ours: &'static str,
    pub(crate) against: &'static str,
    pub(crate) target: Target,
}

/// Cases that take turns, and the lines that they make.
pub(crate) struct Comparison {
    /// What the system can do at best: runs before each of the others, whose ratios to it are of
    /// such pairs.
    pub(crate) limit: Case,
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
    /// Reads `--rounds` and `--only`.
    pub(crate) fn parse() -> Self {
        let mut parsed = Self { rounds: 7, only: String::new() };
        let mut words = std::env::args().skip(1);
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
}

/// What a case cost in a round, and the limit just before it.
#[derive(Debug, Clone, Copy)]
struct Pair {
    cost: f64,
    limit: f64,
}

type Pairs = BTreeMap<&'static str, Vec<Pair>>;

/// Measures comparisons, prints the table, and returns how many targets were missed.
pub(crate) fn measure(comparisons: Vec<Comparison>, arguments: &Arguments) -> usize {
    println!("\n| measured | tickbus | compared with | target | ratio | verdict | others |");
    println!("|---|---:|---|---:|---:|---|---|");
    let mut missed = 0;
    for mut comparison in comparisons {
        comparison.rows.retain(|row| row.name.contains(&arguments.only));
        if comparison.rows.is_empty() {
            continue;
        }
        let mut best: Option<(f64, Pairs)> = None;
        for _ in 0..ATTEMPTS {
            let (spread, pairs) = attempt(&mut comparison, arguments.rounds);
            if best.as_ref().is_none_or(|(least, _)| spread < *least) {
                best = Some((spread, pairs));
            }
            if spread <= MOST_SPREAD {
                break;
            }
        }
        let Some((spread, pairs)) = best else { unreachable!("there was an attempt") };
        let Comparison { limit, rows, .. } = &comparison;
        let has_row = |name: &&str| rows.iter().any(|row| [row.ours, row.against].contains(name));
        let mut others: Vec<&str> = pairs.keys().copied().filter(|name| !has_row(name)).collect();
        for row in rows {
            missed += usize::from(print(row, &others, limit.name, spread, &pairs));
            others.clear();
        }
    }
    missed
}

/// Runs all rounds and returns how much the limit varied, and what everything cost.
fn attempt(comparison: &mut Comparison, rounds: usize) -> (f64, Pairs) {
    let mut pairs = Pairs::new();
    for _ in 0..rounds {
        for case in &mut comparison.cases {
            let limit = (comparison.limit.run)();
            let cost = (case.run)();
            pairs.entry(case.name).or_default().push(Pair { cost, limit });
        }
    }
    let limits = || pairs.values().flatten().map(|pair| pair.limit);
    let spread = limits().fold(0.0, f64::max) / limits().fold(f64::INFINITY, f64::min);
    (spread, pairs)
}

/// Prints a row, with what others cost that have none of their own, and returns whether its target
/// was missed.
fn print(row: &Row, others: &[&str], limit: &str, spread: f64, pairs: &Pairs) -> bool {
    let ours = &pairs[row.ours];
    let costs = |name: &str| match name == limit {
        true => ours.iter().map(|pair| pair.limit).collect::<Vec<_>>(),
        false => pairs[name].iter().map(|pair| pair.cost).collect(),
    };
    let by_round = costs(row.against);
    let ratios = by_round.iter().zip(ours).map(|(against, ours)| against / ours.cost);
    let times_less = median(ratios.collect());
    let (target, ratio, is_met) = match row.target {
        Target::None => (String::new(), times_less, None),
        Target::TimesLess(least) => (format!(">= {least}x"), times_less, Some(times_less >= least)),
        Target::TimesAsMuch(most) => {
            (format!("<= {most}x"), 1.0 / times_less, Some(1.0 / times_less <= most))
        }
    };
    let shown = |name: &str| format!("{name} {}", show(median(costs(name))));
    let mut others: Vec<String> = others.iter().map(|name| shown(name)).collect();
    if spread > MOST_SPREAD {
        others.push(format!("NOISY: {limit} varied {spread:.1}x"));
    }
    println!(
        "| {} | {} | {} | {target} | {ratio:.2}x | {} | {} |",
        row.name,
        show(median(costs(row.ours))),
        shown(row.against),
        match is_met {
            None => "",
            Some(true) => "pass",
            Some(false) => "FAIL",
        },
        others.join(", "),
    );
    is_met == Some(false)
}

fn show(nanoseconds: f64) -> String {
    match nanoseconds {
        cost if cost < 10_000.0 => format!("{cost:.2} ns"),
        cost if cost < 10_000_000.0 => format!("{:.1} us", cost / 1e3),
        cost => format!("{:.1} ms", cost / 1e6),
    }
}

/// Returns the median.
pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[(figures.len() - 1) / 2]
}

/// Returns the type of the file system of a folder.
pub(crate) fn file_system(folder: &Path) -> String {
    let output = Command::new("findmnt").args(["-n", "-o", "FSTYPE", "-T"]).arg(folder).output();
    let told = output.ok().filter(|output| output.status.success());
    let told = told.and_then(|output| String::from_utf8(output.stdout).ok());
    told.map_or_else(|| "unknown file system".to_owned(), |told| told.trim().to_owned())
}
