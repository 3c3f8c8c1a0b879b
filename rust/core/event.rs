//! The compact event: 32 bytes that are carried by value.
//!
//! ```text
//!  0         8            9          10          12       16      24         32
//!  timestamp event_type   priority   source_id   symbol   value   metadata
//!  u64 ns    u8           u8         u16         u32      f64     u64
//! ```
//!
//! Every 32 bytes are an event, so nothing that comes from a file, a network or an array has to be
//! checked: codes and numbers are newtypes, not enumerations. Those that have no name here say so
//! where a name is asked for.

use crate::event_type::EventType;
use crate::names::{SourceId, Symbol};
use std::fmt;
use std::hash::{Hash, Hasher};

/// How urgent an event is among those of its kind, in the lower seven bits; the highest bit says that
/// the event was replayed. Higher is more urgent.
#[repr(transparent)]
#[derive(
    Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable,
)]
pub struct Priority(pub u8);

#[expect(non_upper_case_globals, reason = "they read like the variants of an enum")]
impl Priority {
    /// As urgent as most.
    pub const Normal: Self = Self(0);
    /// Read before normal events.
    pub const High: Self = Self(1);
    /// Read before all others; so is any level above it.
    pub const Critical: Self = Self(2);

    /// The highest level.
    pub const MAX: Self = Self(REPLAYED - 1);

    /// Returns it without the bit that says that the event was replayed.
    #[inline]
    pub const fn level(self) -> Self {
        Self(self.0 & !REPLAYED)
    }
}

/// The bit of a priority that says that its event was replayed.
const REPLAYED: u8 = 1 << 7;

impl fmt::Debug for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.level() {
            Self::Normal => f.write_str("Normal")?,
            Self::High => f.write_str("High")?,
            Self::Critical => f.write_str("Critical")?,
            Self(other) => write!(f, "Priority({other})")?,
        }
        f.write_str(if self.level() == *self { "" } else { " replayed" })
    }
}

/// One of the three queues in which compact events travel, in the order in which they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Delivered before everything else.
    Critical,
    /// Delivered before normal events.
    High,
    /// Delivered last.
    Normal,
}

impl Lane {
    /// All lanes, in the order in which they are read.
    pub const ALL: [Self; 3] = [Self::Critical, Self::High, Self::Normal];

    /// Returns the lane's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::High => "high",
            Self::Normal => "normal",
        }
    }
}

/// A fact in 32 bytes, equal to another if all its bytes are: a `NaN` equals itself, and `0.0`
/// differs from `-0.0`.
///
/// # Examples
///
/// ```
/// use tickbus::{Event, EventType, Lane, Priority, SourceId, Symbol};
///
/// let event = Event {
///     timestamp: 1_767_225_600_000_000_000,
///     event_type: EventType::PriceUpdate,
///     priority: Priority::Normal,
///     source_id: SourceId::new("binance")?,
///     symbol: Symbol::new("BTCUSDT")?,
///     value: 61_000.5,
///     metadata: 0,
/// };
/// assert_eq!(event.topic().as_deref(), Some("price_update.BTCUSDT"));
/// assert_eq!(event.lane(), Lane::Normal);
/// assert_eq!(Event::from_bytes(event.to_bytes()), event);
/// # Ok::<(), tickbus::NameError>(())
/// ```
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Event {
    /// When it happened: nanoseconds since the Unix epoch, UTC. 0 is unknown; the bus never sets it.
    pub timestamp: u64,
    /// What it tells.
    pub event_type: EventType,
    /// How urgent it is, and whether it was replayed.
    pub priority: Priority,
    /// Who made it.
    pub source_id: SourceId,
    /// What it is about; [`Symbol::NONE`] if nothing in particular.
    pub symbol: Symbol,
    /// A number that depends on the type. Not for money: that is computed from integers.
    pub value: f64,
    /// Whatever the type and the source agreed on; never an address.
    pub metadata: u64,
}

/// Bytes of an event, everywhere.
pub const EVENT_BYTES: usize = 32;

