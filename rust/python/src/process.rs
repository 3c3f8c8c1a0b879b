//! Refusing use after `fork`: the child has the parent's queues but none of its threads and loops.

use crate::error::ForkedError;
use pyo3::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often the process has become a child by `fork`.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// The process that made a bus.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process(u32);

impl Process {
    pub(crate) fn current() -> Self {
        Self(GENERATION.load(Ordering::Relaxed))
    }

    /// Returns whether the calling process is it, and not a child.
    #[inline]
    pub(crate) fn is_current(self) -> bool {
        self.0 == GENERATION.load(Ordering::Relaxed)
    }

    /// Returns an error in a child of the process.
    #[inline]
    pub(crate) fn check(self) -> PyResult<()> {
        if self.is_current() { Ok(()) } else { Err(forked()) }
    }
}

#[cold]
fn forked() -> PyErr {
    ForkedError::new_err(
        "the bus belongs to the process that this one was forked from; make a new bus here, or \
         start processes by the spawn method",
    )
}

/// Marks every bus made so far as another process's. Called in the child after a fork.
#[pyfunction]
pub(crate) fn _after_fork() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}
