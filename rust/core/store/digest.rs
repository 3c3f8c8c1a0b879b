//! What was replayed, as one number: equal for equal events in equal order, whatever process replays
//! them and however fast.
//!
//! docs/format.md has the bytes: three hashes, of the events, of the names of the numbers in them, and of
//! the objects. Numbers of this process, places in the log and segments are not in it.

use super::log::Object;
use crate::event::{EVENT_BYTES, Event};
use crate::names::{SourceId, Symbol};
use blake3::Hasher;

/// Events that are hashed at once: BLAKE3 is fast for parts of a power of two that follow one another.
const BATCH: usize = 1_024;

/// The digest of what was replayed so far.
#[derive(Debug, Clone)]
pub struct Digest {
    events: Hasher,
    /// Those that are not hashed yet, fewer than are hashed at once.
    waiting: Vec<[u8; EVENT_BYTES]>,
    names: Hasher,
    objects: Hasher,
    count: u64,
    symbols: Numbers,
    sources: Numbers,
    has_type: [bool; 256],
}

impl Default for Digest {
    fn default() -> Self {
        Self {
            events: Hasher::new(),
            waiting: Vec::with_capacity(BATCH),
            names: Hasher::new(),
            objects: Hasher::new(),
            count: 0,
            symbols: Numbers::default(),
            sources: Numbers::default(),
            has_type: [false; 256],
        }
    }
}

/// Numbers in the order in which they first came, by those of this process.
#[derive(Debug, Clone, Default)]
struct Numbers {
    known: Vec<u32>,
    last: u32,
}

impl Numbers {
    /// Returns the number that stands for one of this process, and whether it is new.
    #[inline]
    fn number(&mut self, number: u32) -> (u32, bool) {
        match self.known.get(number as usize) {
            Some(&known) if known != 0 => (known, false),
            _ if number == 0 => (0, false),
            _ => (self.add(number), true),
        }
    }

    #[cold]
    fn add(&mut self, number: u32) -> u32 {
        let place = number as usize;
        if self.known.len() <= place {
            self.known.resize(place + 1, 0);
        }
        self.last += 1;
        self.known[place] = self.last;
        self.last
    }
}

