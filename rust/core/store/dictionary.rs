//! Numbers and their names: what a writer defines in each segment, and what a reader makes of it.
//!
//! Numbers of symbols, sources and event types are those of the process that wrote the segment;
//! numbers of topics and schemas are those of the log in that process. A reader translates
//! all of them into its own.

use super::error::StoreError;
use super::format::{FRAME_HEADER, MAX_PAYLOAD, padded, u16_at, u32_at};
use crate::event::Event;
use crate::event_type::EventType;
use crate::names::{SourceId, Symbol};
use std::collections::HashMap;

/// What a number is a number of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Table {
    Symbol = 1,
    Source = 2,
    EventType = 3,
    Topic = 4,
    Schema = 5,
}

/// Bytes of a definition before its name.
const DEFINITION_HEAD: usize = 8;

/// Names that only this log numbers, from 1 on.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    known: HashMap<Box<[u8]>, u32>,
    in_order: Vec<Box<[u8]>>,
}

impl Numbers {
    /// Returns the number of a name.
    pub(crate) fn number(&mut self, name: &[u8]) -> u32 {
        if let Some(&number) = self.known.get(name) {
            return number;
        }
        self.in_order.push(name.into());
        let number = self.in_order.len() as u32;
        self.known.insert(name.into(), number);
        number
    }
}

/// The names of all that a log numbers by itself.
#[derive(Debug, Default)]
pub(crate) struct LogNames {
    pub(crate) topics: Numbers,
    /// Each with its version before it.
    pub(crate) schemas: Numbers,
}

impl LogNames {
    /// Returns the number of a schema.
    pub(crate) fn schema(&mut self, name: &str, version: u32) -> u32 {
        self.schemas.number(&[&version.to_le_bytes(), name.as_bytes()].concat())
    }
}

/// How far the names are defined in a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Defined {
    symbols: u32,
    sources: u32,
    registrations: u64,
    topics: u32,
    schemas: u32,
}

impl Defined {
    /// Returns how far they have to be for whatever can be stored now.
    #[inline]
    pub(crate) fn now(names: &LogNames) -> Self {
        Self {
            symbols: Symbol::table().len() as u32,
            sources: SourceId::table().len() as u32,
            registrations: EventType::registrations(),
            topics: names.topics.in_order.len() as u32,
            schemas: names.schemas.in_order.len() as u32,
        }
    }

    /// Returns the bytes of the frames of [`Defined::payloads_until`].
    pub(crate) fn bytes_until(&self, now: &Self, names: &LogNames) -> usize {
        let payloads = self.payloads_until(now, names);
        payloads.iter().map(|payload| FRAME_HEADER + padded(payload.len())).sum()
    }

    /// Returns the payloads of frames that define what lies between `self` and `now`.
    pub(crate) fn payloads_until(&self, now: &Self, names: &LogNames) -> Vec<Vec<u8>> {
        let mut payloads: Vec<Vec<u8>> = Vec::new();
        let mut define = |table: Table, number: u32, name: &[u8]| {
            let is_full =
                |payload: &Vec<u8>| payload.len() + DEFINITION_HEAD + name.len() > MAX_PAYLOAD;
            if payloads.last().is_none_or(is_full) {
                payloads.push(Vec::new());
            }
            if let Some(payload) = payloads.last_mut() {
                payload.extend([table as u8, 0]);
                // Names have a few hundred bytes at most.
                payload.extend((name.len() as u16).to_le_bytes());
                payload.extend(number.to_le_bytes());
                payload.extend(name);
            }
        };
        for number in self.symbols + 1..=now.symbols {
            if let Some(name) = Symbol(number).name() {
                define(Table::Symbol, number, name.as_bytes());
            }
        }
        for number in self.sources + 1..=now.sources {
            if let Some(name) = SourceId(number as u16).name() {
                define(Table::Source, number, name.as_bytes());
            }
        }
        if self.registrations < now.registrations {
            // Which are new is not known; a definition may be there twice if it says the same.
            for event_type in EventType::registered() {
                let name = event_type.name().unwrap_or_default();
                define(Table::EventType, event_type.0.into(), name.as_bytes());
            }
        }
        for (table, numbers, from) in [
            (Table::Topic, &names.topics, self.topics),
            (Table::Schema, &names.schemas, self.schemas),
        ] {
            for (place, name) in numbers.in_order.iter().enumerate().skip(from as usize) {
                define(table, place as u32 + 1, name);
            }
        }
        payloads
    }
}

