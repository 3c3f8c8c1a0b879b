//! The slab: a Python object that owns the payloads of a bus and shows them to the garbage
//! collector. Channels carry handles into it, because a channel cannot be walked.
//!
//! ```text
//!  bus, subscriptions ──► Slab ──► entries: object, copies
//!         └► channels ──► Handle(index) ───┘   graveyard: objects to be dropped last
//! ```

use crate::gil::GilCell;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::ptr::NonNull;

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Entry {
    /// `None` while the entry is free, or after the garbage collector has cleared the slab.
    object: Option<Py<PyAny>>,
    /// Handles that name the entry.
    copies: u32,
    next_free: u32,
}

#[derive(Debug)]
struct Entries {
    entries: Vec<Entry>,
    free: u32,
    graveyard: Vec<Py<PyAny>>,
}

/// The entries; at a fixed address, so that handles can point to it.
#[derive(Debug)]
pub(crate) struct Store(GilCell<Entries>);

/// The owner of all payloads of one bus.
#[pyclass(frozen, module = "tickbus._core", name = "_Slab")]
#[derive(Debug)]
pub(crate) struct Slab(Box<Store>);

#[pymethods]
impl Slab {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.0.with(|store| {
            for entry in &store.entries {
                visit.call(&entry.object)?;
            }
            store.graveyard.iter().try_for_each(|object| visit.call(object))
        })
    }

    fn __clear__(&self) {
        let objects: Vec<_> = self.0.0.with(|store| {
            let entries = store.entries.iter_mut().filter_map(|entry| entry.object.take());
            entries.chain(store.graveyard.drain(..)).collect()
        });
        drop(objects);
    }
}

impl Slab {
    pub(crate) fn new() -> Self {
        let entries = Entries { entries: Vec::new(), free: NONE, graveyard: Vec::new() };
        Self(Box::new(Store(GilCell::new(entries))))
    }

    /// Takes an object over and returns its first handle.
    #[inline]
    pub(crate) fn insert(&self, object: Py<PyAny>) -> Handle {
        let index = self.0.0.with(|store| {
            let index = store.free;
            if let Some(entry) = store.entries.get_mut(index as usize) {
                store.free = entry.next_free;
                entry.object = Some(object);
                entry.copies = 1;
                return index;
            }
            store.grow(object)
        });
        Handle { store: NonNull::from(&*self.0), index }
    }

    /// Drops the objects whose last handle is gone. Called attached, after the core has returned.
    #[inline]
    pub(crate) fn bury(&self, py: Python<'_>) {
        while let Some(object) = self.0.0.with(|store| store.graveyard.pop()) {
            object.drop_ref(py);
        }
    }
}

impl Entries {
    #[cold]
    fn grow(&mut self, object: Py<PyAny>) -> u32 {
        let index = self.entries.len() as u32;
        assert!(index < NONE, "a bus holds at most 2^32 - 1 events");
        self.entries.push(Entry { object: Some(object), copies: 1, next_free: NONE });
        self.graveyard.reserve(self.entries.capacity() - self.graveyard.len());
        index
    }

    #[inline]
    fn free(&mut self, index: u32) -> Option<Py<PyAny>> {
        let entry = &mut self.entries[index as usize];
        entry.next_free = self.free;
        self.free = index;
        entry.object.take()
    }
}

/// A payload in the slab; what channels carry. Cloning and dropping it counts.
///
/// It is used attached only, and never outlives its slab: whoever holds a part of the bus that can
/// hold handles holds the slab too, and drops it later.
#[derive(Debug)]
pub(crate) struct Handle {
    store: NonNull<Store>,
    index: u32,
}

// SAFETY: a handle is only used by attached threads, one at a time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    #[inline]
    fn store(&self) -> &Store {
        // SAFETY: the slab outlives its handles, see above.
        unsafe { self.store.as_ref() }
    }

    /// Returns the object; `None` if the garbage collector has cleared the slab.
    #[inline]
    pub(crate) fn into_object(self, py: Python<'_>) -> Option<Py<PyAny>> {
        let handle = std::mem::ManuallyDrop::new(self);
        let index = handle.index;
        handle.store().0.with(|store| {
            let entry = &mut store.entries[index as usize];
            entry.copies -= 1;
            if entry.copies == 0 {
                return store.free(index);
            }
            entry.object.as_ref().map(|object| object.clone_ref(py))
        })
    }
}

impl Clone for Handle {
    #[inline]
    fn clone(&self) -> Self {
        self.store().0.with(|store| store.entries[self.index as usize].copies += 1);
        Self { store: self.store, index: self.index }
    }
}

impl Drop for Handle {
    #[inline]
    fn drop(&mut self) {
        self.store().0.with(|store| {
            let entry = &mut store.entries[self.index as usize];
            entry.copies -= 1;
            if entry.copies == 0
                && let Some(object) = store.free(self.index)
            {
                store.graveyard.push(object);
            }
        });
    }
}
