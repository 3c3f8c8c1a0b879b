//! Names of symbols and sources, and the small numbers that stand for them inside an event.
//!
//! A table only grows. Whoever has a number reads its name without a lock, and whoever has a name
//! that is known finds its number without one; a new name takes the table's lock.
//!
//! ```text
//!  index (newest level)         names, in blocks that never move
//!  hash ─► [ tag | id ] ──id──► [ 1 2 .. 64 ] [ 65 .. 192 ] [ 193 .. 448 ] ...
//! ```
//!
//! | store | pairs with | so that |
//! |---|---|---|
//! | a name's `OnceLock::set` | `OnceLock::get` in `name` | a name is whole or not there |
//! | a place's `publish`, after the name was set | `observe` in `probe` | an id that is found has a name |
//! | the level's `publish`, after the index was filled | `observe` in `find` | a name that was known stays known while the index grows |
//!
//! Who still looks into an older level misses names that are newer than it, and then asks under the
//! lock. `tests/loom.rs` has the models.

use crate::error::{ConfigError, NameError};
use crate::sync::Counter;
use crate::topic;
use parking_lot::Mutex;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::{LazyLock, OnceLock};

/// The most bytes that the name of a symbol, a source or an event type may have, so that a topic
/// can be made of two of them.
pub const MAX_NAME_BYTES: usize = (topic::MAX_TOPIC_BYTES - 1) / 2;

/// The most symbols that a process knows.
pub const MAX_SYMBOLS: u32 = 1 << 20;

/// The most sources that a process knows.
pub const MAX_SOURCES: u32 = u16::MAX as u32;

/// Names in the first block; each further one has twice as many.
const FIRST_BLOCK: u32 = 64;
const BLOCKS: usize = (u32::BITS - FIRST_BLOCK.trailing_zeros()) as usize;

/// Places in the first index; each further one has twice as many. At most half are taken.
const FIRST_INDEX: usize = 256;
const LEVELS: usize = BLOCKS + 1;

type Block = OnceLock<Box<[OnceLock<Box<str>>]>>;

/// A table of names, each with a number from 1 on; 0 stands for no name.
pub struct Names {
    what: &'static str,
    limit: u32,
    blocks: [Block; BLOCKS],
    /// Places that hold the upper half of a name's hash and below it the name's number.
    indexes: [OnceLock<Box<[Counter]>>; LEVELS],
    level: Counter,
    /// How many names there are.
    count: Counter,
    hasher: RandomState,
    growing: Mutex<()>,
}

impl Names {
    /// Returns an empty table for at most `limit` names; `what` names them in errors.
    pub fn new(what: &'static str, limit: u32) -> Self {
        let indexes = [const { OnceLock::new() }; LEVELS];
        indexes[0].get_or_init(|| empty_index(0));
        Self {
            what,
            limit,
            blocks: [const { OnceLock::new() }; BLOCKS],
            indexes,
            level: Counter::default(),
            count: Counter::default(),
            hasher: RandomState::new(),
            growing: Mutex::new(()),
        }
    }

    /// Returns the number of a name, which is added if it is new. A name that is known takes no
    /// lock.
    ///
    /// # Errors
    ///
    /// `NameError` if the name could not be a part of a topic, or if the table is full.
    #[inline]
    pub fn intern(&self, name: &str) -> Result<u32, NameError> {
        match self.find(name) {
            Some(id) => Ok(id),
            None => self.add(name),
        }
    }

    /// Returns the number of a name that is known.
    #[inline]
    pub fn find(&self, name: &str) -> Option<u32> {
        self.probe(name, self.hasher.hash_one(name)).ok()
    }

    /// Returns the name of a number, or `None` if there is none.
    #[inline]
    pub fn name(&self, id: u32) -> Option<&str> {
        let (block, place) = place_of_name(id)?;
        self.blocks[block].get()?[place].get().map(Box::as_ref)
    }