const _: () = {
    assert!(size_of::<Event>() == EVENT_BYTES && align_of::<Event>() == 8, "bytes");
    assert!(std::mem::offset_of!(Event, timestamp) == 0);
    assert!(std::mem::offset_of!(Event, event_type) == 8);
    assert!(std::mem::offset_of!(Event, priority) == 9);
    assert!(std::mem::offset_of!(Event, source_id) == 10);
    assert!(std::mem::offset_of!(Event, symbol) == 12);
    assert!(std::mem::offset_of!(Event, value) == 16);
    assert!(std::mem::offset_of!(Event, metadata) == 24);
};

impl Event {
    /// Returns its bytes, little-endian on every machine. The numbers of source, symbol and
    /// registered types mean something in this process only.
    #[inline]
    pub fn to_bytes(&self) -> [u8; EVENT_BYTES] {
        bytemuck::cast(self.swapped_on_big_endian())
    }

    /// Returns the event with these bytes, little-endian on every machine.
    #[inline]
    pub fn from_bytes(bytes: [u8; EVENT_BYTES]) -> Self {
        bytemuck::cast::<_, Self>(bytes).swapped_on_big_endian()
    }

    #[inline]
    fn swapped_on_big_endian(&self) -> Self {
        Self {
            timestamp: self.timestamp.to_le(),
            source_id: SourceId(self.source_id.0.to_le()),
            symbol: Symbol(self.symbol.0.to_le()),
            value: f64::from_bits(self.value.to_bits().to_le()),
            metadata: self.metadata.to_le(),
            ..*self
        }
    }

    /// Returns the lane in which it travels: a critical type outweighs the priority.
    #[inline]
    pub const fn lane(&self) -> Lane {
        match self.priority.level().0 {
            _ if self.event_type.is_critical() => Lane::Critical,
            0 => Lane::Normal,
            1 => Lane::High,
            2.. => Lane::Critical,
        }
    }

    /// Returns whether it was published by a replay: such events are not stored again unless that is
    /// asked for.
    #[inline]
    pub const fn is_replayed(&self) -> bool {
        self.priority.0 & REPLAYED != 0
    }

    /// Returns the same event as one that a replay publishes, or as one that it does not.
    #[inline]
    pub const fn with_replayed(self, is_replayed: bool) -> Self {
        let level = self.priority.level().0;
        Self { priority: Priority(if is_replayed { level | REPLAYED } else { level }), ..self }
    }

    /// Returns the topic, made of the names of type and symbol: `price_update.BTCUSDT`, or without
    /// a symbol `price_update`. `None` if the type or the symbol has no name in this process: such
    /// an event has no topic.
    pub fn topic(&self) -> Option<String> {
        let event_type = self.event_type.name()?;
        if self.symbol == Symbol::NONE {
            return Some(event_type.to_owned());
        }
        Some(format!("{event_type}.{}", self.symbol.name()?))
    }

    /// Returns its bytes as they are in memory, in four words.
    #[inline]
    pub fn words(&self) -> [u64; 4] {
        bytemuck::cast(*self)
    }
}

impl PartialEq for Event {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        self.words() == other.words()
    }
}

impl Eq for Event {}

impl Hash for Event {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(bytemuck::bytes_of(self));
    }
}

#[cfg(test)]
mod tests {
    use super::{EVENT_BYTES, Event, Lane, Priority};
    use crate::event_type::EventType;
    use crate::names::{SourceId, Symbol};
    use proptest::prelude::*;
    use std::hash::{BuildHasher, RandomState};

    fn event(event_type: EventType, priority: Priority, symbol: Symbol) -> Event {
        Event { event_type, priority, symbol, ..bytemuck::Zeroable::zeroed() }
    }

