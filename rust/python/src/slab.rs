//! The slab: a Python object that owns the payloads of a bus and shows them to the garbage
//! collector. Queues carry handles into it: one object may be in many of them, and is counted once.
//!
//! ```text
//!  bus, subscriptions ──► Slab ──► entries: object, copies
//!         └► queues ────► Handle ──────────┘   graveyard: objects to be dropped last
//! ```

use crate::calls;
use crate::gil::GilCell;
use crate::keys::KeyFunctions;
use crate::ledger::{Ledger, Stamp, StampPlace};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::cell::UnsafeCell;
use std::ptr::NonNull;

/// Entries allocated at once: few at first, since a small bus must be small and the garbage
/// collector looks at each, then as many as there are. They never move, so that handles can point
/// to them.
const FIRST_CHUNK: usize = 32;
const LARGEST_CHUNK: usize = 1_024;

#[derive(Debug)]
struct Entry {
    /// `None` while the entry is free, or after the garbage collector has cleared the slab.
    object: Option<Py<PyAny>>,
    /// Handles that name the entry.
    copies: u32,
    /// Where its stamp is, once it had one; see `Ledger::keep`.
    stamp: Option<StampPlace>,
    next_free: Option<NonNull<Entry>>,
    store: NonNull<Store>,
}

const _: () = assert!(size_of::<Entry>() <= 32, "two entries fit into a line of the cache");

#[derive(Debug)]
struct Entries {
    chunks: Vec<Box<[UnsafeCell<Entry>]>>,
    free: Option<NonNull<Entry>>,
    graveyard: Vec<Py<PyAny>>,
}

/// The entries; at a fixed address, so that they can point to it.
#[derive(Debug)]
pub(crate) struct Store {
    entries: GilCell<Entries>,
    pub(crate) key_functions: KeyFunctions,
    pub(crate) ledger: Ledger,
}

impl Store {
    /// Keeps objects until the next time that the dead are buried.
    pub(crate) fn bury_later(&self, objects: impl Iterator<Item = Py<PyAny>>) {
        self.entries.with(|entries| entries.graveyard.extend(objects));
    }
}

// SAFETY: the store and its entries are only touched by attached threads, one at a time.
unsafe impl Send for Entries {}

/// The owner of all payloads of one bus.
#[pyclass(frozen, module = "tickbus._core", name = "_Slab")]
#[derive(Debug)]
pub(crate) struct Slab(Box<Store>);

#[pymethods]
impl Slab {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.key_functions.traverse(&visit)?;
        self.0.ledger.traverse(&visit)?;
        self.0.entries.with(|store| {
            for entry in store.entries() {
                // SAFETY: only attached threads, one at a time, touch entries.
                visit.call(unsafe { &(*entry.get()).object })?;
            }
            store.graveyard.iter().try_for_each(|object| visit.call(object))
        })
    }

    fn __clear__(&self) {
        let functions = self.0.key_functions.take();
        let objects: Vec<_> = self.0.entries.with(|store| {
            // SAFETY: as above.
            let entries =
                store.entries().filter_map(|entry| unsafe { (*entry.get()).object.take() });
            let mut objects: Vec<_> = entries.collect();
            objects.append(&mut store.graveyard);
            objects
        });
        drop((functions, objects));
    }
}

impl Slab {
    pub(crate) fn new(ledger: Ledger) -> Self {
        let entries = Entries { chunks: Vec::new(), free: None, graveyard: Vec::new() };
        let key_functions = KeyFunctions::default();
        Self(Box::new(Store { entries: GilCell::new(entries), key_functions, ledger }))
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.0.ledger
    }

    /// Returns where handles and places point to.
    pub(crate) fn store(&self) -> NonNull<Store> {
        NonNull::from(&*self.0)
    }

    /// Takes an object over and returns its first handle.
    #[inline]
    pub(crate) fn insert(&self, object: Py<PyAny>) -> Handle {
        let store = self.store();
        self.0.entries.with(|entries| {
            let mut free = match entries.free {
                Some(free) => free,
                None => entries.grow(store),
            };
            // SAFETY: entries live as long as the store and are touched by one thread at a time.
            let entry = unsafe { free.as_mut() };
            entries.free = entry.next_free;
            entry.object = Some(object);
            entry.copies = 1;
            Handle(free)
        })
    }

    /// Drops the objects whose last handle is gone. Called attached, after the core has returned.
    #[inline]
    pub(crate) fn bury(&self, py: Python<'_>) {
        if self.0.entries.with(|store| !store.graveyard.is_empty()) {
            self.bury_all(py);
        }
    }

