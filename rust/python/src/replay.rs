//! Replays: what a log has, published again without the global interpreter lock, or to a bus of objects
//! with it; and what pauses, steps, seeks and stops them.

use crate::batch::EventBatch;
use crate::bus::EventBus;
use crate::error;
use crate::event::PyEvent;
use crate::process::{Own, no_pickle};
use crate::query::query;
use crate::store::EventStore;
use crate::system::EventSystem;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use tickbus::{
    Event, Replay as Core, ReplayBatch, ReplayError, ReplayOptions, ReplayState, ReplayedObject,
    Topic, Transport as CoreTransport, VirtualClock as CoreClock,
};

/// A clock that shows the time of what is replayed: `EventBus(clock=...)` takes it.
///
/// A replay into such a bus moves the bus's clock, so that `ts_publish` is the time of the event. It
/// never goes back but by `seek` and by `set`.
#[pyclass(frozen, module = "tickbus")]
#[derive(Debug)]
pub(crate) struct VirtualClock(CoreClock);

#[pymethods]
impl VirtualClock {
    #[new]
    #[pyo3(signature = (time = None), text_signature = "(time=0)")]
    fn new(time: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let clock = CoreClock::new();
        if let Some(time) = time {
            clock.set(error::unsigned("time", time)?);
        }
        Ok(Self(clock))
    }

    /// Returns the time in ns since the Unix epoch, UTC.
    fn time_ns(&self) -> u64 {
        self.0.time_ns()
    }

    /// Sets the time in ns since the Unix epoch, UTC, also back.
    #[pyo3(signature = (time, /))]
    fn set(&self, time: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.set(error::unsigned("time", time)?);
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<VirtualClock at {}>", self.0.time_ns())
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(no_pickle("VirtualClock", "make one there, and send its time"))
    }
}

/// What a replay is told by others.
#[pyclass(frozen, module = "tickbus._core", name = "_Transport")]
#[derive(Debug)]
pub(crate) struct Transport(Own<CoreTransport>);

#[pymethods]
impl Transport {
    #[new]
    fn new() -> Self {
        Self(Own::new(CoreTransport::new()))
    }

    fn pause(&self) -> PyResult<bool> {
        self.mine().map(CoreTransport::pause)
    }

    fn resume(&self) -> PyResult<bool> {
        self.mine().map(CoreTransport::resume)
    }

    #[pyo3(signature = (records, /))]
    fn step(&self, records: &Bound<'_, PyAny>) -> PyResult<bool> {
        let records = error::unsigned("records", records)?;
        self.mine().map(|transport| transport.step(records))
    }

    #[pyo3(signature = (time, /))]
    fn seek(&self, time: &Bound<'_, PyAny>) -> PyResult<bool> {
        let time = error::unsigned("time", time)?;
        self.mine().map(|transport| transport.seek(time))
    }

    fn stop(&self) -> PyResult<()> {
        self.mine().map(CoreTransport::stop)
    }

    /// (state, replayed, sequence, missed, skipped_gaps)
    fn progress(&self) -> PyResult<(&'static str, u64, u64, u64, u64)> {
        let progress = self.mine()?.progress();
        let state = match progress.state {
            ReplayState::Running => "running",
            ReplayState::Paused => "paused",
            ReplayState::Ended => "ended",
            _ => "stopped",
        };
        let (replayed, sequence) = (progress.replayed, progress.sequence);
        Ok((state, replayed, sequence, progress.missed, progress.skipped_gaps))
    }

