//! What a query has found in a log.

use crate::batch::EventBatch;
use crate::error;
use crate::event;
use crate::process::Own;
use crate::system::items;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use tickbus::{Event, Found, Object, Query, StoreQuery as Core};

/// Returns what is asked for of a log. Without `start` or `stop` times go from the first or to the
/// last.
pub(crate) fn query(
    start: Option<&Bound<'_, PyAny>>,
    stop: Option<&Bound<'_, PyAny>>,
    types: Option<&Bound<'_, PyAny>>,
    symbols: Option<&Bound<'_, PyAny>>,
) -> PyResult<Query> {
    let mut query = Query {
        types: items("types", types, event::event_type)?,
        symbols: items("symbols", symbols, event::symbol)?,
        ..Query::default()
    };
    if let Some(start) = start {
        query.times.start = error::unsigned("start", start)?;
    }
    if let Some(stop) = stop {
        query.times.end = error::unsigned("stop", stop)?;
    }
    Ok(query)
}

/// An object, taken out of what has read it.
#[derive(Debug)]
pub(crate) struct TakenObject {
    timestamp: u64,
    topic: Option<String>,
    schema: String,
    version: u32,
    bytes: Vec<u8>,
    is_replayed: bool,
}

/// An object as Python gets it: (sequence, timestamp, topic, schema, version, bytes, replayed).
pub(crate) type ObjectRow<'py> = (u64, u64, Option<String>, String, u32, Bound<'py, PyBytes>, bool);

impl TakenObject {
    pub(crate) fn of(object: Object<'_>) -> Self {
        Self {
            timestamp: object.timestamp,
            topic: object.topic.map(str::to_owned),
            schema: object.schema.to_owned(),
            version: object.version,
            bytes: object.bytes.to_vec(),
            is_replayed: object.is_replayed,
        }
    }

    pub(crate) fn row(self, py: Python<'_>, sequence: u64) -> ObjectRow<'_> {
        let Self { timestamp, topic, schema, version, bytes, is_replayed } = self;
        (sequence, timestamp, topic, schema, version, PyBytes::new(py, &bytes), is_replayed)
    }
}

/// Finds records of some times, types and symbols in the order of the log.
#[pyclass(frozen, module = "tickbus._core", name = "_StoreQuery")]
#[derive(Debug)]
pub(crate) struct StoreQuery {
    core: Own<Mutex<Core>>,
}

/// Records of one kind, taken out of the query.
enum Taken {
    Events(Vec<u64>, Vec<Event>),
    Objects(Vec<(u64, TakenObject)>),
}

/// What was found, as Python gets it.
#[derive(IntoPyObject)]
pub(crate) enum Rows<'py> {
    Events(Bound<'py, PyBytes>, Bound<'py, EventBatch>),
    #[pyo3(transparent)]
    Objects(Bound<'py, PyList>),
}

impl StoreQuery {
    pub(crate) fn new(core: Core) -> Self {
        Self { core: Own::new(Mutex::new(core)) }
    }
}

#[pymethods]
impl StoreQuery {
    /// Returns the next records that were found: the bytes of their sequences, as u64 of this machine,
    /// with an `EventBatch`, or a list of (sequence, timestamp, topic, schema, version, bytes, replayed).
    /// `None` at the end.
    fn next_found<'py>(&self, py: Python<'py>) -> PyResult<Option<Rows<'py>>> {
        self.core.process().check()?;
        let taken = py.detach(|| {
            let mut query = self.core.lock();
            Ok(query.next_found()?.map(|found| match found {
                Found::Events(sequences, events) => {
                    Taken::Events(sequences.to_vec(), events.to_vec())
                }
                Found::Objects(objects) => {
                    let objects = objects.into_iter();
                    Taken::Objects(
                        objects.map(|(at, object)| (at, TakenObject::of(object))).collect(),
                    )
                }
                _ => unreachable!("there are no others"),
            }))
        });
        Ok(match taken.map_err(|error| error::store(py, &error))? {
            None => None,
            Some(Taken::Events(sequences, events)) => {
                let sequences: Vec<u8> = sequences.into_iter().flat_map(u64::to_ne_bytes).collect();
                let events = Bound::new(py, EventBatch::of(events))?;
                Some(Rows::Events(PyBytes::new(py, &sequences), events))
            }
            Some(Taken::Objects(objects)) => {
                let rows = objects.into_iter().map(|(sequence, object)| object.row(py, sequence));
                Some(Rows::Objects(PyList::new(py, rows.collect::<Vec<_>>())?))
            }
        })
    }
}
