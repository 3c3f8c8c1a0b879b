//! Maps the core's errors to the tree in `tickbus.errors`.

use crate::calls;
use crate::event::PyEvent;
use crate::slab::Handle;
use crate::system::Overflow;
use pyo3::PyTypeInfo;
use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyTypeError};
use pyo3::import_exception;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyString, PyTuple};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;
use tickbus::{
    CriticalOverflow as CoreOverflow, DeliveryError, Lagged as CoreLagged, LaneLagged,
    PublishError, ReplayError, StoreError as CoreStoreError, SubscribeError, SystemError,
};

import_exception!(tickbus.errors, AlreadyOpen);
import_exception!(tickbus.errors, Closed);
import_exception!(tickbus.errors, ConfigError);
import_exception!(tickbus.errors, Corrupt);
import_exception!(tickbus.errors, CriticalOverflow);
import_exception!(tickbus.errors, ForkedError);
import_exception!(tickbus.errors, Full);
import_exception!(tickbus.errors, Lagged);
import_exception!(tickbus.errors, Poisoned);
import_exception!(tickbus.errors, PublishTimeout);
import_exception!(tickbus.errors, ReadOnly);
import_exception!(tickbus.errors, ReceiveTimeout);
import_exception!(tickbus.errors, ReplayRefused);
import_exception!(tickbus.errors, StaleToken);
import_exception!(tickbus.errors, StoreError);
import_exception!(tickbus.errors, StoreFull);
import_exception!(tickbus.errors, StoreIO);
import_exception!(tickbus.errors, SyncTimeout);
import_exception!(tickbus.errors, VersionError);
import_exception!(tickbus.errors, WrongLoop);

/// Makes what would else be made on first use; see `process::prepare`.
pub(crate) fn prepare(py: Python<'_>) {
    py.get_type::<AlreadyOpen>();
    py.get_type::<Closed>();
    py.get_type::<ConfigError>();
    py.get_type::<Corrupt>();
    py.get_type::<CriticalOverflow>();
    py.get_type::<ForkedError>();
    py.get_type::<Full>();
    py.get_type::<Lagged>();
    py.get_type::<Poisoned>();
    py.get_type::<PublishTimeout>();
    py.get_type::<ReadOnly>();
    py.get_type::<ReceiveTimeout>();
    py.get_type::<StaleToken>();
    py.get_type::<StoreError>();
    py.get_type::<StoreFull>();
    py.get_type::<StoreIO>();
    py.get_type::<SyncTimeout>();
    py.get_type::<VersionError>();
    py.get_type::<WrongLoop>();
}

/// Returns an error that is made now. PyO3 would make it when somebody looks at it, and give the
/// lock up for that, which a thread may not get back while the interpreter ends.
fn made<'py, T: PyTypeInfo, const N: usize>(
    py: Python<'py>,
    arguments: [Bound<'py, PyAny>; N],
) -> PyErr {
    calls::make(&py.get_type::<T>(), arguments).map_or_else(|error| error, PyErr::from_value)
}

fn text<'py>(py: Python<'py>, text: &str) -> Bound<'py, PyAny> {
    PyString::new(py, text).into_any()
}

#[cold]
pub(crate) fn config(error: &tickbus::ConfigError) -> PyErr {
    ConfigError::new_err(error.to_string())
}

#[cold]
pub(crate) fn subscribe(error: &SubscribeError) -> PyErr {
    match error {
        SubscribeError::Config(error) => config(error),
        error => Closed::new_err(error.to_string()),
    }
}

/// The event inside is dropped: the caller of a Python `publish` still has it.
#[cold]
pub(crate) fn publish(py: Python<'_>, error: PublishError<Handle>) -> PyErr {
    let message = error.to_string();
    let ids = |ids: &[u64]| PyTuple::new(py, ids).map(Bound::into_any);
    match &error {
        PublishError::Full { subscriptions, .. } => match ids(subscriptions) {
            Ok(ids) => made::<Full, _>(py, [text(py, &message), ids]),
            Err(error) => error,
        },
        PublishError::Timeout { subscriptions, .. } => match ids(subscriptions) {
            Ok(ids) => made::<PublishTimeout, _>(py, [text(py, &message), ids]),
            Err(error) => error,
        },
        // What the key function raised goes on as it is.
        PublishError::Key { error, .. } => match error.downcast_ref::<PyErr>() {
            Some(raised) => raised.clone_ref(py),
            None => PyRuntimeError::new_err(message),
        },
        _ => made::<Closed, _>(py, [text(py, &message)]),
    }
}

