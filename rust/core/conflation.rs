//! The newest event of each key, in the order in which the keys became pending.
//!
//! ```text
//!  index: key ─► slot ─► entry { key, event? }       an event: pending      none: idle
//!                          ▲            ▲
//!   order: slots pending ──┘            └── idle: slots whose keys have been read
//! ```
//!
//! A key keeps its slot after it was read, so that a key that comes back is found and not inserted
//! again; a new key takes an idle slot, so that the keys ever seen are bounded by nothing and the
//! memory by `capacity`. With every slot pending, a new key takes that of the oldest, whose event
//! is lost: the hole is before everything that is pending then.
//!
//! Everything is allocated when the map is made. Whatever leaves it (events, keys) is handed out to
//! be dropped by the caller without a lock. Keys are compared as numbers here; functions, hashes
//! and comparisons of users have run before, see [`KeyFn`].
//!
//! The index is an open-addressing table with linear probing and backward-shift deletion (Knuth,
//! TAOCP 3, 6.4, algorithm R).

use crate::error::KeyError;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Weak};

/// What a conflating subscription keeps the newest event of: a number.
#[derive(Debug, Clone)]
pub struct Key {
    number: u64,
    /// Kept alive as long as the number is in use.
    _owner: Option<Arc<u64>>,
}

impl From<u64> for Key {
    /// Returns the key that is this number.
    fn from(number: u64) -> Self {
        Self { number, _owner: None }
    }
}

impl From<Arc<u64>> for Key {
    /// Returns the key of a number that stands for something else as long as it is kept: when its
    /// last `Arc` is gone, no subscription knows the number any more.
    fn from(number: Arc<u64>) -> Self {
        Self { number: *number, _owner: Some(number) }
    }
}

/// How a conflating subscription finds an event's key.
///
/// It runs in the publisher's thread before anything is locked or reserved, once for each event
/// that the subscription wants, and may use the bus itself. If it fails or panics, nobody has the
/// event.
pub struct KeyFn<T>(Arc<Function<T>>);

type Function<T> = dyn Fn(&T) -> Result<Key, KeyError> + Send + Sync;

impl<T> KeyFn<T> {
    /// Returns a key function that gives anything that can be compared: a symbol, a pair of venue
    /// and symbol. `Hash` and `Eq` of the key must not publish.
    pub fn new<K: Hash + Eq + Send + 'static>(
        key: impl Fn(&T) -> K + Send + Sync + 'static,
    ) -> Self {
        let numbers = Mutex::new(Numbers::default());
        Self::try_new(move |event| {
            let key = key(event);
            Ok::<_, Infallible>(numbers.lock().key(key))
        })
    }

    /// Returns a key function that gives a number, which needs no look-up.
    pub fn number(key: impl Fn(&T) -> u64 + Send + Sync + 'static) -> Self {
        Self::try_new(move |event| Ok::<_, Infallible>(key(event).into()))
    }

    /// Returns a key function that may fail.
    pub fn try_new<E: std::error::Error + Send + Sync + 'static>(
        key: impl Fn(&T) -> Result<Key, E> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(move |event| key(event).map_err(KeyError::new)))
    }

    pub(crate) fn key(&self, event: &T) -> Result<Key, KeyError> {
        (self.0)(event)
    }
}

impl<T> Clone for KeyFn<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for KeyFn<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyFn").finish_non_exhaustive()
    }
}

/// Numbers for keys of any type, each as long as it is in use.
struct Numbers<K> {
    known: HashMap<K, Weak<u64>>,
    next: u64,
    /// The number of known keys at which those out of use are forgotten.
    sweep_at: usize,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self { known: HashMap::new(), next: 0, sweep_at: LEAST_SWEEP }
    }
}

const LEAST_SWEEP: usize = 64;

impl<K: Hash + Eq> Numbers<K> {
    fn key(&mut self, key: K) -> Key {
        if let Some(number) = self.known.get(&key).and_then(Weak::upgrade) {
            return number.into();
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(|_, number| number.strong_count() > 0);
            self.sweep_at = LEAST_SWEEP.max(2 * self.known.len());
        }
        let number = Arc::new(self.next);
        self.next += 1;
        self.known.insert(key, Arc::downgrade(&number));
        number.into()
    }
}

