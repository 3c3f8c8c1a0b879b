//! Key functions written in Python, and numbers for what they return.
//!
//! A function, a hash or a comparison may do anything, also publish, close, or make another thread
//! run. So all of them run between two looks at the table, never during one, and before the core
//! has locked or reserved anything. The functions and the keys belong to the slab, which shows them
//! to the garbage collector; the core holds a place among them, as queues hold handles.

use crate::calls;
use crate::error;
use crate::gil::GilCell;
use crate::slab::{Handle, Slab, Store};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};
use tickbus::{Key, KeyFn};

/// The key functions of one bus, by place.
#[derive(Debug, Default)]
pub(crate) struct KeyFunctions(GilCell<Vec<Option<KeyFunction>>>);

#[derive(Debug)]
pub(crate) struct KeyFunction {
    function: Py<PyAny>,
    /// By hash, the keys that were seen lately; those in use have a number that is alive.
    numbers: HashMap<isize, Numbered>,
    /// How many keys there are.
    known: usize,
    /// How many there may be before those out of use are forgotten.
    sweep_at: usize,
    next_number: u64,
}

type Numbered = SmallVec<[(Py<PyAny>, Weak<u64>); 1]>;

const LEAST_SWEEP: usize = 64;

impl KeyFunctions {
    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.with(|functions| {
            functions.iter().flatten().try_for_each(|key_function| {
                visit.call(&key_function.function)?;
                let mut keys = key_function.numbers.values().flatten();
                keys.try_for_each(|(key, _)| visit.call(key))
            })
        })
    }

    /// Takes everything out, to be dropped by the caller; the places stay.
    pub(crate) fn take(&self) -> Vec<Option<KeyFunction>> {
        self.0.with(|functions| functions.iter_mut().map(Option::take).collect())
    }
}

/// Returns the key function that calls a Python function.
pub(crate) fn key_function(slab: &Slab, function: Py<PyAny>) -> KeyFn<Handle> {
    let place = Place::new(slab.store(), function);
    KeyFn::try_new(move |event| Python::attach(|py| place.key(py, event)))
}

/// A key function's place in the store; dropping it buries the function.
///
/// Like a handle it is used attached only, and never outlives the slab.
struct Place {
    store: NonNull<Store>,
    place: usize,
}

// SAFETY: a place is only used by attached threads, one at a time.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn new(store: NonNull<Store>, function: Py<PyAny>) -> Self {
        let key_function = KeyFunction {
            function,
            numbers: HashMap::new(),
            known: 0,
            sweep_at: LEAST_SWEEP,
            next_number: 0,
        };
        // SAFETY: the slab outlives its places.
        let place = unsafe { store.as_ref() }.key_functions.0.with(|functions| {
            let free = functions.iter().position(Option::is_none).unwrap_or(functions.len());
            if free == functions.len() {
                functions.push(None);
            }
            functions[free] = Some(key_function);
            free
        });
        Self { store, place }
    }

    fn with<O>(&self, f: impl FnOnce(&mut Option<KeyFunction>) -> O) -> O {
        // SAFETY: the slab outlives its places.
        unsafe { self.store.as_ref() }
            .key_functions
            .0
            .with(|functions| f(&mut functions[self.place]))
    }

    fn key(&self, py: Python<'_>, event: &Handle) -> PyResult<Key> {
        let function = self.with(|f| f.as_ref().map(|f| f.function.clone_ref(py)));
        // Both are there until the garbage collector has ended the bus.
        let (Some(function), Some(event)) = (function, event.object(py)) else {
            return Err(error::closed(py));
        };
        let key = calls::call(py, &function, [event.bind(py)])?;
        let hash = key.hash()?;
        loop {
            let looked_up =
                self.with(|f| f.as_ref().map(|f| (f.next_number, f.known_by(py, hash))));
            let Some((next_number, known)) = looked_up else { return Err(error::closed(py)) };
            for (other, number) in known {
                if other.is(&key) || other.bind(py).eq(&key)? {
                    return Ok(number.into());
                }
            }
            // Another thread may have added the key meanwhile: then it is compared too.
            let added = self.with(|f| {
                let f = f.as_mut().filter(|f| f.next_number == next_number)?;
                Some(f.add(hash, key.clone().unbind()))
            });
            if let Some((number, _forgotten)) = added {
                return Ok(number.into());
            }
        }
    }
}

impl KeyFunction {
    /// Returns the keys in use that have a hash, with their numbers.
    fn known_by(&self, py: Python<'_>, hash: isize) -> SmallVec<[(Py<PyAny>, Arc<u64>); 1]> {
        let known = self.numbers.get(&hash).into_iter().flatten();
        known.filter_map(|(key, number)| Some((key.clone_ref(py), number.upgrade()?))).collect()
    }

    /// Gives a key a number, and returns with it the keys that were forgotten for it.
    fn add(&mut self, hash: isize, key: Py<PyAny>) -> (Arc<u64>, Vec<Py<PyAny>>) {
        let mut forgotten = Vec::new();
        if self.known >= self.sweep_at {
            self.numbers.retain(|_, bucket| {
                let (used, unused): (Numbered, Numbered) =
                    bucket.drain(..).partition(|(_, number)| number.strong_count() > 0);
                forgotten.extend(unused.into_iter().map(|(key, _)| key));
                *bucket = used;
                !bucket.is_empty()
            });
            self.known -= forgotten.len();
            self.sweep_at = LEAST_SWEEP.max(2 * self.known);
        }
        let number = Arc::new(self.next_number);
        self.next_number += 1;
        self.numbers.entry(hash).or_default().push((key, Arc::downgrade(&number)));
        self.known += 1;
        (number, forgotten)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(function) = self.with(Option::take) {
            let keys = function.numbers.into_values().flatten().map(|(key, _)| key);
            // SAFETY: the slab outlives its places.
            unsafe { self.store.as_ref() }.bury_later(keys.chain([function.function]));
        }
    }
}
