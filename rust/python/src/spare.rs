//! Memory of objects that are gone, for the next ones of their class.

use crate::gil::GilCell;
use pyo3::ffi;
use std::ptr;

/// Objects of one class that are gone, each with the reference that its next user gets and one to
/// the class. Their fields are to be written again.
#[derive(Debug)]
pub(crate) struct Spare(GilCell<Objects>);

#[derive(Debug)]
struct Objects {
    places: [*mut ffi::PyObject; 64],
    count: usize,
}

// SAFETY: only attached threads touch it.
unsafe impl Send for Objects {}

impl Spare {
    pub(crate) const fn new() -> Self {
        Self(GilCell::new(Objects { places: [ptr::null_mut(); 64], count: 0 }))
    }

    #[inline]
    pub(crate) fn pop(&self) -> Option<*mut ffi::PyObject> {
        self.0.with(|objects| {
            objects.count = objects.count.checked_sub(1)?;
            Some(objects.places[objects.count])
        })
    }

    /// Keeps an object whose last reference is gone and whose fields are dropped, and returns
    /// whether there was room for it.
    ///
    /// # Safety
    ///
    /// It is that, nobody will use it, and the collector does not know it.
    #[inline]
    pub(crate) unsafe fn push(&self, object: *mut ffi::PyObject) -> bool {
        let is_kept = self.0.with(|objects| {
            let place = objects.places.get_mut(objects.count);
            place.map(|place| *place = object).inspect(|()| objects.count += 1).is_some()
        });
        if is_kept {
            // SAFETY: the memory is an object's; nobody else has a reference.
            unsafe { ffi::Py_INCREF(object) };
        }
        is_kept
    }
}