impl Digest {
    /// Adds events.
    pub fn add_events(&mut self, events: &[Event]) {
        self.count += events.len() as u64;
        let mut left = events;
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(BATCH - self.waiting.len()));
            for event in now {
                let bytes = self.named(event).to_bytes();
                self.waiting.push(bytes);
            }
            if self.waiting.len() == BATCH {
                self.events.update(self.waiting.as_flattened());
                self.waiting.clear();
            }
            left = later;
        }
    }

    /// Returns an event with numbers that mean the same everywhere.
    #[inline]
    fn named(&mut self, event: &Event) -> Event {
        // Numbers without a name mean nothing.
        let (symbol, is_new) = self.symbols.number(event.symbol.0);
        if is_new {
            self.name(1, 0, event.symbol.name());
        }
        let (source, is_new) = self.sources.number(event.source_id.0.into());
        if is_new {
            self.name(2, 0, event.source_id.name());
        }
        let event_type = event.event_type;
        if !std::mem::replace(&mut self.has_type[usize::from(event_type.0)], true) {
            self.name(3, event_type.0, event_type.name());
        }
        // There are fewer sources than a source has numbers.
        let (symbol, source_id) = (Symbol(symbol), SourceId(source as u16));
        Event { symbol, source_id, ..event.with_replayed(false) }
    }

    #[cold]
    fn name(&mut self, table: u8, code: u8, name: Option<&str>) {
        let name = name.unwrap_or_default();
        self.names.update(&[table, code]);
        // Names have a few hundred bytes at most.
        self.names.update(&(name.len() as u16).to_le_bytes());
        self.names.update(name.as_bytes());
    }

    /// Adds an object.
    pub fn add_object(&mut self, object: &Object<'_>) {
        self.objects.update(&self.count.to_le_bytes());
        self.objects.update(&object.timestamp.to_le_bytes());
        self.objects.update(&object.version.to_le_bytes());
        let topic = object.topic.unwrap_or_default();
        for part in [topic.as_bytes(), object.schema.as_bytes(), object.bytes] {
            // A record has a mebibyte at most.
            self.objects.update(&(part.len() as u32).to_le_bytes());
            self.objects.update(part);
        }
    }

    /// Returns the 32 bytes of the digest.
    pub fn finish(&self) -> [u8; 32] {
        let mut all = Hasher::new();
        let mut events = self.events.clone();
        events.update(self.waiting.as_flattened());
        for part in [&events, &self.names, &self.objects] {
            all.update(part.finalize().as_bytes());
        }
        *all.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_type::EventType;
    use proptest::prelude::*;

    fn event(symbol: u32, source: u16, code: u8, metadata: u64) -> Event {
        Event {
            symbol: Symbol(symbol),
            source_id: SourceId(source),
            event_type: EventType(code),
            metadata,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    fn digest(events: &[Event]) -> [u8; 32] {
        let mut digest = Digest::default();
        digest.add_events(events);
        digest.finish()
    }

    #[test]
    fn the_numbers_of_the_process_do_not_matter_but_the_names_do() {
        let [one, other] =
            ["DIGEST.ONE", "DIGEST.OTHER"].map(|name| Symbol::new(name).expect("a name").0);
        let twice = [event(one, 0, 0, 1), event(one, 0, 0, 2)];
        let mixed = [event(one, 0, 0, 1), event(other, 0, 0, 2)];
        let swapped = [event(other, 0, 0, 1), event(one, 0, 0, 2)];
        assert_ne!(digest(&twice), digest(&mixed));
        assert_ne!(digest(&mixed), digest(&swapped), "the names come in another order");
        let mut by_hand = Digest::default();
        let numbered = [event(1, 0, 0, 1), event(2, 0, 0, 2)].map(|event| event.to_bytes());
        by_hand.events.update(numbered.as_flattened());
        by_hand.names.update(b"\x01\x00\x0a\x00DIGEST.ONE\x03\x00\x0c\x00price_update");
        by_hand.names.update(b"\x01\x00\x0c\x00DIGEST.OTHER");
        assert_eq!(digest(&mixed), by_hand.finish());
    }

    proptest! {
        #[test]
        fn every_byte_of_an_event_is_in_it_but_how_it_was_published(
            bytes: [u8; EVENT_BYTES], at in 0..EVENT_BYTES, by in 1..=u8::MAX,
        ) {
            let named = |bytes| Event { symbol: Symbol(0), source_id: SourceId(0), ..Event::from_bytes(bytes) };
            let (event, mut other) = (named(bytes), bytes);
            other[at] ^= by;
            let other = named(other);
            let is_alike = event.with_replayed(false) == other.with_replayed(false);
            prop_assert_eq!(digest(&[event]) == digest(&[other]), is_alike);
        }

        #[test]
        fn it_is_the_same_in_whatever_parts_it_is_added(
            parts in prop::collection::vec((0_u64..3, 0_usize..600), 0..6),
        ) {
            let object = |number| Object {
                timestamp: number, topic: Some("a.b"), schema: "s", version: 1, bytes: b"x", is_replayed: false,
            };
            let (mut whole, mut split) = (Digest::default(), Digest::default());
            for &(objects, events) in &parts {
                (0..objects).for_each(|number| {
                    whole.add_object(&object(number));
                    split.add_object(&object(number));
                });
                let events: Vec<_> = (0..events as u64).map(|n| event(0, 0, 0, n)).collect();
                whole.add_events(&events);
                events.iter().for_each(|event| split.add_events(std::slice::from_ref(event)));
            }
            prop_assert_eq!(whole.finish(), split.finish());
        }
    }

    #[test]
    fn the_parts_of_an_object_and_its_place_are_told_apart() {
        let object = |topic, schema, bytes| Object {
            timestamp: 1,
            topic,
            schema,
            version: 1,
            bytes,
            is_replayed: false,
        };
        let digest = |object: Object<'_>, before: usize| {
            let mut digest = Digest::default();
            digest.add_events(&vec![event(0, 0, 0, 7); before]);
            digest.add_object(&object);
            digest.add_events(&vec![event(0, 0, 0, 7); 2 - before]);
            digest.finish()
        };
        let all = [
            digest(object(Some("ab"), "c", b"d"), 0),
            digest(object(Some("a"), "bc", b"d"), 0),
            digest(object(None, "abc", b"d"), 0),
            digest(object(Some("ab"), "cd", b""), 0),
            digest(object(Some("ab"), "c", b"d"), 1),
            digest(Object { version: 2, ..object(Some("ab"), "c", b"d") }, 0),
            digest(Object { timestamp: 2, ..object(Some("ab"), "c", b"d") }, 0),
        ];
        for (place, one) in all.iter().enumerate() {
            assert!(all[..place].iter().all(|other| other != one), "{place} is another one");
        }
        let replayed = Object { is_replayed: true, ..object(Some("ab"), "c", b"d") };
        assert_eq!(digest(replayed, 0), all[0], "how it came into the log does not matter");
    }
}