    /// Returns how many names there are.
    pub fn len(&self) -> usize {
        self.count.observe() as usize
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of a name, or the place in the newest index where it is missing.
    #[inline]
    fn probe(&self, name: &str, hash: u64) -> Result<u32, &Counter> {
        let index = self.index(self.level.observe() as usize);
        let (tag, mut place) = (tag(hash), hash as usize);
        loop {
            place &= index.len() - 1;
            let found = index[place].observe();
            if found == 0 {
                return Err(&index[place]);
            }
            let id = found as u32;
            if found & TAG == tag && self.name(id) == Some(name) {
                return Ok(id);
            }
            place += 1;
        }
    }

    #[cold]
    fn add(&self, name: &str) -> Result<u32, NameError> {
        check_name(self.what, name)?;
        let hash = self.hasher.hash_one(name);
        let _growing = self.growing.lock();
        // Another thread may have added it meanwhile.
        let mut free = match self.probe(name, hash) {
            Ok(id) => return Ok(id),
            Err(free) => free,
        };
        let count = self.count.value() as u32;
        if count == self.limit {
            return Err(NameError::Full { what: self.what, name: name.into(), limit: self.limit });
        }
        if self.grow(count as usize) {
            let Err(moved) = self.probe(name, hash) else { unreachable!("nobody else adds") };
            free = moved;
        }
        let id = count + 1;
        let Some((block, place)) = place_of_name(id) else { unreachable!("ids begin at 1") };
        let block = self.blocks[block].get_or_init(|| empty_block(block));
        let is_new = block[place].set(name.into()).is_ok();
        debug_assert!(is_new, "an id is given once");
        free.publish(tag(hash) | u64::from(id));
        self.count.publish(u64::from(id));
        Ok(id)
    }

    /// Doubles the index if another name would fill more than half of it; returns whether it did.
    fn grow(&self, count: usize) -> bool {
        let level = self.level.value() as usize;
        if 2 * count < self.index(level).len() {
            return false;
        }
        let wider = empty_index(level + 1);
        for id in 1..=count as u32 {
            let Some(name) = self.name(id) else { unreachable!("ids have no gaps") };
            let hash = self.hasher.hash_one(name);
            let mut place = hash as usize;
            while wider[place & (wider.len() - 1)].value() != 0 {
                place += 1;
            }
            wider[place & (wider.len() - 1)].add_exclusive(tag(hash) | u64::from(id));
        }
        let is_new = self.indexes[level + 1].set(wider).is_ok();
        debug_assert!(is_new, "levels are made under the lock, one after another");
        self.level.publish(level as u64 + 1);
        true
    }

    #[inline]
    fn index(&self, level: usize) -> &[Counter] {
        match self.indexes[level].get() {
            Some(index) => index,
            None => unreachable!("a level is published after its index"),
        }
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").field("what", &self.what).field("len", &self.len()).finish()
    }
}

/// The part of a place that a name's hash fills; a place that holds a number is never 0.
const TAG: u64 = !(u32::MAX as u64);

#[inline]
fn tag(hash: u64) -> u64 {
    hash & TAG
}

/// Returns the block of a number, and the place in it.
#[inline]
fn place_of_name(id: u32) -> Option<(usize, usize)> {
    // Blocks begin at FIRST_BLOCK * (2^n - 1), counted from 0.
    let shifted = id.checked_sub(1)?.checked_add(FIRST_BLOCK)?;
    let block = (shifted / FIRST_BLOCK).ilog2();
    Some((block as usize, (shifted - (FIRST_BLOCK << block)) as usize))
}

fn empty_block(block: usize) -> Box<[OnceLock<Box<str>>]> {
    (0..FIRST_BLOCK << block).map(|_| OnceLock::new()).collect()
}

fn empty_index(level: usize) -> Box<[Counter]> {
    (0..FIRST_INDEX << level).map(|_| Counter::default()).collect()
}

/// Returns an error if the name could not be a part of a topic.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), ConfigError> {
    if name.len() > MAX_NAME_BYTES {
        return Err(ConfigError::new(format!(
            "{what} had {} bytes; it must have at most {MAX_NAME_BYTES}",
            name.len()
        )));
    }
    topic::check_exact(what, name)
}

static SYMBOLS: LazyLock<Names> = LazyLock::new(|| Names::new("symbol", MAX_SYMBOLS));
static SOURCES: LazyLock<Names> = LazyLock::new(|| Names::new("source", MAX_SOURCES));

/// What is traded, as a number of this process. Outside of it only the name means anything.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Symbol(pub u32);

impl Symbol {
    /// No symbol.
    pub const NONE: Self = Self(0);

    /// Returns the symbol of a name such as `BTCUSDT`, which is added if it is new.
    ///
    /// # Errors
    ///
    /// `NameError` if the name could not be a part of a topic, or if [`MAX_SYMBOLS`] are known.
    #[inline]
    pub fn new(name: &str) -> Result<Self, NameError> {
        SYMBOLS.intern(name).map(Self)
    }

