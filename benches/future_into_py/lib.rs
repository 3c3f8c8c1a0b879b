//! A bus for Python whose `recv()` is what `future_into_py` makes of the core's `recv().await`: the
//! textbook way, built with `pyo3-async-runtimes` or with `pyo3-asyncio`, to be compared with the
//! hand-made awaitable (`docs/decisions/0001-awaitable.md`).

use bridge::tokio::future_into_py;
use pyo3::exceptions::PyEOFError;
use pyo3::prelude::*;
use std::sync::Arc;
use tickbus::{AsyncEventSubscription, EventBus, LockFreeEventBus};

#[cfg(feature = "pyo3-asyncio")]
type Module<'py> = PyModule;
#[cfg(not(feature = "pyo3-asyncio"))]
type Module<'py> = Bound<'py, PyModule>;

/// A bus with one subscription; its events are integers.
#[pyclass(frozen)]
struct Channel {
    bus: LockFreeEventBus<u64>,
    subscription: Arc<AsyncEventSubscription<u64>>,
}

#[pymethods]
impl Channel {
    #[new]
    fn new(capacity: usize) -> Self {
        let bus = LockFreeEventBus::new(capacity).expect("the capacity is good");
        let subscription = bus.subscribe_async(capacity).expect("the capacity is good");
        Self { bus, subscription: Arc::new(subscription) }
    }

    fn publish(&self, event: u64) -> usize {
        self.bus.publish(event).expect("the bus is open and has room")
    }

    /// Returns an `asyncio.Future`; it ends with `EOFError` once everything was read.
    fn recv(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let subscription = Arc::clone(&self.subscription);
        future_into_py(py, async move {
            subscription.recv().await.map_err(|error| PyEOFError::new_err(error.to_string()))
        })
        .map(Into::into)
    }

    #[getter]
    fn pending(&self) -> usize {
        self.subscription.pending()
    }

    fn close(&self) {
        self.bus.close();
    }
}

#[pymodule]
fn future_into_py_channel(_py: Python<'_>, module: &Module<'_>) -> PyResult<()> {
    module.add_class::<Channel>()
}