    /// The digest in hexadecimal digits.
    fn digest(&self) -> PyResult<String> {
        let digest = self.mine()?.digest();
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl Transport {
    fn mine(&self) -> PyResult<&CoreTransport> {
        self.0.process().check()?;
        Ok(&self.0)
    }
}

/// A log, or events in memory, that are replayed.
#[pyclass(frozen, module = "tickbus._core", name = "_Replay")]
#[derive(Debug)]
pub(crate) struct Replay {
    core: Own<Mutex<Core>>,
    is_mixed: bool,
}

/// Records that a bus is given before other threads may run.
const STRETCH: usize = 64;
/// How long it waits until it looks for room again, from the shortest on.
const NAPS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(5));

#[pymethods]
impl Replay {
    /// Of a store, the folder of a log, or an `EventBatch`.
    #[new]
    #[expect(clippy::too_many_arguments, reason = "one caller names them all")]
    #[pyo3(signature = (
        source, transport, clock, *, speed, longest_gap, start, stop, types, symbols, mixed
    ))]
    fn new(
        py: Python<'_>,
        source: &Bound<'_, PyAny>,
        transport: &Transport,
        clock: &VirtualClock,
        speed: &Bound<'_, PyAny>,
        longest_gap: &Bound<'_, PyAny>,
        start: Option<&Bound<'_, PyAny>>,
        stop: Option<&Bound<'_, PyAny>>,
        types: Option<&Bound<'_, PyAny>>,
        symbols: Option<&Bound<'_, PyAny>>,
        mixed: bool,
    ) -> PyResult<Self> {
        let query = query(start, stop, types, symbols)?;
        let mut options = ReplayOptions::default();
        (options.query, options.is_mixed) = (query, mixed);
        options.speed = error::float("speed", speed)?;
        options.longest_gap = Some(error::duration("longest_gap", longest_gap)?);
        (options.clock, options.transport) = (clock.0.clone(), transport.mine()?.clone());
        let core = if let Ok(store) = source.cast::<EventStore>() {
            store.get().replay(py, options)?
        } else {
            let core = match source.cast_exact::<EventBatch>() {
                Ok(events) => Core::of_events(events.get().events().to_vec(), options),
                Err(_) => {
                    let path: PathBuf = source.extract()?;
                    py.detach(|| Core::open(path, options))
                }
            };
            core.map_err(|error| error::replay(py, &error))?
        };
        Ok(Self { core: Own::new(Mutex::new(core)), is_mixed: mixed })
    }

    /// The first sequence that the log has, and the one after the last.
    #[getter]
    fn sequences(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        self.core.process().check()?;
        let sequences = py.detach(|| self.core.lock().sequences());
        Ok((sequences.start, sequences.end))
    }

    /// Waits until records are due and returns an `EventBatch`, or a list of (sequence, timestamp,
    /// topic, schema, version, bytes); `None` at the end.
    fn next_batch<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.core.process().check()?;
        let next = py.detach(|| {
            let mut core = self.core.lock();
            let next = core.next_batch()?;
            Ok(next.map(|batch| match batch {
                ReplayBatch::Events(events) => Taken::Events(events.to_vec()),
                ReplayBatch::Objects(objects) => Taken::Objects(objects.to_vec()),
                _ => unreachable!("there are no others"),
            }))
        });
        Ok(match next.map_err(|error| error::store(py, &error))? {
            None => None,
            Some(Taken::Events(events)) => Some(Bound::new(py, EventBatch::of(events))?.into_any()),
            Some(Taken::Objects(objects)) => {
                let objects = objects.into_iter().map(|object| {
                    let bytes = PyBytes::new(py, &object.bytes);
                    let ReplayedObject { sequence, timestamp, topic, schema, version, .. } = object;
                    (sequence, timestamp, topic, schema, version, bytes)
                });
                Some(PyList::new(py, objects.collect::<Vec<_>>())?.into_any())
            }
        })
    }

    /// Begins to publish to a system or a bus, which may refuse it.
    fn begin(&self, target: &Bound<'_, PyAny>) -> PyResult<()> {
        self.core.process().check()?;
        let refused = match target.cast::<EventSystem>() {
            Ok(system) => {
                system.get().process().check()?;
                system.get().core().begin_replay(self.is_mixed)
            }
            Err(_) => {
                let bus = target.cast::<EventBus>()?.get().core();
                bus.process().check()?;
                bus.begin_replay(self.is_mixed)
            }
        };
        refused.map_err(error::refused)
    }

    /// Publishes everything to a system that has begun.
    fn publish_to_system(&self, py: Python<'_>, system: &EventSystem) -> PyResult<()> {
        self.core.process().check()?;
        system.process().check()?;
        let system = system.core().clone();
        let published = py.detach(|| self.core.lock().go_on_into(&system));
        published.map(|_| ()).map_err(|error| error::replay(py, &error))
    }

    /// Publishes everything to a bus that has begun; `decoder(schema, version)` returns what makes an
    /// object of bytes.
    fn publish_to_bus(
        &self,
        py: Python<'_>,
        bus: &Bound<'_, EventBus>,
        decoder: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.core.process().check()?;
        let core = bus.get().core();
        core.process().check()?;
        let published = Publisher::new(py, self, bus.get()).run(py, decoder);
        core.end_replay();
        published
    }
}

