//! What was replayed, as one number: equal for equal events in equal order, whatever process replays
//! them and however fast.
//!
//! docs/format.md has the bytes: three hashes, of the events, of the names of the numbers in them, and of
//! the objects. Numbers of this process, places in the log and segments are not in it. It tells replays
//! apart, but nobody who makes up events is kept from making up two that have the same.

use super::log::Object;
use crate::event::{EVENT_BYTES, Event};
use crate::names::{SourceId, Symbol};
use std::fmt;
use twox_hash::xxhash3_128::Hasher;

/// Events that are hashed at once: as many as stay in the cache of a core until they are.
const BATCH: usize = 256;

/// The digest of what was replayed so far.
#[derive(Clone)]
pub struct Digest {
    events: Hasher,
    names: Hasher,
    objects: Hasher,
    count: u64,
    symbols: Numbers,
    sources: Numbers,
    has_type: [bool; 256],
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Digest").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Default for Digest {
    fn default() -> Self {
        Self {
            events: Hasher::new(),
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
#[derive(Debug, Clone)]
struct Numbers {
    known: Vec<u32>,
    last: u32,
    /// Each of this process up to the last one stands for itself.
    is_identity: bool,
}

impl Default for Numbers {
    fn default() -> Self {
        Self { known: Vec::new(), last: 0, is_identity: true }
    }
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
        self.is_identity &= self.last == number;
        self.last
    }
}

impl Digest {
    /// Adds events.
    pub fn add_events(&mut self, events: &[Event]) {
        self.count += events.len() as u64;
        let mut named = [[0; EVENT_BYTES]; BATCH];
        for part in events.chunks(BATCH) {
            if self.is_named(part) {
                self.events.write(bytemuck::cast_slice(part));
                continue;
            }
            let named = &mut named[..part.len()];
            for (bytes, event) in named.iter_mut().zip(part) {
                *bytes = self.named(event).to_bytes();
            }
            self.events.write(named.as_flattened());
        }
    }

    /// Returns whether events are hashed as they lie in memory, as those are that a process reads that
    /// has read nothing else.
    fn is_named(&self, events: &[Event]) -> bool {
        let (symbols, sources) = (&self.symbols, &self.sources);
        cfg!(target_endian = "little")
            && symbols.is_identity
            && sources.is_identity
            && events.iter().fold(true, |all, event| {
                all & (event.symbol.0 <= symbols.last)
                    & (u32::from(event.source_id.0) <= sources.last)
                    & self.has_type[usize::from(event.event_type.0)]
                    & !event.is_replayed()
            })
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
        if !self.has_type[usize::from(event_type.0)] {
            self.has_type[usize::from(event_type.0)] = true;
            self.name(3, event_type.0, event_type.name());
        }
        // There are fewer sources than a source has numbers.
        let (symbol, source_id) = (Symbol(symbol), SourceId(source as u16));
        Event { symbol, source_id, ..event.with_replayed(false) }
    }

    #[cold]
    fn name(&mut self, table: u8, code: u8, name: Option<&str>) {
        let name = name.unwrap_or_default();
        self.names.write(&[table, code]);
        // Names have a few hundred bytes at most.
        self.names.write(&(name.len() as u16).to_le_bytes());
        self.names.write(name.as_bytes());
    }

    /// Adds an object.
    pub fn add_object(&mut self, object: &Object<'_>) {
        self.objects.write(&self.count.to_le_bytes());
        self.objects.write(&object.timestamp.to_le_bytes());
        self.objects.write(&object.version.to_le_bytes());
        let topic = object.topic.unwrap_or_default();
        for part in [topic.as_bytes(), object.schema.as_bytes(), object.bytes] {
            // A record has a mebibyte at most.
            self.objects.write(&(part.len() as u32).to_le_bytes());
            self.objects.write(part);
        }
    }

    /// Returns the 16 bytes of the digest.
    pub fn finish(&self) -> [u8; 16] {
        let mut all = Hasher::new();
        for part in [&self.events, &self.names, &self.objects] {
            all.write(&canonical(part));
        }
        canonical(&all)
    }
}

/// Returns a hash as it is written: the highest byte first.
fn canonical(hasher: &Hasher) -> [u8; 16] {
    hasher.finish_128().to_be_bytes()
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

    fn digest(events: &[Event]) -> [u8; 16] {
        let mut digest = Digest::default();
        digest.add_events(events);
        digest.finish()
    }

    /// Returns the digest of events by the words of docs/format.md.
    fn by_the_format(events: &[Event]) -> [u8; 16] {
        let (mut hashed, mut names) = (Vec::new(), Vec::new());
        let mut seen: [Vec<u32>; 3] = Default::default();
        for event in events {
            let numbers = [event.symbol.0, event.source_id.0.into(), event.event_type.0.into()];
            let texts = [event.symbol.name(), event.source_id.name(), event.event_type.name()];
            for (table, (number, text)) in numbers.into_iter().zip(texts).enumerate() {
                if seen[table].contains(&number) || (number == 0 && table < 2) {
                    continue;
                }
                seen[table].push(number);
                let (code, text) = (if table == 2 { number as u8 } else { 0 }, text.unwrap_or(""));
                names.extend([table as u8 + 1, code, text.len() as u8, 0]);
                names.extend(text.bytes());
            }
            let place = |table: usize| {
                let seen: &[u32] = &seen[table];
                seen.iter().position(|number| *number == numbers[table]).map_or(0, |at| at + 1)
            };
            let mut bytes = event.to_bytes();
            bytes[9] &= 0x7f;
            bytes[10..12].copy_from_slice(&(place(1) as u16).to_le_bytes());
            bytes[12..16].copy_from_slice(&(place(0) as u32).to_le_bytes());
            hashed.extend(bytes);
        }
        let parts = [hashed, names, Vec::new()];
        let hash = |bytes: &[u8]| twox_hash::XxHash3_128::oneshot(bytes).to_be_bytes();
        hash(&parts.map(|part| hash(&part)).concat())
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
        by_hand.events.write(numbered.as_flattened());
        by_hand.names.write(b"\x01\x00\x0a\x00DIGEST.ONE\x03\x00\x0c\x00price_update");
        by_hand.names.write(b"\x01\x00\x0c\x00DIGEST.OTHER");
        assert_eq!(digest(&mixed), by_hand.finish());
    }

    #[test]
    fn the_digest_of_nothing_is_the_one_that_other_programs_compute() {
        // python3 -c 'import xxhash; h = xxhash.xxh3_128; print(h(h(b"").digest() * 3).hexdigest())'
        let hex: String =
            Digest::default().finish().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "886aa2170c0c1f38dd18fcb7edce35ba");
    }

    proptest! {
        #[test]
        fn its_bytes_are_those_of_the_format_whatever_numbers_the_process_has(
            rows in prop::collection::vec((0_u32..5, 0_u16..4, 0_u8..5, any::<u8>(), any::<u64>()), 0..600),
            is_in_order: bool, part in 1_usize..300,
        ) {
            // Then these numbers have names, whichever they are.
            (0..5).for_each(|name| {
                Symbol::new(&format!("DIGEST.{name}")).expect("a name");
            });
            (0..4).for_each(|name| {
                SourceId::new(&format!("digest-{name}")).expect("a name");
            });
            let (mut symbols, mut sources) = (0, 0);
            let events: Vec<_> = rows.into_iter().map(|(mut symbol, mut source, code, priority, metadata)| {
                if is_in_order {
                    (symbol, source) = (symbol.min(symbols + 1), source.min(sources + 1));
                    (symbols, sources) = (symbols.max(symbol), sources.max(source));
                }
                Event { priority: crate::event::Priority(priority), ..event(symbol, source, code, metadata) }
            }).collect();
            let mut digest = Digest::default();
            events.chunks(part).for_each(|events| digest.add_events(events));
            prop_assert_eq!(digest.finish(), by_the_format(&events));
        }

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
