//! The module `tickbus._core`: converts, releases the global interpreter lock, maps errors.
//!
//! The bus itself is the crate `tickbus`. Here it carries [`slab`] handles under the
//! [`gil`] exclusion; [`awaitable`] and [`loop_bridge`] connect it to asyncio, and [`direct`] is the
//! short way in for calls in which nothing has to be decided.

mod awaitable;
mod bus;
mod busy_poll;
mod direct;
mod error;
mod gil;
mod loop_bridge;
mod process;
mod select;
mod slab;
mod subscription;
mod wakeup;
mod warnings;

use pyo3::prelude::*;

/// Returns the names of the backends that are built in.
#[pyfunction]
fn _backends(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyTuple>> {
    pyo3::types::PyTuple::new(py, tickbus::Backend::ALL.iter().map(|backend| backend.name()))
}

/// The compiled core of tickbus.
// The bus relies on the global interpreter lock: a free-threaded interpreter switches it on.
#[pymodule(gil_used = true)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::_backends;
    #[pymodule_export]
    use super::bus::{_close_all, EventBus, Topic};
    #[pymodule_export]
    use super::busy_poll::BusyPoll;
    #[pymodule_export]
    use super::process::_after_fork;
    #[pymodule_export]
    use super::select::{Shutdown, select};
    #[pymodule_export]
    use super::subscription::{AsyncEventSubscription, EventSubscription};
    #[pymodule_export]
    use super::warnings::{_recv_warning, _stop_warnings};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::direct::install(module.py())
    }

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name is Python's")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