    /// Returns the name, without a lock; `None` if there is none or this process does not know it.
    #[inline]
    pub fn name(self) -> Option<&'static str> {
        SYMBOLS.name(self.0)
    }

    /// Returns all symbols of the process.
    pub fn table() -> &'static Names {
        &SYMBOLS
    }
}

impl fmt::Debug for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        debug_name(f, "Symbol", self.name(), self.0)
    }
}

/// Who made an event, such as a venue or a strategy, as a number of this process.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SourceId(pub u16);

impl SourceId {
    /// No source.
    pub const NONE: Self = Self(0);

    /// Returns the source of a name such as `binance`, which is added if it is new.
    ///
    /// # Errors
    ///
    /// `NameError` if the name could not be a part of a topic, or if [`MAX_SOURCES`] are known.
    #[inline]
    pub fn new(name: &str) -> Result<Self, NameError> {
        // The table's limit is the largest number.
        SOURCES.intern(name).map(|id| Self(id as u16))
    }

    /// Returns the name, without a lock; `None` if there is none or this process does not know it.
    #[inline]
    pub fn name(self) -> Option<&'static str> {
        SOURCES.name(self.0.into())
    }

    /// Returns all sources of the process.
    pub fn table() -> &'static Names {
        &SOURCES
    }
}

impl fmt::Debug for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        debug_name(f, "SourceId", self.name(), self.0.into())
    }
}

fn debug_name(f: &mut fmt::Formatter<'_>, what: &str, name: Option<&str>, id: u32) -> fmt::Result {
    match name {
        Some(name) => write!(f, "{what}({id}: {name:?})"),
        None => write!(f, "{what}({id})"),
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_NAME_BYTES, Names};
    use crate::error::NameError;

    #[test]
    fn names_are_numbered_from_one_and_known_both_ways() {
        let names = Names::new("symbol", 5_000);
        for id in 1..=5_000 {
            assert_eq!(names.intern(&format!("S{id}")), Ok(id));
        }
        for id in 1..=5_000 {
            let name = format!("S{id}");
            assert_eq!(names.find(&name), Some(id));
            assert_eq!(names.intern(&name), Ok(id));
            assert_eq!(names.name(id), Some(name.as_str()));
        }
        assert_eq!((names.find("S5001"), names.name(5_001), names.name(0)), (None, None, None));
        assert_eq!((names.name(u32::MAX), names.len(), names.is_empty()), (None, 5_000, false));
    }

    #[test]
    fn a_full_table_says_so_and_still_knows_its_names() {
        let names = Names::new("symbol", 2);
        assert_eq!((names.intern("A"), names.intern("B")), (Ok(1), Ok(2)));
        let full = NameError::Full { what: "symbol", name: "C".into(), limit: 2 };
        assert_eq!(names.intern("C"), Err(full));
        assert_eq!((names.intern("A"), names.find("C"), names.len()), (Ok(1), None, 2));
    }

    #[test]
    fn a_name_that_could_not_be_in_a_topic_is_refused() {
        let names = Names::new("symbol", 10);
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for name in ["", ".", "A..B", "A B", "A\n", "A*", ">", &long] {
            assert!(matches!(names.intern(name), Err(NameError::Invalid(_))), "{name:?}");
        }
        for name in ["BTCUSDT", "BRK.B", "BTC-USD", "BTC/USD", "ß", &long[1..]] {
            assert!(names.intern(name).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn threads_that_intern_at_once_agree_on_every_number() {
        const THREADS: u32 = 4;
        let names = Names::new("symbol", 10_000);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let names = &names;
                scope.spawn(move || {
                    // Each begins elsewhere, so that most names are new to somebody.
                    for step in 0..2_000 {
                        let name = format!("S{}", (step + thread * 500) % 2_000);
                        let Ok(id) = names.intern(&name) else { panic!("{name} was refused") };
                        assert_eq!(names.name(id), Some(name.as_str()));
                        assert_eq!(names.find(&name), Some(id));
                    }
                });
            }
        });
        assert_eq!(names.len(), 2_000);
        let mut ids: Vec<_> = (0..2_000).map(|n| names.find(&format!("S{n}"))).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq((1..=2_000).map(Some)), "each number is given once");
    }
}