#[cold]
pub(crate) fn lagged(py: Python<'_>, lagged: CoreLagged) -> PyErr {
    let missed = match lagged.missed.into_pyobject(py) {
        Ok(missed) => missed.into_any(),
        Err(never) => match never {},
    };
    made::<Lagged, _>(py, [missed, PyBool::new(py, lagged.exact).to_owned().into_any()])
}

#[cold]
pub(crate) fn lane_lagged(py: Python<'_>, lagged: LaneLagged) -> PyErr {
    let missed = match lagged.missed.into_pyobject(py) {
        Ok(missed) => missed.into_any(),
        Err(never) => match never {},
    };
    let exact = PyBool::new(py, true).to_owned().into_any();
    made::<Lagged, _>(py, [missed, exact, text(py, lagged.lane.name())])
}

/// What an event system says of an event that it did not publish, or not to all.
#[cold]
pub(crate) fn system(py: Python<'_>, error: SystemError) -> PyErr {
    match error {
        SystemError::Overflow(overflow) => critical_overflow(py, overflow).unwrap_or_else(|e| e),
        SystemError::TooManyTopics { error, .. } => config(&error),
        error => made::<Closed, _>(py, [text(py, &error.to_string())]),
    }
}

fn critical_overflow(py: Python<'_>, overflow: CoreOverflow) -> PyResult<PyErr> {
    let arguments = [
        text(py, &overflow.to_string()),
        PyTuple::new(py, overflow.missing())?.into_any(),
        overflow.taken().into_pyobject(py)?.into_any(),
        PyEvent(overflow.event()).object(py)?.into_any(),
        Bound::new(py, Overflow::new(overflow))?.into_any(),
    ];
    Ok(made::<CriticalOverflow, _>(py, arguments))
}

/// What a log says of what it did not do.
#[cold]
pub(crate) fn store(py: Python<'_>, error: &CoreStoreError) -> PyErr {
    let message = error.to_string();
    let number = |number: u64| PyInt::new(py, number).into_any();
    match error {
        CoreStoreError::Corrupt { segment, offset, sequence, .. } => {
            let place = [text(py, segment), number(*offset), number(*sequence)];
            let [segment, offset, sequence] = place;
            made::<Corrupt, _>(py, [text(py, &message), segment, offset, sequence])
        }
        CoreStoreError::Io { source, .. } => match source.raw_os_error() {
            Some(code) => {
                let code = PyInt::new(py, code).into_any();
                made::<StoreIO, _>(py, [code, text(py, &message)])
            }
            None => made::<StoreIO, _>(py, [text(py, &message)]),
        },
        CoreStoreError::Poisoned { .. } => Poisoned::new_err(message),
        CoreStoreError::Full { .. } => StoreFull::new_err(message),
        CoreStoreError::ReadOnly { .. } => ReadOnly::new_err(message),
        CoreStoreError::AlreadyOpen { owner, .. } => {
            let process = owner.parse().map_or_else(|_| py.None().into_bound(py), number);
            made::<AlreadyOpen, _>(py, [text(py, &message), process])
        }
        CoreStoreError::Version { .. } => VersionError::new_err(message),
        CoreStoreError::Closed => Closed::new_err(message),
        CoreStoreError::Config(_) | CoreStoreError::Name(_) | CoreStoreError::EventType(_) => {
            ConfigError::new_err(message)
        }
        _ => StoreError::new_err(message),
    }
}

