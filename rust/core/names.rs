//! Names of symbols and sources, and the small numbers that stand for them inside an event.
//!
//! Whoever has a number reads its name without a lock, and whoever has a name that is known finds
//! its number without one: see [`crate::table`].

use crate::error::{ConfigError, NameError};
use crate::table::Table;
use crate::topic;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::LazyLock;

/// The most bytes that the name of a symbol, a source or an event type may have, so that a topic
/// can be made of two of them.
pub const MAX_NAME_BYTES: usize = (topic::MAX_TOPIC_BYTES - 1) / 2;

/// The most symbols that a process knows.
pub const MAX_SYMBOLS: u32 = 1 << 20;

/// The most sources that a process knows.
pub const MAX_SOURCES: u32 = u16::MAX as u32;

/// A table of names, each with a number from 1 on; 0 stands for no name.
pub struct Names {
    what: &'static str,
    limit: u32,
    table: Table<Box<str>>,
    hasher: RandomState,
}

impl Names {
    /// Returns an empty table for at most `limit` names; `what` names them in errors.
    pub fn new(what: &'static str, limit: u32) -> Self {
        Self { what, limit, table: Table::new(), hasher: RandomState::new() }
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
        let found = self.table.find(self.hasher.hash_one(name), |known| &**known == name);
        found.map(|(id, _)| id)
    }

    /// Returns the name of a number, or `None` if there is none.
    #[inline]
    pub fn name(&self, id: u32) -> Option<&str> {
        self.table.value(id).map(Box::as_ref)
    }

    /// Returns how many names there are.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[cold]
    fn add(&self, name: &str) -> Result<u32, NameError> {
        check_name(self.what, name)?;
        let hash = |name: &str| self.hasher.hash_one(name);
        self.table.add(
            hash(name),
            |known| &**known == name,
            |known| hash(known),
            |id| match id > self.limit {
                true => {
                    let (what, limit) = (self.what, self.limit);
                    Err(NameError::Full { what, name: name.into(), limit })
                }
                false => Ok(name.into()),
            },
        )
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").field("what", &self.what).field("len", &self.len()).finish()
    }
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
