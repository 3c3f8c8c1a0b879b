//! A table that only grows: values with numbers from 1 on, which never move.
//!
//! Whoever has a number reads its value without a lock, and whoever knows a value that is there
//! finds it without one; a new value takes the table's lock.
//!
//! ```text
//!  index (newest level)         values, in blocks that never move
//!  hash ─► [ tag | id ] ──id──► [ 1 2 .. 64 ] [ 65 .. 192 ] [ 193 .. 448 ] ...
//! ```
//!
//! | store | pairs with | so that |
//! |---|---|---|
//! | a value's `OnceLock::set` | `OnceLock::get` in `value` | a value is whole or not there |
//! | a place's `publish`, after the value was set | `observe` in `probe` | an id that is found has a value |
//! | the level's `publish`, after the index was filled | `observe` in `find` | a value that was known stays known while the index grows |
//!
//! Who still looks into an older level misses values that are newer than it, and then asks under
//! the lock. `tests/loom.rs` has the models.

use crate::sync::{Counter, ThreadMutex};
use std::sync::OnceLock;

/// Values in the first block; each further one has twice as many.
const FIRST_BLOCK: u32 = 64;
const BLOCKS: usize = (u32::BITS - FIRST_BLOCK.trailing_zeros()) as usize;

/// Places in the first index; each further one has twice as many. At most half are taken.
const FIRST_INDEX: usize = 256;
const LEVELS: usize = BLOCKS + 1;

type Block<V> = OnceLock<Box<[OnceLock<V>]>>;

/// Values with numbers from 1 on.
pub(crate) struct Table<V> {
    blocks: [Block<V>; BLOCKS],
    /// Places that hold the upper half of a value's hash and below it the value's number.
    indexes: [OnceLock<Box<[Counter]>>; LEVELS],
    level: Counter,
    /// How many values there are.
    count: Counter,
    growing: ThreadMutex<()>,
}

impl<V> Table<V> {
    pub(crate) fn new() -> Self {
        let indexes = [const { OnceLock::new() }; LEVELS];
        indexes[0].get_or_init(|| empty_index(0));
        Self {
            blocks: [const { OnceLock::new() }; BLOCKS],
            indexes,
            level: Counter::default(),
            count: Counter::default(),
            growing: ThreadMutex::new(()),
        }
    }

    /// Returns the value with this hash for which `is_it` is true, and its number, if it is there.
    #[inline]
    pub(crate) fn find(&self, hash: u64, is_it: impl Fn(&V) -> bool) -> Option<(u32, &V)> {
        self.probe(hash, is_it).ok()
    }

    /// Returns the value of a number, or `None` if there is none.
    #[inline]
    pub(crate) fn value(&self, id: u32) -> Option<&V> {
        let (block, place) = place_of_value(id)?;
        self.blocks[block].get()?[place].get()
    }

    /// Returns how many values there are.
    pub(crate) fn len(&self) -> usize {
        self.count.observe() as usize
    }

    /// Returns the number of a value, which `make` makes, knowing its number, if it is not there.
    #[cold]
    pub(crate) fn add<E>(
        &self,
        hash: u64,
        is_it: impl Fn(&V) -> bool,
        hash_of: impl Fn(&V) -> u64,
        make: impl FnOnce(u32) -> Result<V, E>,
    ) -> Result<u32, E> {
        let _growing = self.growing.lock();
        // Another thread may have added it meanwhile.
        if let Ok((id, _)) = self.probe(hash, &is_it) {
            return Ok(id);
        }
        let count = self.count.value() as u32;
        let id = count + 1;
        let value = make(id)?;
        self.grow(count, hash_of);
        let Err(free) = self.probe(hash, &is_it) else { unreachable!("nobody else adds") };
        let Some((block, place)) = place_of_value(id) else { unreachable!("ids begin at 1") };
        let block = self.blocks[block].get_or_init(|| empty_block(block));
        let is_new = block[place].set(value).is_ok();
        debug_assert!(is_new, "an id is given once");
        // Whoever finds an id finds it counted.
        self.count.publish(u64::from(id));
        free.publish(tag(hash) | u64::from(id));
        Ok(id)
    }

    /// Returns the value and its number, or the place in the newest index where it is missing.
    #[inline]
    fn probe(&self, hash: u64, is_it: impl Fn(&V) -> bool) -> Result<(u32, &V), &Counter> {
        let index = self.index(self.level.observe() as usize);
        let (tag, mut place) = (tag(hash), hash as usize);
        loop {
            place &= index.len() - 1;
            let found = index[place].observe();
            if found == 0 {
                return Err(&index[place]);
            }
            let id = found as u32;
            if found & TAG == tag
                && let Some(value) = self.value(id)
                && is_it(value)
            {
                return Ok((id, value));
            }
            place += 1;
        }
    }

    /// Doubles the index if another value would fill more than half of it.
    fn grow(&self, count: u32, hash_of: impl Fn(&V) -> u64) {
        let level = self.level.value() as usize;
        if 2 * (count as usize) < self.index(level).len() {
            return;
        }
        let wider = empty_index(level + 1);
        for id in 1..=count {
            let Some(value) = self.value(id) else { unreachable!("ids have no gaps") };
            let hash = hash_of(value);
            let mut place = hash as usize;
            while wider[place & (wider.len() - 1)].value() != 0 {
                place += 1;
            }
            wider[place & (wider.len() - 1)].add_exclusive(tag(hash) | u64::from(id));
        }
        let is_new = self.indexes[level + 1].set(wider).is_ok();
        debug_assert!(is_new, "levels are made under the lock, one after another");
        self.level.publish(level as u64 + 1);
    }

    #[inline]
    fn index(&self, level: usize) -> &[Counter] {
        match self.indexes[level].get() {
            Some(index) => index,
            None => unreachable!("a level is published after its index"),
        }
    }
}

/// The part of a place that a value's hash fills; a place that holds a number is never 0.
const TAG: u64 = !(u32::MAX as u64);

#[inline]
fn tag(hash: u64) -> u64 {
    hash & TAG
}

/// Returns the block of a number, and the place in it.
#[inline]
fn place_of_value(id: u32) -> Option<(usize, usize)> {
    // Blocks begin at FIRST_BLOCK * (2^n - 1), counted from 0.
    let shifted = id.checked_sub(1)?.checked_add(FIRST_BLOCK)?;
    let block = (shifted / FIRST_BLOCK).ilog2();
    Some((block as usize, (shifted - (FIRST_BLOCK << block)) as usize))
}

fn empty_block<V>(block: usize) -> Box<[OnceLock<V>]> {
    (0..FIRST_BLOCK << block).map(|_| OnceLock::new()).collect()
}

fn empty_index(level: usize) -> Box<[Counter]> {
    (0..FIRST_INDEX << level).map(|_| Counter::default()).collect()
}
