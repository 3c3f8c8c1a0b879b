//! A thread that Python does not know and that publishes a Python object made beforehand, as a
//! feed handler written in Rust would: for tests of what the end of the interpreter does to it.

use crate::bus::EventBus;
use pyo3::prelude::*;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