enum Taken {
    Events(Vec<Event>),
    Objects(Vec<ReplayedObject>),
}

impl Taken {
    fn len(&self) -> usize {
        match self {
            Self::Events(events) => events.len(),
            Self::Objects(objects) => objects.len(),
        }
    }
}

/// What publishes to a bus of objects.
struct Publisher<'a> {
    replay: &'a Replay,
    bus: &'a EventBus,
    transport: CoreTransport,
    nap: Duration,
}

impl<'a> Publisher<'a> {
    fn new(py: Python<'_>, replay: &'a Replay, bus: &'a EventBus) -> Self {
        let transport = py.detach(|| replay.core.lock().transport().clone());
        Self { replay, bus, transport, nap: NAPS.0 }
    }

    fn run(&mut self, py: Python<'_>, decoder: &Bound<'_, PyAny>) -> PyResult<()> {
        // By type and symbol, and by name.
        let mut of_events: HashMap<(u8, u32), Option<Topic>> = HashMap::new();
        let mut of_objects: HashMap<String, Topic> = HashMap::new();
        loop {
            let due = py.detach(|| -> Result<_, ReplayError> {
                let mut core = self.replay.core.lock();
                Ok(core.due(STRETCH)?.map(|due| match due {
                    ReplayBatch::Events(events) => Taken::Events(events.to_vec()),
                    ReplayBatch::Objects(objects) => Taken::Objects(objects.to_vec()),
                    _ => unreachable!("there are no others"),
                }))
            });
            let Some(due) = due.map_err(|error| error::replay(py, &error))? else { break };
            // Whoever joined meanwhile is asked too.
            let count = self.room(py)?.min(due.len());
            for place in 0..count {
                let (event, topic) = match &due {
                    Taken::Events(events) => {
                        let event = events[place].with_replayed(true);
                        let key = (event.event_type.0, event.symbol.0);
                        let topic = match of_events.entry(key) {
                            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
                            std::collections::hash_map::Entry::Vacant(new) => new.insert(
                                event.topic().map(|name| self.bus.core_topic(&name)).transpose()?,
                            ),
                        };
                        (PyEvent(event).object(py)?.into_any(), topic.as_ref())
                    }
                    Taken::Objects(objects) => {
                        let object = &objects[place];
                        if let Some(name) = &object.topic
                            && !of_objects.contains_key(name)
                        {
                            of_objects.insert(name.clone(), self.bus.core_topic(name)?);
                        }
                        let topic = object.topic.as_ref().and_then(|name| of_objects.get(name));
                        let decode = decoder.call1((&object.schema, object.version))?;
                        (decode.call1((PyBytes::new(py, &object.bytes),))?, topic)
                    }
                };
                self.replay.core.lock().show(1);
                self.bus.publish_replayed(py, event.unbind(), topic)?;
                self.replay.core.lock().done(1);
            }
            let counted = self.bus.core().count_replayed(count as u64, self.replay.is_mixed);
            counted.map_err(error::refused)?;
        }
        let end = py.detach(|| self.replay.core.lock().end());
        let topic = self.bus.core_topic(&end.topic().unwrap_or_default())?;
        while !self.transport.is_stopped() {
            if self.room(py)? > 0 {
                let event = PyEvent(end).object(py)?.into_any().unbind();
                self.bus.publish_replayed(py, event, Some(&topic))?;
                // What is counted too late is only counted.
                _ = self.bus.core().count_replayed(1, true);
                break;
            }
        }
        Ok(())
    }

    /// Returns how many events can be published before somebody misses one; it has waited a while if
    /// there are none.
    fn room(&mut self, py: Python<'_>) -> PyResult<usize> {
        let room = self.bus.room(py);
        if room > 0 {
            self.nap = NAPS.0;
            return Ok(room);
        }
        if self.bus.core().is_closed() {
            return Err(error::replay(py, &ReplayError::Closed));
        }
        py.detach(|| self.transport.nap(self.nap));
        self.nap = (self.nap * 2).min(NAPS.1);
        Ok(0)
    }
}