    #[cold]
    fn bury_all(&self, py: Python<'_>) {
        while let Some(object) = self.0.entries.with(|store| store.graveyard.pop()) {
            calls::release(py, object);
        }
    }
}

impl Entries {
    fn entries(&self) -> impl Iterator<Item = &UnsafeCell<Entry>> {
        self.chunks.iter().flatten()
    }

    /// Adds a chunk and returns its first entry, the first of the free ones.
    #[cold]
    fn grow(&mut self, store: NonNull<Store>) -> NonNull<Entry> {
        let empty = || Entry { object: None, copies: 0, stamp: None, next_free: None, store };
        let before = self.entries().count();
        let added = before.clamp(FIRST_CHUNK, LARGEST_CHUNK);
        let chunk: Box<[_]> = (0..added).map(|_| UnsafeCell::new(empty())).collect();
        let mut first = None;
        for entry in chunk.iter().rev() {
            // SAFETY: the chunk is still this function's alone.
            unsafe { (*entry.get()).next_free = first };
            first = NonNull::new(entry.get());
        }
        self.chunks.push(chunk);
        self.graveyard.reserve(before + added);
        self.free = first;
        match first {
            Some(first) => first,
            None => unreachable!("a chunk has entries"),
        }
    }
}

/// A payload in the slab; what queues carry. Cloning and dropping it counts.
///
/// It is used attached only, and never outlives its slab: whoever holds a part of the bus that can
/// hold handles holds the slab too, and drops it later.
#[derive(Debug)]
pub(crate) struct Handle(NonNull<Entry>);

// SAFETY: a handle is only used by attached threads, one at a time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Counts one copy less; `keep` gets the object if it was the last.
    #[inline]
    fn release<O>(
        &self,
        last: impl FnOnce(&mut Entries, Option<Py<PyAny>>) -> O,
        other: impl FnOnce(&Option<Py<PyAny>>) -> O,
    ) -> O {
        // SAFETY: the slab outlives its handles, see above, and attached threads take turns; the
        // functions given run no Python code.
        let entry = unsafe { &mut *self.0.as_ptr() };
        entry.copies -= 1;
        if entry.copies > 0 {
            return other(&entry.object);
        }
        // SAFETY: the store outlives its entries.
        unsafe { entry.store.as_ref() }.entries.with(|store| {
            entry.next_free = store.free;
            store.free = Some(self.0);
            last(store, entry.object.take())
        })
    }

    /// Returns the object, which stays where it is; `None` as for `into_object`.
    pub(crate) fn object(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        // SAFETY: as in `release`.
        unsafe { &(*self.0.as_ptr()).object }.as_ref().map(|object| object.clone_ref(py))
    }

    /// Returns where its stamp is, for the moment after its publication.
    #[inline]
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.0)
    }

    /// Returns the object in an envelope; `None` as for `into_object`.
    pub(crate) fn into_envelope(self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        // SAFETY: as in `release`; the store outlives its entries, and the slab its handles.
        let (place, ledger) = unsafe {
            let entry = self.0.as_ref();
            (entry.stamp, &entry.store.as_ref().ledger)
        };
        let stamp = ledger.kept(place);
        let Some(object) = self.into_object(py) else { return Ok(None) };
        ledger.envelope(py, stamp, object).map(Some)
    }

    /// Returns the object; `None` if the garbage collector has cleared the slab.
    #[inline]
    pub(crate) fn into_object(self, py: Python<'_>) -> Option<Py<PyAny>> {
        let handle = std::mem::ManuallyDrop::new(self);
        handle.release(
            |_, object| object,
            |object| object.as_ref().map(|object| object.clone_ref(py)),
        )
    }
}

/// The place of an event's stamp while it is being published.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(NonNull<Entry>);

// SAFETY: a mark is only used by attached threads, one at a time.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    /// Writes the stamp. Called before anything that may run Python code since the event was
    /// pushed, so the entry is still its own, or free if nobody took the event.
    #[inline]
    pub(crate) fn stamp(self, stamp: Stamp) {
        // SAFETY: whoever publishes holds the bus and so the slab, whose entries never move;
        // attached threads take turns.
        unsafe {
            let entry = &mut *self.0.as_ptr();
            entry.stamp = Some(entry.store.as_ref().ledger.keep(entry.stamp, stamp));
        }
    }
}

impl Clone for Handle {
    #[inline]
    fn clone(&self) -> Self {
        // SAFETY: as in `release`.
        unsafe { (*self.0.as_ptr()).copies += 1 };
        Self(self.0)
    }
}

impl Drop for Handle {
    #[inline]
    fn drop(&mut self) {
        self.release(|store, object| store.graveyard.extend(object), |_| ());
    }
}
