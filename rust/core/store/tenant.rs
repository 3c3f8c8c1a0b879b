//! What stands on a store, hears what becomes durable and ends with it.

use parking_lot::Mutex;
use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// Something that a store knows only by these calls.
pub(crate) trait Tenant: Send + Sync {
    /// Records below a sequence are durable.
    fn durable(&self, upto: u64);

    /// Ends it, before the store does.
    fn close(&self);

    /// Ends it in a process that was forked from the store's.
    fn leave_to_parent(&self);

    /// Returns it as what it is.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

/// The place of one tenant.
#[derive(Default)]
pub(crate) struct Tenancy(Mutex<Option<Arc<dyn Tenant>>>);

impl fmt::Debug for Tenancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenancy").finish_non_exhaustive()
    }
}

impl Tenancy {
    /// Returns the tenant, made by `make` if there is none.
    pub(crate) fn get_or_make<E>(
        &self,
        make: impl FnOnce() -> Result<Arc<dyn Tenant>, E>,
    ) -> Result<Arc<dyn Tenant>, E> {
        let mut place = self.0.lock();
        match &*place {
            Some(tenant) => Ok(tenant.clone()),
            None => Ok(place.insert(make()?).clone()),
        }
    }

    /// Returns the tenant, if there is one.
    pub(crate) fn get(&self) -> Option<Arc<dyn Tenant>> {
        self.0.lock().clone()
    }

    /// As `get`, but nothing where another thread is making it: after a `fork` none is there to end
    /// that.
    pub(crate) fn try_get(&self) -> Option<Arc<dyn Tenant>> {
        self.0.try_lock().and_then(|place| place.clone())
    }
}
