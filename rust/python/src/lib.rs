//! The module `tickbus._core`: converts, releases the global interpreter lock, maps errors.
//!
//! The bus itself is the crate `tickbus`. Here it carries [`slab`] handles under the
//! [`gil`] exclusion, and finds their [`keys`]; [`awaitable`] and [`loop_bridge`] connect it to
//! asyncio, and [`direct`] is the short way in for calls in which nothing has to be decided.
//! Beside it stand the compact [`event`], its [`names`] and the [`batch`], and the [`store`]
//! with what is its [`delivery`].

mod attachment;
mod awaitable;
mod batch;
mod bus;
mod busy_poll;
mod calls;
mod delivery;
mod direct;
mod error;
mod event;
mod gil;
mod keys;
mod ledger;
mod line;
mod loop_bridge;
mod names;
#[cfg(feature = "native-producer")]
mod native_producer;
mod process;
mod query;
mod queue;
mod replay;
mod select;
mod slab;
mod spare;
mod stop;
mod store;
mod subscription;
mod system;
mod tally;
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
// A function, not a module with exports: those would be made before the interpreter is looked at.
#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    process::refuse_subinterpreters()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<attachment::SystemSource>()?;
    module.add_class::<batch::EventBatch>()?;
    module.add_class::<bus::EventBus>()?;
    module.add_class::<bus::Topic>()?;
    module.add_class::<busy_poll::BusyPoll>()?;
    module.add_class::<delivery::Group>()?;
    module.add_class::<delivery::GroupBatch>()?;
    module.add_class::<delivery::RiskConsumer>()?;
    module.add_class::<delivery::RiskSystem>()?;
    module.add_class::<event::PyEvent>()?;
    module.add_class::<names::Names>()?;
    module.add("symbols", names::Names::symbols())?;
    module.add("sources", names::Names::sources())?;
    module.add_class::<query::StoreQuery>()?;
    module.add_class::<queue::LockFreeEventQueue>()?;
    module.add_class::<replay::Replay>()?;
    module.add_class::<replay::Transport>()?;
    module.add_class::<replay::VirtualClock>()?;
    module.add_class::<select::Shutdown>()?;
    module.add_class::<store::EventStore>()?;
    module.add_class::<store::StoreReader>()?;
    module.add_class::<store::StoreTicket>()?;
    module.add_class::<subscription::AsyncEventSubscription>()?;
    module.add_class::<subscription::EventSubscription>()?;
    module.add_class::<system::AsyncSystemSubscription>()?;
    module.add_class::<system::EventSystem>()?;
    module.add_class::<system::SystemSubscription>()?;
    module.add_class::<tally::Tally>()?;
    module.add_function(wrap_pyfunction!(_backends, module)?)?;
    module.add_function(wrap_pyfunction!(batch::_restore_batch, module)?)?;
    module.add_function(wrap_pyfunction!(bus::_close_all, module)?)?;
    module.add_function(wrap_pyfunction!(delivery::_group_stats, module)?)?;
    module.add_function(wrap_pyfunction!(delivery::_remove_group, module)?)?;
    module.add_function(wrap_pyfunction!(event::_built_in_event_types, module)?)?;
    module.add_function(wrap_pyfunction!(event::_event_type_code, module)?)?;
    module.add_function(wrap_pyfunction!(event::_event_type_name, module)?)?;
    module.add_function(wrap_pyfunction!(event::_register_event_type, module)?)?;
    module.add_function(wrap_pyfunction!(event::_use_codes, module)?)?;
    module.add_function(wrap_pyfunction!(process::_after_fork, module)?)?;
    module.add_function(wrap_pyfunction!(select::select, module)?)?;
    module.add_function(wrap_pyfunction!(store::_inspect_store, module)?)?;
    module.add_function(wrap_pyfunction!(store::_salvage_store, module)?)?;
    module.add_function(wrap_pyfunction!(store::_survey_store, module)?)?;
    module.add_function(wrap_pyfunction!(store::_verify_store, module)?)?;
    module.add_function(wrap_pyfunction!(warnings::_recv_warning, module)?)?;
    module.add_function(wrap_pyfunction!(warnings::_stop_warnings, module)?)?;
    // Not through `add_class`, which would make it a part of the module's interface.
    #[cfg(feature = "native-producer")]
    {
        let py = module.py();
        module.setattr("_NativeFeed", py.get_type::<native_producer::NativeFeed>())?;
        module.setattr("_NativeProducer", py.get_type::<native_producer::NativeProducer>())?;
    }
    direct::install(module.py())?;
    process::prepare(module.py())
}