/// The newest event of each key. See the head of the module.
pub(crate) struct Conflation<T> {
    entries: Vec<Entry<T>>,
    /// Slots by key, each plus one; 0 is free.
    index: Box<[u32]>,
    order: VecDeque<u32>,
    idle: Vec<u32>,
    /// Events lost before everything that is pending, and not told yet.
    pub(crate) missed: u64,
}

struct Entry<T> {
    key: Key,
    event: Option<T>,
    /// The index, among the events offered, of that with which the key became pending.
    since: u64,
    /// Its place among the idle slots, if it is one.
    place: u32,
}

/// What had to go for an event; it is dropped without a lock.
pub(crate) enum Displaced<T> {
    Nothing,
    /// The event before, of the same key.
    Replaced(T),
    /// A key that was read.
    Forgotten(Key),
    /// The oldest pending event, of another key.
    Overwritten(T, Key),
}

impl<T> Conflation<T> {
    /// Returns an empty map of up to `capacity` pending keys, a power of two.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            entries: Vec::with_capacity(capacity),
            index: vec![0; 2 * capacity].into(),
            order: VecDeque::with_capacity(capacity),
            idle: Vec::with_capacity(capacity),
            missed: 0,
        }
    }

    /// Returns the number of pending keys.
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Returns an index not above that of any pending event: keys are in the order in which they
    /// became pending.
    pub(crate) fn since(&self) -> Option<u64> {
        self.order.front().map(|&slot| self.entries[slot as usize].since)
    }

    /// Makes an event, which is the `index`-th offered, its key's newest.
    pub(crate) fn put(&mut self, key: &Key, event: T, index: u64) -> Displaced<T> {
        if let Some(slot) = self.find(key.number) {
            let entry = &mut self.entries[slot as usize];
            let place = entry.place;
            if let Some(older) = entry.event.replace(event) {
                return Displaced::Replaced(older);
            }
            entry.since = index;
            self.idle.swap_remove(place as usize);
            if let Some(&moved) = self.idle.get(place as usize) {
                self.entries[moved as usize].place = place;
            }
            self.order.push_back(slot);
            return Displaced::Nothing;
        }
        let entry = Entry { key: key.clone(), event: Some(event), since: index, place: 0 };
        let (slot, displaced) = match self.entries.len() < self.index.len() / 2 {
            true => {
                self.entries.push(entry);
                (self.entries.len() as u32 - 1, Displaced::Nothing)
            }
            false => self.take_slot(entry),
        };
        let free = self.probe(key.number, |slot| slot == 0);
        self.index[free] = slot + 1;
        self.order.push_back(slot);
        displaced
    }

    /// Takes the newest event of the key that has been pending longest.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let slot = self.order.pop_front()?;
        let entry = &mut self.entries[slot as usize];
        entry.place = self.idle.len() as u32;
        self.idle.push(slot);
        entry.event.take()
    }

    fn find(&self, number: u64) -> Option<u32> {
        let found = self.probe(number, |slot| slot == 0 || self.key_of(slot) == number);
        self.index[found].checked_sub(1)
    }

    /// Puts an entry where an idle key was, or else the oldest pending one.
    fn take_slot(&mut self, entry: Entry<T>) -> (u32, Displaced<T>) {
        let Some(slot) = self.idle.pop().or_else(|| self.order.pop_front()) else {
            unreachable!("a slot is pending or idle")
        };
        self.forget(slot);
        let old = std::mem::replace(&mut self.entries[slot as usize], entry);
        let displaced = match old.event {
            None => Displaced::Forgotten(old.key),
            Some(event) => {
                self.missed += 1;
                Displaced::Overwritten(event, old.key)
            }
        };
        (slot, displaced)
    }

    /// Takes a slot's key out of the index and closes the gap.
    fn forget(&mut self, slot: u32) {
        let last = self.index.len() - 1;
        let number = self.key_of(slot + 1);
        let mut gap = self.probe(number, |other| other == slot + 1);
        let mut next = (gap + 1) & last;
        while self.index[next] != 0 {
            let home = self.home(self.key_of(self.index[next]));
            if next.wrapping_sub(home) & last >= next.wrapping_sub(gap) & last {
                self.index[gap] = self.index[next];
                gap = next;
            }
            next = (next + 1) & last;
        }
        self.index[gap] = 0;
    }

    /// Returns the first place from a key's home on at which the search ends. At least half of the
    /// places are free.
    #[inline]
    fn probe(&self, number: u64, ends: impl Fn(u32) -> bool) -> usize {
        let mut place = self.home(number);
        while !ends(self.index[place]) {
            place = (place + 1) & (self.index.len() - 1);
        }
        place
    }

    /// Returns the number of the key at a place of the index that is not free.
    #[inline]
    fn key_of(&self, slot_and_one: u32) -> u64 {
        self.entries[slot_and_one as usize - 1].key.number
    }

    /// Returns where the search for a key begins: folded multiplication, as in wyhash.
    #[inline]
    fn home(&self, number: u64) -> usize {
        let product = u128::from(number ^ 0x2d35_8dcc_aa6c_78a5) * 0x8bb8_4b93_962e_acc9;
        ((product >> 64) as u64 ^ product as u64) as usize & (self.index.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Conflation, Displaced, Key, LEAST_SWEEP, Numbers};
    use std::collections::VecDeque;

    /// A conflation said without slots and places: keys and events in order.
    #[derive(Default)]
    struct Plain {
        pending: VecDeque<(u64, u64)>,
        missed: u64,
    }

    impl Plain {
        fn put(&mut self, capacity: usize, key: u64, event: u64) {
            if let Some(known) = self.pending.iter_mut().find(|(other, _)| *other == key) {
                known.1 = event;
                return;
            }
            if self.pending.len() == capacity {
                self.pending.pop_front();
                self.missed += 1;
            }
            self.pending.push_back((key, event));
        }
    }

    /// A generator of numbers that are the same in every run (splitmix64).
    fn numbers() -> impl Iterator<Item = u64> {
        (1_u64..).map(|n| {
            let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        })
    }

    #[test]
    fn it_does_what_a_plain_list_does_for_any_number_of_keys() {
        for (capacity, keys, spread) in [
            (1, 3, 1),
            (2, 3, 1),
            (4, 100, 1),
            (8, 9, 1 << 60),
            (64, 70, 1 << 32),
            (64, 1 << 40, 1),
        ] {
            let (mut map, mut plain) = (Conflation::new(capacity), Plain::default());
            for (event, number) in (0..).zip(numbers().take(20_000)) {
                let key = (number >> 8) % keys * spread;
                if number % 3 == 0 {
                    assert_eq!(map.pop(), plain.pending.pop_front().map(|(_, event)| event));
                } else {
                    map.put(&Key::from(key), event, event);
                    plain.put(capacity, key, event);
                }
                assert_eq!((map.len(), map.missed), (plain.pending.len(), plain.missed));
                assert!(map.entries.len() <= capacity, "memory is bounded");
                assert_eq!(map.order.len() + map.idle.len(), map.entries.len());
            }
            assert_eq!(map.entries.capacity(), capacity, "nothing is allocated later");
        }
    }

    #[test]
    fn a_key_that_was_read_keeps_its_slot_until_another_needs_it() {
        let mut map = Conflation::new(2);
        let put = |map: &mut Conflation<u64>, key: u64| map.put(&Key::from(key), key, key);
        assert!(matches!(put(&mut map, 1), Displaced::Nothing));
        assert!(matches!(put(&mut map, 2), Displaced::Nothing));
        assert_eq!(map.pop(), Some(1));
        assert!(matches!(put(&mut map, 1), Displaced::Nothing), "1 was still known");
        assert_eq!(map.pop(), Some(2));
        assert!(matches!(put(&mut map, 3), Displaced::Forgotten(key) if key.number == 2));
        let Displaced::Overwritten(event, key) = put(&mut map, 4) else {
            panic!("1 and 3 were pending")
        };
        assert_eq!((event, key.number, map.missed), (1, 1, 1));
    }

    #[test]
    fn keys_out_of_use_are_forgotten_and_those_in_use_keep_their_numbers() {
        let mut numbers = Numbers::default();
        let kept: Vec<_> = (0..100).map(|key| numbers.key(key)).collect();
        for other in 100..10_000 {
            assert!(numbers.key(other).number >= 100, "no number is given twice");
            assert!(numbers.known.len() <= 200, "at most twice as many as are in use");
        }
        for (key, kept) in (0..).zip(&kept) {
            assert_eq!(numbers.key(key).number, kept.number);
        }
        drop(kept);
        (10_000..10_300).for_each(|other| drop(numbers.key(other)));
        assert!(numbers.known.len() <= LEAST_SWEEP);
    }
}
