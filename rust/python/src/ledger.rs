//! What is noted about each publication: one more on its topic, and, once somebody wants envelopes,
//! its number, its topic and its time.
//!
//! It is stamped when it has been pushed, in the order of pushing. A reader cannot see the event
//! before: no Python code runs in between, and so no other thread.

use crate::calls;
use crate::gil::{GilCell, GilFlag};
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple};
use std::time::{SystemTime, UNIX_EPOCH};
use tickbus::Topic;

/// What an envelope says about its event.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stamp {
    sequence: u64,
    /// In ns since the Unix epoch, UTC; 0 is unknown.
    ts_publish: u64,
    /// The topic's id; 0 is none.
    topic: u32,
}

#[derive(Debug)]
struct Row {
    topic: Topic,
    /// Its name as envelopes give it, made for the first one.
    name: Option<Py<PyString>>,
    published: u64,
}

/// The publications of one bus.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// By topic id; the topic with id 1 is the first.
    rows: GilCell<Vec<Row>>,
    stamping: GilFlag,
    /// Stamps tell the time.
    timing: GilFlag,
    /// What tells the time instead of the system's clock: an object with `time_ns()`.
    clock: Option<Py<PyAny>>,
}

impl Ledger {
    pub(crate) fn new(clock: Option<Py<PyAny>>) -> Self {
        let (rows, stamping, timing) = Default::default();
        Self { rows, stamping, timing, clock }
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.clock)
    }

    pub(crate) fn clock(&self) -> Option<&Py<PyAny>> {
        self.clock.as_ref()
    }

    /// Begins to stamp each event with its number and topic.
    pub(crate) fn stamp_from_now_on(&self) {
        self.stamping.set();
    }

    /// Begins to stamp each event with its time as well.
    pub(crate) fn time_from_now_on(&self) {
        self.stamping.set();
        self.timing.set();
    }

    /// Makes room for a topic's numbers.
    pub(crate) fn learn(&self, topic: &Topic) {
        self.rows.with(|rows| {
            // Ids are given one after another, and each new one comes through here.
            if rows.len() < topic.id() as usize {
                rows.push(Row { topic: topic.clone(), name: None, published: 0 });
            }
        });
    }

    /// Returns the time that the clock given tells, in ns since the Unix epoch; `None` where it is
    /// the system's. May run Python code.
    #[inline]
    pub(crate) fn time_of_call(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.clock.as_ref().map(|clock| told_by(clock.bind(py))).transpose()
    }

    /// Notes that an event was just pushed, and returns whether it must be stamped.
    #[inline]
    pub(crate) fn note(&self, topic: Option<u32>) -> bool {
        if let Some(id) = topic {
            self.rows.with(|rows| {
                if let Some(row) = rows.get_mut(id as usize - 1) {
                    row.published += 1;
                }
            });
        }
        self.stamping.is_set()
    }

    /// Returns the stamp of an event that was just pushed, as one of so many publications.
    pub(crate) fn stamp(
        &self,
        published: u64,
        topic: Option<u32>,
        called_at: Option<u64>,
    ) -> Stamp {
        let ts_publish = match called_at {
            Some(told) => told,
            None if self.timing.is_set() => system_time(),
            None => 0,
        };
        Stamp { sequence: published - 1, ts_publish, topic: topic.unwrap_or_default() }
    }

    /// Returns how many events were published on the topic of that name and on those below it.
    pub(crate) fn published_below(&self, name: &str) -> u64 {
        let is_below = |topic: &str| {
            topic.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        self.rows.with(|rows| {
            let below = rows.iter().filter(|row| is_below(row.topic.name()));
            below.map(|row| row.published).sum()
        })
    }

    /// Returns `Envelope(sequence, topic, ts_publish, event)`.
    pub(crate) fn envelope(
        &self,
        py: Python<'_>,
        stamp: Stamp,
        event: Py<PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let topic = match self.name(py, stamp.topic) {
            Some(name) => name.into_bound(py).into_any(),
            None => py.None().into_bound(py),
        };
        let number = |number: u64| match number.into_pyobject(py) {
            Ok(number) => number.into_any(),
            Err(never) => match never {},
        };
        let (sequence, ts_publish) = (number(stamp.sequence), number(stamp.ts_publish));
        let fields = [sequence, topic, ts_publish, event.into_bound(py)];
        let fields = PyTuple::new(py, fields)?.into_any();
        let (make, class) = tuple_subclass(py)?;
        calls::call(py, make, [class, &fields]).map(Bound::unbind)
    }

    fn name(&self, py: Python<'_>, topic: u32) -> Option<Py<PyString>> {
        let place = (topic as usize).checked_sub(1)?;
        let known = self.rows.with(|rows| {
            let row = rows.get(place)?;
            Some(row.name.as_ref().map(|n| n.clone_ref(py)).ok_or_else(|| row.topic.clone()))
        })?;
        Some(known.unwrap_or_else(|topic| {
            let name = PyString::new(py, topic.name()).unbind();
            let kept = name.clone_ref(py);
            // Another thread may have made it meanwhile.
            drop(self.rows.with(|rows| rows.get_mut(place).and_then(|r| r.name.replace(kept))));
            name
        }))
    }
}

/// Makes what would else be made on first use; see `process::prepare`.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    tuple_subclass(py).map(|_| ())
}

/// Returns `tuple.__new__` and `Envelope`. Its own `__new__` is Python code, in which Ctrl-C may
/// raise, and the event would be lost.
fn tuple_subclass(py: Python<'_>) -> PyResult<(&Py<PyAny>, &Bound<'_, PyAny>)> {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let make = MAKE.get_or_try_init(py, || {
        py.get_type::<PyTuple>().getattr(intern!(py, "__new__")).map(Bound::unbind)
    })?;
    let class = CLASS.get_or_try_init(py, || {
        py.import("tickbus.envelope")?.getattr("Envelope").map(Bound::unbind)
    })?;
    Ok((make, class.bind(py)))
}

#[cold]
fn told_by(clock: &Bound<'_, PyAny>) -> PyResult<u64> {
    let told = calls::call_method(intern!(clock.py(), "time_ns"), [clock], None)?;
    told.extract().map_err(|_| {
        PyTypeError::new_err(format!(
            "clock.time_ns() was {told:?}; it must be a number of ns since the Unix epoch, at least 0"
        ))
    })
}

fn system_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