/// Returns why a replay did not go on.
#[cold]
pub(crate) fn replay(py: Python<'_>, error: &ReplayError) -> PyErr {
    match error {
        ReplayError::Store(error) => store(py, error),
        ReplayError::Refused(refused) => self::refused(*refused),
        ReplayError::Closed => Closed::new_err(error.to_string()),
        _ => ConfigError::new_err(error.to_string()),
    }
}

/// What delivery says of what it did not do.
#[cold]
pub(crate) fn delivery(py: Python<'_>, error: &DeliveryError) -> PyErr {
    match error {
        DeliveryError::Store(error) => store(py, error),
        DeliveryError::Lagged(missed) => lagged(py, *missed),
        DeliveryError::Stale { .. } => StaleToken::new_err(error.to_string()),
        DeliveryError::Removed { .. } => Closed::new_err(error.to_string()),
        _ => ConfigError::new_err(error.to_string()),
    }
}

/// Returns why a replay did not begin.
#[cold]
pub(crate) fn refused(error: tickbus::ReplayRefused) -> PyErr {
    ReplayRefused::new_err(error.to_string())
}

/// As `store`, where the first `accepted` ones of many records were stored.
#[cold]
pub(crate) fn not_all(py: Python<'_>, error: &CoreStoreError, accepted: u64) -> PyErr {
    let error = store(py, error);
    let _ = error.value(py).setattr(intern!(py, "accepted"), accepted);
    error
}

#[cold]
pub(crate) fn closed(py: Python<'_>) -> PyErr {
    made::<Closed, _>(py, [text(py, &tickbus::RecvError::Closed.to_string())])
}

/// Returns whether iteration ends with this error: everything was read.
#[cold]
pub(crate) fn is_end(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<Closed>(py) && !error.is_instance_of::<ForkedError>(py)
}

#[cold]
pub(crate) fn on_a_loop(call: &str, instead: &str) -> PyErr {
    PyRuntimeError::new_err(format!(
        "{call} would block this thread's running event loop; use {instead} there"
    ))
}

/// Returns a number that fits; otherwise says what was wanted. A bool is no number.
pub(crate) fn number<'a, 'py, T: FromPyObject<'a, 'py, Error = PyErr>, O>(
    name: &str,
    value: &'a Bound<'py, PyAny>,
    wanted: impl Display,
    fit: impl FnOnce(T) -> Option<O>,
) -> PyResult<O> {
    if !value.is_instance_of::<PyBool>() {
        match value.extract::<T>().map(fit) {
            Ok(Some(number)) => return Ok(number),
            Err(error)
                if !error.is_instance_of::<PyTypeError>(value.py())
                    && !error.is_instance_of::<PyOverflowError>(value.py()) =>
            {
                return Err(error);
            }
            _ => {}
        }
    }
    Err(ConfigError::new_err(format!("{name} was {value:?}; it must be {wanted}")))
}

/// Returns a duration in seconds as the core takes it.
pub(crate) fn duration(name: &str, seconds: &Bound<'_, PyAny>) -> PyResult<Duration> {
    number(name, seconds, "a finite number of seconds of at least 0", |seconds| {
        let duration = Duration::try_from_secs_f64(seconds).ok();
        duration.filter(|duration| duration.as_secs() < 1 << 32)
    })
}

/// Returns a number that the core looks at further.
pub(crate) fn float(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    number(name, value, "a finite number", Some)
}

/// Returns a whole number of a range.
pub(crate) fn whole<T>(
    name: &str,
    value: &Bound<'_, PyAny>,
    range: RangeInclusive<T>,
) -> PyResult<T>
where
    T: Copy + Display + PartialOrd + TryFrom<u64>,
{
    let wanted = format_args!("a whole number from {} to {}", range.start(), range.end());
    number(name, value, wanted, |value: u64| {
        T::try_from(value).ok().filter(|value| range.contains(value))
    })
}

/// Returns a whole number of at least 0.
pub(crate) fn unsigned(name: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    whole(name, value, 0..=u64::MAX)
}

/// Returns a number of events that is at least 1.
pub(crate) fn count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    whole(name, value, 1..=usize::MAX)
}
