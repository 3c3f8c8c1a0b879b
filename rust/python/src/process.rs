//! What belongs to one process and one interpreter: use after `fork` is refused, because the child
//! has the parent's queues but none of its threads and loops; so is a second interpreter.

use crate::error::ForkedError;
use crate::slab::Slab;
use crate::{awaitable, bus, error, event, ledger, loop_bridge, store, wakeup, warnings};
use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

/// How often the process has become a child by `fork`.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// The process that made something.
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
        "this belongs to the process that this one was forked from; make a new one here, or \
         start processes by the spawn method",
    )
}

/// A part of a bus that a child by `fork` leaves alone and does not even drop: a thread of the
/// parent may have been inside, with a lock that nobody is left to release, and a wake-up would
/// reach the parent's event loop. Whoever uses it has checked the process.
#[derive(Debug)]
pub(crate) struct Own<T> {
    value: ManuallyDrop<T>,
    process: Process,
}

impl<T> Own<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: ManuallyDrop::new(value), process: Process::current() }
    }

    /// Returns the process that made it.
    #[inline]
    pub(crate) fn process(&self) -> Process {
        self.process
    }
}

impl<T> Deref for Own<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Own<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> Drop for Own<T> {
    #[inline]
    fn drop(&mut self) {
        if self.process.is_current() {
            // SAFETY: the value is dropped here and nowhere else, and not used after it.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

/// Marks everything made so far as another process's. Called in the child after a fork.
#[pyfunction]
pub(crate) fn _after_fork() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    bus::forget_all();
    store::forget_all();
    warnings::forget_reader();
}

/// Makes what is made once and runs Python code for it, such as an import: a `fork` while another
/// thread does that would leave it half made to the child, which would wait for ever.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    error::prepare(py);
    event::prepare(py);
    awaitable::class(py)?;
    ledger::prepare(py)?;
    py.get_type::<Slab>();
    loop_bridge::prepare(py)?;
    wakeup::prepare(py)
}

/// Refuses every interpreter but the main one: types, caches and buses are shared by the process,
/// and the lock that they rely on is the main interpreter's. Called before anything is made.
pub(crate) fn refuse_subinterpreters() -> PyResult<()> {
    // SAFETY: modules are initialized attached; the two pointers are only compared.
    let is_main = unsafe { ffi::PyInterpreterState_Get() == ffi::PyInterpreterState_Main() };
    if is_main {
        return Ok(());
    }
    Err(PyImportError::new_err(
        "tickbus was imported in a subinterpreter; it runs in the main interpreter only: publish \
         and subscribe there, or use processes",
    ))
}

/// Refuses to be pickled: events stay in one process.
#[cold]
pub(crate) fn no_pickle(class: &str, instead: &str) -> PyErr {
    pyo3::exceptions::PyTypeError::new_err(format!(
        "cannot pickle {class}: it belongs to one process; {instead}"
    ))
}
