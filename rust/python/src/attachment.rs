//! A store that takes what others publish: compact events of a system by a thread of the core, which
//! never takes the global interpreter lock, and what a bus has delivered to a Python thread, encoded
//! in batches.

use crate::error;
use crate::event::PyEvent;
use crate::process::Own;
use crate::store::{EventStore, Item};
use crate::system::EventSystem;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyString};
use tickbus::{AppendError, Attachment as Core, Gap, NewRecords, StoreError};

/// The events of an `EventSystem`, on their way into a store.
#[pyclass(frozen, module = "tickbus._core", name = "_SystemSource")]
#[derive(Debug)]
pub(crate) struct SystemSource {
    core: Own<Core>,
}

#[pymethods]
impl SystemSource {
    #[new]
    fn new(py: Python<'_>, store: &EventStore, system: &EventSystem) -> PyResult<Self> {
        let store = store.writer()?;
        system.process().check()?;
        let subscription = system.core().subscribe(Default::default());
        let subscription = subscription.map_err(|error| error::subscribe(&error))?;
        // Whoever waits is told.
        let attached = store.attach(subscription, |_| ());
        Ok(Self { core: Own::new(attached.map_err(|error| error::store(py, &error))?) })
    }

    /// Events that were stored.
    #[getter]
    fn stored(&self) -> PyResult<u64> {
        self.core.process().check()?;
        Ok(self.core.stored())
    }

    /// Events that were not.
    #[getter]
    fn missed(&self) -> PyResult<u64> {
        self.core.process().check()?;
        Ok(self.core.missed())
    }

    /// Waits until it has ended, and raises why if the store has detached itself.
    fn run(&self, py: Python<'_>) -> PyResult<()> {
        self.core.process().check()?;
        py.detach(|| self.core.wait());
        match self.core.failure() {
            Some(failure) => Err(error::store(py, failure)),
            None => Ok(()),
        }
    }

    /// Has it store what is pending, and end.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.core.process().check()?;
        py.detach(|| self.core.detach());
        Ok(())
    }
}

/// An event as a bus has delivered it: number, topic, time and the event itself.
pub(crate) type Delivered<'py> = (u64, Option<Bound<'py, PyString>>, u64, Bound<'py, PyAny>);

/// How many events were stored, for how many gaps stand, why the first one does, and why neither is
/// true of the others.
pub(crate) type Appended = (u64, u64, Option<Py<PyAny>>, Option<Py<PyAny>>);

/// Appends what a bus has delivered, in order, with a gap for each event that no log can hold.
pub(crate) fn append_delivered<'py>(
    py: Python<'py>,
    store: &EventStore,
    delivered: &[Delivered<'py>],
) -> PyResult<Appended> {
    const MISSING: NewRecords<'_> = NewRecords::Gap(Gap { missed: 1, is_exact: true });
    let mut why: Option<PyErr> = None;
    let mut items = Vec::with_capacity(delivered.len());
    for (_, topic, _, event) in delivered {
        // A compact event has a topic of its own.
        let topic = topic.as_ref().filter(|_| !event.is_exact_instance_of::<PyEvent>());
        match Item::of(event, topic) {
            Ok(item) => items.push(Some(item)),
            Err(error) if error.is_instance_of::<PyTypeError>(py) => {
                why.get_or_insert(error);
                items.push(None);
            }
            Err(error) => return Err(error),
        }
    }
    let records = items.iter().map(|item| item.as_ref().map_or(Ok(MISSING), Item::record));
    let mut records = records.collect::<PyResult<Vec<_>>>()?;
    // Encoding has run Python code.
    let core = store.writer()?;
    let mut done = 0;
    let failure = loop {
        let rest = &records[done..];
        let appended = store.run(py, rest.len(), || core.append_many(rest));
        let Err(AppendError { accepted, error }) = appended else {
            done = records.len();
            break None;
        };
        done += accepted as usize;
        match error {
            StoreError::TooLarge { .. } | StoreError::Config(_) => {
                why.get_or_insert(error::store(py, &error));
                records[done] = MISSING;
            }
            error => break Some(error),
        }
    };
    let is_gap = |record: &&NewRecords<'_>| matches!(record, NewRecords::Gap(_));
    let gaps = records[..done].iter().filter(is_gap).count() as u64;
    let stored = done as u64 - gaps;
    let failure = failure.map(|error| error::not_all(py, &error, stored));
    let object = |error: PyErr| error.into_value(py).into_any();
    Ok((stored, gaps, why.map(object), failure.map(object)))
}