    proptest! {
        #[test]
        fn any_32_bytes_are_an_event_and_come_back(bytes: [u8; EVENT_BYTES]) {
            prop_assert_eq!(Event::from_bytes(bytes).to_bytes(), bytes);
        }

        #[test]
        fn bytes_are_little_endian_fields_at_their_offsets(
            timestamp: u64,
            event_type: u8,
            priority: u8,
            source_id: u16,
            symbol: u32,
            value: u64,
            metadata: u64,
        ) {
            let event = Event {
                timestamp,
                event_type: EventType(event_type),
                priority: Priority(priority),
                source_id: SourceId(source_id),
                symbol: Symbol(symbol),
                value: f64::from_bits(value),
                metadata,
            };
            let mut bytes = timestamp.to_le_bytes().to_vec();
            bytes.extend([event_type, priority]);
            bytes.extend(source_id.to_le_bytes());
            bytes.extend(symbol.to_le_bytes());
            bytes.extend(value.to_le_bytes());
            bytes.extend(metadata.to_le_bytes());
            prop_assert_eq!(event.to_bytes().to_vec(), bytes);
            prop_assert_eq!(Event::from_bytes(event.to_bytes()), event);
        }

        #[test]
        fn events_are_equal_exactly_if_their_bytes_are(
            bytes in any::<[u8; EVENT_BYTES]>(), changed in 0..EVENT_BYTES, by in 1..=u8::MAX,
        ) {
            let hashes = RandomState::new();
            let event = Event::from_bytes(bytes);
            prop_assert_eq!(event, Event::from_bytes(bytes));
            prop_assert_eq!(hashes.hash_one(event), hashes.hash_one(Event::from_bytes(bytes)));
            let mut other = bytes;
            other[changed] ^= by;
            prop_assert_ne!(event, Event::from_bytes(other));
            prop_assert_ne!(hashes.hash_one(event), hashes.hash_one(Event::from_bytes(other)));
        }
    }

    #[test]
    fn a_critical_type_outweighs_the_priority_and_the_priority_decides_otherwise() {
        for code in 0..=u8::MAX {
            for priority in 0..=u8::MAX {
                let expected = match (code, priority) {
                    (128.., _) | (_, 2..=127 | 130..) => Lane::Critical,
                    (_, 1 | 129) => Lane::High,
                    (_, 0 | 128) => Lane::Normal,
                };
                let event = event(EventType(code), Priority(priority), Symbol::NONE);
                assert_eq!(event.lane(), expected, "{code}, {priority}");
            }
        }
    }

    #[test]
    fn a_replayed_event_differs_in_one_bit_and_in_nothing_that_it_means() {
        for level in 0..=Priority::MAX.0 {
            let live = event(EventType::PriceUpdate, Priority(level), Symbol::NONE);
            let replayed = live.with_replayed(true);
            assert!(replayed.is_replayed() && !live.is_replayed());
            assert_eq!((replayed.lane(), replayed.priority.level()), (live.lane(), live.priority));
            assert_eq!((replayed.with_replayed(false), live.with_replayed(false)), (live, live));
            assert_ne!(replayed, live);
        }
        assert_eq!(format!("{:?}", Priority(129)), "High replayed");
    }

    #[test]
    fn the_topic_is_made_of_the_names_of_type_and_symbol() {
        let topic = |event_type, symbol| event(event_type, Priority::Normal, symbol).topic();
        let symbol = Symbol::new("BTCUSDT").expect("it is a name");
        let price = EventType::PriceUpdate;
        assert_eq!(topic(price, symbol).as_deref(), Some("price_update.BTCUSDT"));
        assert_eq!(topic(price, Symbol::NONE).as_deref(), Some("price_update"));
        assert_eq!(topic(EventType(255), symbol), None, "the type has no name");
        assert_eq!(topic(price, Symbol(u32::MAX)), None, "the symbol has no name");
    }

    #[test]
    fn symbols_and_sources_keep_their_names() {
        let (symbol, source) = (Symbol::new("ETHUSDT"), SourceId::new("kraken"));
        let (symbol, source) = (symbol.expect("a name"), source.expect("a name"));
        assert_eq!((symbol.name(), source.name()), (Some("ETHUSDT"), Some("kraken")));
        assert_eq!((Symbol::new("ETHUSDT"), SourceId::new("kraken")), (Ok(symbol), Ok(source)));
        assert_eq!((Symbol::NONE.name(), SourceId::NONE.name()), (None, None));
        assert!(format!("{symbol:?} {source:?}").contains("\"ETHUSDT\""));
        assert!(format!("{source:?}").contains("\"kraken\""));
    }
}
