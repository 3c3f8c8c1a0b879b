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
use std::num::NonZeroU32;
use std::time::{SystemTime, UNIX_EPOCH};
use tickbus::Topic;

/// What an envelope says about its event.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stamp {
    pub(crate) sequence: u64,
    /// In ns since the Unix epoch, UTC; 0 is unknown.
    pub(crate) ts_publish: u64,
    /// The topic's id; 0 is none.
    pub(crate) topic: u32,
    /// A replay published it.
    pub(crate) is_replayed: bool,
}

/// Which of the stamps kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StampPlace(NonZeroU32);

/// A topic as envelopes name it.
#[derive(Debug)]
struct Name {
    topic: Topic,
    /// Made for the first envelope.
    text: Option<Py<PyString>>,
}

/// The publications of one bus.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Publications count on their topics and need nothing else: there is no clock but the
    /// system's, and nobody wants envelopes.
    only_counts: GilFlag,
    /// By topic id; 0 counts nothing.
    published: GilCell<Vec<u64>>,
    /// By topic id; the topic with id 1 is the first.
    names: GilCell<Vec<Name>>,
    /// What tells the time instead of the system's clock: an object with `time_ns()`.
    clock: Option<Py<PyAny>>,
    stamping: GilFlag,
    /// Each event in the slab that was ever stamped has a place here.
    stamps: GilCell<Vec<Stamp>>,
}

impl Ledger {
    pub(crate) fn new(clock: Option<Py<PyAny>>) -> Self {
        let (only_counts, stamping) = (GilFlag::default(), GilFlag::default());
        // A clock is asked in any case, so that a snapshot tells the time too.
        let begin = if clock.is_some() { &stamping } else { &only_counts };
        begin.set();
        let (published, names, stamps) = Default::default();
        Self { only_counts, published, names, clock, stamping, stamps }
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.clock)
    }

    pub(crate) fn clock(&self) -> Option<&Py<PyAny>> {
        self.clock.as_ref()
    }

    /// Begins to stamp each event; false if it had begun before.
    pub(crate) fn begin_to_stamp(&self) -> bool {
        self.only_counts.clear();
        self.stamping.set()
    }

    #[inline]
    pub(crate) fn only_counts(&self) -> bool {
        self.only_counts.is_set()
    }

    /// Makes room for a topic's numbers.
    pub(crate) fn learn(&self, topic: &Topic) {
        // Ids are given one after another, and each new one comes through here.
        self.published.with(|published| {
            published.resize(published.len().max(topic.id() as usize + 1), 0);
        });
        self.names.with(|names| {
            if names.len() < topic.id() as usize {
                names.push(Name { topic: topic.clone(), text: None });
            }
        });
    }

    /// Returns the time that the clock given tells, in ns since the Unix epoch; `None` where it is
    /// the system's. May run Python code.
    #[inline]
    pub(crate) fn time_of_call(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        self.clock.as_ref().map(|clock| told_by(clock.bind(py))).transpose()
    }

    /// Counts an event that was just pushed on its topic.
    #[inline]
    pub(crate) fn count(&self, topic: u32) {
        self.count_many(topic, 1);
    }

    /// As [`Ledger::count`], for so many.
    #[inline]
    pub(crate) fn count_many(&self, topic: u32, pushed: u64) {
        self.published.with(|published| {
            if let Some(count) = published.get_mut(topic as usize) {
                *count += pushed;
            }
        });
    }

    /// Returns the stamp of an event that was just pushed, as one of so many publications; `None`
    /// if nobody wants it.
    pub(crate) fn stamp(
        &self,
        published: u64,
        topic: Option<u32>,
        called_at: Option<u64>,
        is_replayed: bool,
    ) -> Option<Stamp> {
        self.stamping.is_set().then(|| Stamp {
            sequence: published - 1,
            ts_publish: called_at.unwrap_or_else(system_time),
            topic: topic.unwrap_or_default(),
            is_replayed,
        })
    }

    /// Keeps a stamp, in the place of the one before if there is one.
    pub(crate) fn keep(&self, place: Option<StampPlace>, stamp: Stamp) -> StampPlace {
        self.stamps.with(|stamps| match place {
            Some(place) => {
                stamps[place.0.get() as usize - 1] = stamp;
                place
            }
            None => {
                stamps.push(stamp);
                let count = u32::try_from(stamps.len()).ok().and_then(NonZeroU32::new);
                let Some(count) = count else { unreachable!("a slab has fewer than 2^32 entries") };
                StampPlace(count)
            }
        })
    }

    /// Returns a stamp that was kept.
    pub(crate) fn kept(&self, place: Option<StampPlace>) -> Stamp {
        let stamp = |place: StampPlace| self.stamps.with(|all| all[place.0.get() as usize - 1]);
        place.map(stamp).unwrap_or_default()
    }

    /// Returns how many events were published on the topic of that name and on those below it.
    pub(crate) fn published_below(&self, name: &str) -> u64 {
        let is_below = |topic: &str| {
            topic.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let counts = self.published.with(|published| published.clone());
        self.names.with(|names| {
            let below = names.iter().filter(|name| is_below(name.topic.name()));
            below.filter_map(|name| counts.get(name.topic.id() as usize)).sum()
        })
    }

    /// Returns `Envelope(sequence, topic, ts_publish, event)`, or a `ReplayedEnvelope`.
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
        let (make, classes) = tuple_subclasses(py)?;
        let class = classes[usize::from(stamp.is_replayed)].bind(py);
        calls::call(py, make, [class, &fields]).map(Bound::unbind)
    }

    fn name(&self, py: Python<'_>, topic: u32) -> Option<Py<PyString>> {
        let place = (topic as usize).checked_sub(1)?;
        let known = self.names.with(|names| {
            let name = names.get(place)?;
            Some(name.text.as_ref().map(|t| t.clone_ref(py)).ok_or_else(|| name.topic.clone()))
        })?;
        Some(known.unwrap_or_else(|topic| {
            let text = PyString::new(py, topic.name()).unbind();
            let kept = text.clone_ref(py);
            // Another thread may have made it meanwhile.
            drop(self.names.with(|names| names.get_mut(place).and_then(|n| n.text.replace(kept))));
            text
        }))
    }
}

/// Makes what would else be made on first use; see `process::prepare`.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    tuple_subclasses(py).map(|_| ())
}

/// Returns `tuple.__new__`, and `Envelope` and `ReplayedEnvelope`. Their own `__new__` is Python code,
/// in which Ctrl-C may raise, and the event would be lost.
fn tuple_subclasses(py: Python<'_>) -> PyResult<(&Py<PyAny>, &[Py<PyAny>; 2])> {
    static MAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static CLASSES: PyOnceLock<[Py<PyAny>; 2]> = PyOnceLock::new();
    let make = MAKE.get_or_try_init(py, || {
        py.get_type::<PyTuple>().getattr(intern!(py, "__new__")).map(Bound::unbind)
    })?;
    let classes = CLASSES.get_or_try_init(py, || {
        let module = py.import("tickbus.envelope")?;
        let class = |name| module.getattr(name).map(Bound::unbind);
        Ok::<_, PyErr>([class("Envelope")?, class("ReplayedEnvelope")?])
    })?;
    Ok((make, classes))
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
