//! Sums over subscriptions that belong together, also over those that are gone.

use crate::gil::{Gil, GilCell};
use crate::slab::Handle;
use crate::subscription::{AsyncEventSubscription, EventSubscription, Inner};
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyWeakref, PyWeakrefMethods, PyWeakrefReference};

/// What subscriptions have read and missed. It does not keep them alive.
#[pyclass(frozen, module = "tickbus._core", name = "_Tally")]
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Events read and missed by those that are gone.
    gone: GilCell<(u64, u64)>,
    /// The others, by id.
    here: GilCell<Vec<(u64, Py<PyWeakref>)>>,
}

#[pymethods]
impl Tally {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Counts a subscription from its beginning on.
    fn add(slf: Py<Self>, py: Python<'_>, subscription: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(id) = with_inner(subscription, |inner| {
            inner.count_in(slf.clone_ref(py));
            inner.core.id()
        }) else {
            return Err(PyTypeError::new_err(format!(
                "subscription was {subscription:?}; it must be what subscribe() returned"
            )));
        };
        let weak = PyWeakrefReference::new(subscription)?.into_any().cast_into::<PyWeakref>()?;
        slf.get().here.with(|here| here.push((id, weak.unbind())));
        Ok(())
    }

    /// Returns how many events they have read, and how many they have missed for any reason.
    fn read(&self, py: Python<'_>) -> (u64, u64) {
        let here: Vec<Py<PyWeakref>> =
            self.here.with(|here| here.iter().map(|(_, weak)| weak.clone_ref(py)).collect());
        // Held until the sums are made: none goes, and is counted twice, in between.
        let here: Vec<_> = here.iter().filter_map(|weak| weak.bind(py).upgrade()).collect();
        let (mut read, mut missed) = self.gone.with(|gone| *gone);
        for subscription in &here {
            let metrics = with_inner(subscription, |inner| inner.core.metrics());
            if let Some(metrics) = metrics {
                read += metrics.delivered;
                missed += metrics.dropped.total();
            }
        }
        (read, missed)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.here.with(|here| here.iter().try_for_each(|(_, weak)| visit.call(weak)))
    }
}

impl Tally {
    /// Takes over the numbers of a subscription that goes.
    pub(crate) fn left(&self, subscription: &tickbus::EventSubscription<Handle, Gil>) {
        let metrics = subscription.metrics();
        let weak = self.here.with(|here| {
            let place = here.iter().position(|(id, _)| *id == metrics.id);
            place.map(|place| here.swap_remove(place))
        });
        self.gone.with(|(read, missed)| {
            *read += metrics.delivered;
            *missed += metrics.dropped.total();
        });
        drop(weak);
    }
}

fn with_inner<O>(subscription: &Bound<'_, PyAny>, f: impl FnOnce(&Inner) -> O) -> Option<O> {
    if let Ok(subscription) = subscription.cast::<EventSubscription>() {
        return Some(f(&subscription.get().inner));
    }
    subscription.cast::<AsyncEventSubscription>().ok().map(|s| f(&s.get().inner))
}
