//! The LMAX Disruptor, in a Java machine that runs as long as this process and measures when asked.

use crate::harness::Case;
use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The pipes to the machine, and what it says it is; or why there is none.
struct Machine {
    pipes: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    about: String,
}

fn machine() -> Result<&'static Machine, &'static str> {
    static MACHINE: OnceLock<Result<Machine, String>> = OnceLock::new();
    MACHINE.get_or_init(start).as_ref().map_err(String::as_str)
}

fn start() -> Result<Machine, String> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/lmax/run.sh");
    let mut child = Command::new(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{script}: {error}"))?;
    let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        unreachable!("both are piped")
    };
    // It ends when its input does, which is when this process ends.
    let mut stdout = BufReader::new(stdout);
    let mut about = String::new();
    let read = stdout.read_line(&mut about).map_err(|error| error.to_string())?;
    match about.trim().strip_prefix("ready: ") {
        Some(about) => Ok(Machine { about: about.to_owned(), pipes: Mutex::new((stdin, stdout)) }),
        None if read == 0 => Err(format!("{script} ended without a word")),
        None => Err(about.trim().to_owned()),
    }
}

/// Returns what the head of the table says about it.
pub(crate) fn about() -> String {
    match machine() {
        Ok(machine) => machine.about.clone(),
        Err(error) => format!("no LMAX Disruptor: {error}"),
    }
}

/// Returns a case whose figures the machine gives when it is sent `request`, if there is a machine.
pub(crate) fn case(name: &'static str, request: String) -> Option<Case> {
    let machine = machine().ok()?;
    let run = move || {
        let mut pipes = machine.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        let (stdin, stdout) = &mut *pipes;
        writeln!(stdin, "{request}").expect("the Java machine listens");
        let mut reply = String::new();
        stdout.read_line(&mut reply).expect("the Java machine answers");
        let figures = reply.split_whitespace().map(|word| {
            word.parse().unwrap_or_else(|_| panic!("{request:?} was answered by {reply:?}"))
        });
        let figures: Vec<f64> = figures.collect();
        assert!(!figures.is_empty(), "{request:?} was not answered");
        figures
    };
    Some((name, Box::new(run)))
}
