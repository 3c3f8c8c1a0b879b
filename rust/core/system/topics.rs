//! The topics of compact events, derived from type and symbol when such an event is first seen and
//! found without a lock or an allocation afterwards.

use crate::bus::Bus;
use crate::error::ConfigError;
use crate::event::Event;
use crate::names::Symbol;
use crate::table::Table;
use crate::topic::Topic;

/// The topics by type and symbol, with those of all lanes beside each other.
pub(super) struct Topics(Table<Derived>);

struct Derived {
    key: u64,
    topics: [Topic; 3],
}

impl Topics {
    pub(super) fn new() -> Self {
        Self(Table::new())
    }

    /// Returns the event's topic on the bus of each lane; `None` if its type or its symbol has no
    /// name.
    #[inline]
    pub(super) fn of(
        &self,
        event: &Event,
        lanes: &[Bus<Event>; 3],
    ) -> Result<Option<&[Topic; 3]>, ConfigError> {
        let key = key(event);
        match self.0.find(hash(key), |known| known.key == key) {
            Some((_, derived)) => Ok(Some(&derived.topics)),
            None => self.derive(key, event, lanes),
        }
    }

    #[cold]
    fn derive(
        &self,
        key: u64,
        event: &Event,
        lanes: &[Bus<Event>; 3],
    ) -> Result<Option<&[Topic; 3]>, ConfigError> {
        // It is asked again each time: a name may be given later.
        let has_name = event.event_type.name().is_some()
            && (event.symbol == Symbol::NONE || event.symbol.name().is_some());
        let Some(name) = has_name.then(|| event.topic()).flatten() else { return Ok(None) };
        let make = |_| {
            let [critical, high, normal] = lanes;
            let topics = [critical.topic(&name)?, high.topic(&name)?, normal.topic(&name)?];
            Ok(Derived { key, topics })
        };
        let id = self.0.add(hash(key), |known| known.key == key, |known| hash(known.key), make)?;
        Ok(self.0.value(id).map(|derived| &derived.topics))
    }
}

#[inline]
fn key(event: &Event) -> u64 {
    u64::from(event.event_type.0) << u32::BITS | u64::from(event.symbol.0)
}

/// Fibonacci hashing, the upper half folded onto the lower one, which picks the place.
#[inline]
fn hash(key: u64) -> u64 {
    let mixed = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> u32::BITS)
}