/// What the numbers of a segment mean in this process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Translation {
    symbols: Vec<u32>,
    sources: Vec<u32>,
    /// Numbers mean what they mean here.
    is_identity: bool,
    /// Some definitions are missing.
    has_holes: bool,
    topics: Vec<Option<Box<str>>>,
    schemas: Vec<Option<(Box<str>, u32)>>,
}

impl Translation {
    pub(crate) fn new() -> Self {
        Self { is_identity: true, ..Self::default() }
    }

    /// Returns one for a segment that is damaged.
    pub(crate) fn with_holes() -> Self {
        Self { has_holes: true, ..Self::new() }
    }

    /// Returns whether the names of an event are defined.
    pub(crate) fn defines(&self, event: &Event) -> bool {
        let is_defined = |numbers: &[u32], number: usize| {
            number == 0 || numbers.get(number).is_some_and(|known| *known != 0)
        };
        is_defined(&self.symbols, event.symbol.0 as usize)
            && is_defined(&self.sources, event.source_id.0.into())
    }

    /// Takes definitions over. `None` in the place of the error: they are no definitions.
    pub(crate) fn define(&mut self, mut payload: &[u8]) -> Result<(), Option<StoreError>> {
        while !payload.is_empty() {
            if payload.len() < DEFINITION_HEAD {
                return Err(None);
            }
            let (table, number) = (payload[0], u32_at(payload, 4));
            let end = DEFINITION_HEAD + usize::from(u16_at(payload, 2));
            let name = payload.get(DEFINITION_HEAD..end).ok_or(None)?;
            payload = &payload[end..];
            let (version, name) = match table == Table::Schema as u8 {
                true if name.len() < 4 => return Err(None),
                true => (u32_at(name, 0), &name[4..]),
                false => (0, name),
            };
            let name = std::str::from_utf8(name).map_err(|_| None)?;
            self.define_one(table, number, name, version)?;
        }
        Ok(())
    }

    fn define_one(
        &mut self,
        table: u8,
        number: u32,
        name: &str,
        version: u32,
    ) -> Result<(), Option<StoreError>> {
        let refused = |error| Some(StoreError::Name(error));
        match table {
            1 => {
                let symbol = Symbol::new(name).map_err(refused)?.0;
                self.is_identity &= symbol == number;
                put(&mut self.symbols, number, symbol, self.has_holes)?;
            }
            2 => {
                let source = SourceId::new(name).map_err(refused)?.0.into();
                self.is_identity &= source == number;
                put(&mut self.sources, number, source, self.has_holes)?;
            }
            3 => {
                let code = u8::try_from(number).map_err(|_| None)?;
                EventType::register(name, code).map_err(|error| Some(error.into()))?;
            }
            4 => put(&mut self.topics, number, Some(name.into()), self.has_holes)?,
            5 => put(&mut self.schemas, number, Some((name.into(), version)), self.has_holes)?,
            _ => return Err(None),
        }
        Ok(())
    }

    /// Returns whether events have no number behind those that are defined.
    fn reaches(&self, events: &[Event]) -> bool {
        let last = |numbers: &[u32]| numbers.len().max(1) as u32 - 1;
        let (last_symbol, last_source) = (last(&self.symbols), last(&self.sources));
        // No number is larger than all of their bits together, which take the least time to find.
        let together = |(symbols, sources), event: &Event| {
            (symbols | event.symbol.0, sources | event.source_id.0)
        };
        let (symbols, sources) = events.iter().fold((0, 0), together);
        let is_larger = |event: &Event| {
            event.symbol.0 > last_symbol || u32::from(event.source_id.0) > last_source
        };
        let is_within = symbols <= last_symbol && u32::from(sources) <= last_source;
        is_within || !events.iter().any(is_larger)
    }

