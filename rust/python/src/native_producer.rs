//! Threads that Python does not know and that publish, as a feed handler written in Rust would: a
//! Python object made beforehand, for tests of what the end of the interpreter does to it, or compact
//! events, for which it never attaches unless it is asked to.

use crate::batch;
use crate::bus::EventBus;
use crate::system::EventSystem;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Publishes one event again and again, from its making to the end of the interpreter.
#[pyclass(frozen, module = "tickbus._core", name = "_NativeProducer")]
#[derive(Debug)]
pub(crate) struct NativeProducer {
    published: Arc<AtomicU64>,
}

#[pymethods]
impl NativeProducer {
    /// Starts the thread. It goes on after the bus is closed, so that it meets the end of the
    /// interpreter itself.
    #[new]
    fn new(bus: Py<EventBus>, event: Py<PyAny>) -> Self {
        let published = Arc::<AtomicU64>::default();
        let counter = published.clone();
        std::thread::spawn(move || {
            // Left to the process when the interpreter is gone.
            let (bus, event) = (ManuallyDrop::new(bus), ManuallyDrop::new(event));
            let publish = |py: Python<'_>| bus.get().publish(py, event.clone_ref(py), None).is_ok();
            while let Some(taken) = Python::try_attach(publish) {
                counter.fetch_add(u64::from(taken), Ordering::Relaxed);
            }
        });
        Self { published }
    }

    /// How many events were published.
    #[getter]
    fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }
}

/// Publishes compact events of a batch one by one.
#[pyclass(frozen, module = "tickbus._core", name = "_NativeFeed")]
#[derive(Debug)]
pub(crate) struct NativeFeed {
    published: Arc<AtomicU64>,
}

#[pymethods]
impl NativeFeed {
    /// Starts the thread, which ends when everything is published. With a `gap`, in seconds, it sleeps
    /// so long before each event and gives it the time of its publication. It calls `wake`, if there
    /// is one, after each event: the only thing that it attaches for.
    #[new]
    #[pyo3(signature = (system, events, gap=None, wake=None))]
    fn new(
        system: &Bound<'_, EventSystem>,
        events: &Bound<'_, PyAny>,
        gap: Option<f64>,
        wake: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let system = system.get().core().clone();
        let events = batch::collect(events)?;
        let gap = gap.map(Duration::try_from_secs_f64).transpose();
        let gap = gap.map_err(|error| PyValueError::new_err(error.to_string()))?;
        let published = Arc::<AtomicU64>::default();
        let counter = published.clone();
        std::thread::spawn(move || {
            // Left to the process when the interpreter is gone.
            let wake = wake.map(ManuallyDrop::new);
            for mut event in events {
                if let Some(gap) = gap {
                    std::thread::sleep(gap);
                    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
                    event.timestamp = since_epoch.map_or(0, |passed| passed.as_nanos() as u64);
                }
                if system.publish(event).is_err() {
                    break;
                }
                counter.fetch_add(1, Ordering::Release);
                if let Some(wake) = &wake
                    && Python::try_attach(|py| wake.call0(py).is_ok()) != Some(true)
                {
                    break;
                }
            }
            _ = Python::try_attach(|_| drop(wake.map(ManuallyDrop::into_inner)));
        });
        Ok(Self { published })
    }

    /// How many events were published.
    #[getter]
    fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }
}