    /// Gives events the numbers of this process.
    pub(crate) fn translate(&self, events: &mut [Event]) {
        // Numbers that nobody defined mean nothing, whatever they are here.
        if self.is_identity && self.reaches(events) {
            return;
        }
        for event in events {
            let symbol = self.symbols.get(event.symbol.0 as usize).copied().unwrap_or_default();
            event.symbol = Symbol(symbol);
            let source = self.sources.get(usize::from(event.source_id.0)).copied();
            event.source_id = SourceId(source.unwrap_or_default() as u16);
        }
    }

    /// Returns the numbers that stand for a symbol in the segment.
    pub(crate) fn numbers_of(&self, symbol: Symbol) -> impl Iterator<Item = usize> + '_ {
        let all = self.symbols.iter().enumerate();
        all.filter(move |(_, known)| **known == symbol.0).map(|(number, _)| number)
    }

    pub(crate) fn topic(&self, number: u32) -> Option<&str> {
        self.topics.get(number as usize)?.as_deref()
    }

    pub(crate) fn schema(&self, number: u32) -> Option<(&str, u32)> {
        self.schemas.get(number as usize)?.as_ref().map(|(name, version)| (&**name, *version))
    }
}

/// Numbers that may be missing before one that is defined.
const MOST_MISSING: usize = 1 << 16;

/// Puts what a number means into its place: numbers are defined in order, from 1 on, unless definitions
/// are missing or there twice.
fn put<V: Default>(
    values: &mut Vec<V>,
    number: u32,
    value: V,
    has_holes: bool,
) -> Result<(), Option<StoreError>> {
    if values.is_empty() {
        values.push(V::default());
    }
    let number = number as usize;
    if has_holes && number > 0 && number <= values.len() + MOST_MISSING {
        if number >= values.len() {
            values.resize_with(number + 1, V::default);
        }
        values[number] = value;
        return Ok(());
    }
    if number != values.len() {
        return Err(None);
    }
    values.push(value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Defined, LogNames, Translation};
    use crate::event::{EVENT_BYTES, Event};
    use crate::names::{SourceId, Symbol};

    #[test]
    fn numbers_mean_what_is_defined_and_those_that_nobody_defined_mean_nothing() {
        let symbols =
            ["BTCUSDT", "ETHUSDT", "SOLUSDT"].map(|name| Symbol::new(name).expect("a name"));
        let source = SourceId::new("feed").expect("a name");
        let mut names = Translation::new();
        let now = Defined::now(&LogNames::default());
        for payload in Defined::default().payloads_until(&now, &LogNames::default()) {
            names.define(&payload).expect("they are definitions");
        }
        let with =
            |symbol, source_id| Event { symbol, source_id, ..Event::from_bytes([0; EVENT_BYTES]) };
        let known: Vec<_> = symbols.map(|symbol| with(symbol, source)).into();
        let (no_symbol, no_source) = (Symbol(now.symbols + 1), SourceId(now.sources as u16 + 1));
        let unknown = [
            with(no_symbol, source),
            with(symbols[0], no_source),
            with(Symbol(u32::MAX), SourceId(u16::MAX)),
        ];
        let meant = [
            with(Symbol::NONE, source),
            with(symbols[0], SourceId::NONE),
            with(Symbol::NONE, SourceId::NONE),
        ];
        // Wherever it stands among others.
        for place in 0..=known.len() {
            for (unknown, meant) in unknown.iter().zip(meant) {
                let (mut events, mut expected) = (known.clone(), known.clone());
                events.insert(place, *unknown);
                expected.insert(place, meant);
                names.translate(&mut events);
                assert_eq!(events, expected);
            }
        }
        let mut events = known.clone();
        names.translate(&mut events);
        assert_eq!(events, known);
        Translation::new().translate(&mut events);
        assert!(events.iter().all(|event| *event == with(Symbol::NONE, SourceId::NONE)));
    }
}
