//! What the ledger says: everything that was decided, one entry after another.
//!
//! An entry is an object of the schema [`SCHEMA`]: a byte that says which one it is, and its fields in
//! order: numbers little-endian, texts with their length in 4 bytes before them.

use crate::store::{Object, StoreError};
use std::sync::Arc;

/// The schema of an entry, and the version of this one.
pub(crate) const SCHEMA: &str = "tickbus.delivery";
pub(crate) const VERSION: u32 = 1;

/// A group of consumers of a log, by its number. Numbers are never used again.
pub(crate) type GroupId = u32;
/// A consumer of risk events, by its number. Numbers are never used again.
pub(crate) type ConsumerId = u32;
/// In the place of a consumer where there is none.
pub(crate) const NOBODY: ConsumerId = 0;

/// An attempt that failed, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedAttempt {
    /// Its number, from 1.
    pub attempt: u32,
    /// What the consumer said, or what happened instead.
    pub reason: Arc<str>,
}

/// Something that was decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// What follows says all that is known, up to `SnapshotEnded`.
    SnapshotBegun {
        next_group: GroupId,
        next_consumer: ConsumerId,
        published: Option<u64>,
    },
    SnapshotEnded,
    /// Everything below `cursor` is done. Times are in nanoseconds since the Unix epoch.
    GroupRegistered {
        group: GroupId,
        name: Arc<str>,
        cursor: u64,
        max_idle: Option<u64>,
        at: u64,
        is_expired: bool,
    },
    GroupDone {
        group: GroupId,
        from: u64,
        end: u64,
        at: u64,
    },
    GroupExpired {
        group: GroupId,
    },
    GroupRemoved {
        group: GroupId,
    },
    ConsumerRegistered {
        consumer: ConsumerId,
        name: Arc<str>,
        is_ordered: bool,
    },
    ConsumerRemoved {
        consumer: ConsumerId,
    },
    /// For all consumers that there are.
    Published {
        id: u64,
        key: Option<Arc<str>>,
    },
    AttemptBegun {
        consumer: ConsumerId,
        id: u64,
        attempt: u32,
    },
    Acked {
        consumer: ConsumerId,
        id: u64,
    },
    Failed {
        consumer: ConsumerId,
        id: u64,
        failed: FailedAttempt,
    },
    Escalated {
        consumer: ConsumerId,
        id: u64,
    },
    DeadLettered {
        consumer: ConsumerId,
        id: u64,
        reason: Arc<str>,
    },
    /// To its consumer, or to all that there are if it has none.
    Redelivered {
        consumer: ConsumerId,
        id: u64,
    },
    Discarded {
        consumer: ConsumerId,
        id: u64,
    },
    /// In snapshots: an event that a consumer has not acknowledged.
    Pending {
        consumer: ConsumerId,
        id: u64,
        key: Option<Arc<str>>,
        attempts: u32,
        history: Vec<FailedAttempt>,
    },
    /// In snapshots: a dead letter.
    Letter {
        consumer: ConsumerId,
        id: u64,
        key: Option<Arc<str>>,
        reason: Arc<str>,
        history: Vec<FailedAttempt>,
    },
}

/// Writes fields one after another.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn of(tag: u8) -> Self {
        Self(vec![tag])
    }

    fn long(mut self, number: u64) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn int(mut self, number: u32) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn flag(mut self, flag: bool) -> Self {
        self.0.push(flag.into());
        self
    }

    fn text(self, text: &str) -> Self {
        let mut fields = self.int(text.len() as u32);
        fields.0.extend(text.as_bytes());
        fields
    }

    fn option<T>(self, value: Option<T>, write: impl FnOnce(Self, T) -> Self) -> Self {
        let fields = self.flag(value.is_some());
        match value {
            Some(value) => write(fields, value),
            None => fields,
        }
    }

    fn failed(self, FailedAttempt { attempt, reason }: &FailedAttempt) -> Self {
        self.int(*attempt).text(reason)
    }

    fn history(self, history: &[FailedAttempt]) -> Self {
        history.iter().fold(self.int(history.len() as u32), Self::failed)
    }
}

/// Reads fields one after another; `None` is the end.
struct Reading<'a>(&'a [u8]);

impl Reading<'_> {
    fn bytes(&mut self, count: usize) -> Option<&[u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn long(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }

    fn int(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(4)?.try_into().ok()?))
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.bytes(1)?[0] == 1)
    }

    fn text(&mut self) -> Option<Arc<str>> {
        let count = self.int()? as usize;
        Some(std::str::from_utf8(self.bytes(count)?).ok()?.into())
    }

    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.flag()? {
            true => read(self).map(Some),
            false => Some(None),
        }
    }

    fn failed(&mut self) -> Option<FailedAttempt> {
        Some(FailedAttempt { attempt: self.int()?, reason: self.text()? })
    }

    fn history(&mut self) -> Option<Vec<FailedAttempt>> {
        (0..self.int()?).map(|_| self.failed()).collect()
    }
}

impl Entry {
    /// Returns its bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let fields = match self {
            Self::SnapshotBegun { next_group, next_consumer, published } => {
                let fields = Fields::of(1).int(*next_group).int(*next_consumer);
                fields.option(*published, Fields::long)
            }
            Self::SnapshotEnded => Fields::of(2),
            Self::GroupRegistered { group, name, cursor, max_idle, at, is_expired } => {
                let fields = Fields::of(3).int(*group).text(name).long(*cursor);
                fields.option(*max_idle, Fields::long).long(*at).flag(*is_expired)
            }
            Self::GroupDone { group, from, end, at } => {
                Fields::of(4).int(*group).long(*from).long(*end).long(*at)
            }
            Self::GroupExpired { group } => Fields::of(5).int(*group),
            Self::GroupRemoved { group } => Fields::of(6).int(*group),
            Self::ConsumerRegistered { consumer, name, is_ordered } => {
                Fields::of(7).int(*consumer).text(name).flag(*is_ordered)
            }
            Self::ConsumerRemoved { consumer } => Fields::of(8).int(*consumer),
            Self::Published { id, key } => {
                Fields::of(9).long(*id).option(key.as_deref(), Fields::text)
            }
            Self::AttemptBegun { consumer, id, attempt } => {
                Fields::of(10).int(*consumer).long(*id).int(*attempt)
            }
            Self::Acked { consumer, id } => Fields::of(11).int(*consumer).long(*id),
            Self::Failed { consumer, id, failed } => {
                Fields::of(12).int(*consumer).long(*id).failed(failed)
            }
            Self::Escalated { consumer, id } => Fields::of(13).int(*consumer).long(*id),
            Self::DeadLettered { consumer, id, reason } => {
                Fields::of(14).int(*consumer).long(*id).text(reason)
            }
            Self::Redelivered { consumer, id } => Fields::of(15).int(*consumer).long(*id),
            Self::Discarded { consumer, id } => Fields::of(16).int(*consumer).long(*id),
            Self::Pending { consumer, id, key, attempts, history } => {
                let fields = Fields::of(17).int(*consumer).long(*id);
                fields.option(key.as_deref(), Fields::text).int(*attempts).history(history)
            }
            Self::Letter { consumer, id, key, reason, history } => {
                let fields = Fields::of(18).int(*consumer).long(*id);
                fields.option(key.as_deref(), Fields::text).text(reason).history(history)
            }
        };
        fields.0
    }

    /// Returns the entry with these bytes.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        let mut fields = Reading(rest);
        let f = &mut fields;
        let entry = match tag {
            1 => Self::SnapshotBegun {
                next_group: f.int()?,
                next_consumer: f.int()?,
                published: f.option(Reading::long)?,
            },
            2 => Self::SnapshotEnded,
            3 => Self::GroupRegistered {
                group: f.int()?,
                name: f.text()?,
                cursor: f.long()?,
                max_idle: f.option(Reading::long)?,
                at: f.long()?,
                is_expired: f.flag()?,
            },
            4 => {
                Self::GroupDone { group: f.int()?, from: f.long()?, end: f.long()?, at: f.long()? }
            }
            5 => Self::GroupExpired { group: f.int()? },
            6 => Self::GroupRemoved { group: f.int()? },
            7 => Self::ConsumerRegistered {
                consumer: f.int()?,
                name: f.text()?,
                is_ordered: f.flag()?,
            },
            8 => Self::ConsumerRemoved { consumer: f.int()? },
            9 => Self::Published { id: f.long()?, key: f.option(Reading::text)? },
            10 => Self::AttemptBegun { consumer: f.int()?, id: f.long()?, attempt: f.int()? },
            11 => Self::Acked { consumer: f.int()?, id: f.long()? },
            12 => Self::Failed { consumer: f.int()?, id: f.long()?, failed: f.failed()? },
            13 => Self::Escalated { consumer: f.int()?, id: f.long()? },
            14 => Self::DeadLettered { consumer: f.int()?, id: f.long()?, reason: f.text()? },
            15 => Self::Redelivered { consumer: f.int()?, id: f.long()? },
            16 => Self::Discarded { consumer: f.int()?, id: f.long()? },
            17 => Self::Pending {
                consumer: f.int()?,
                id: f.long()?,
                key: f.option(Reading::text)?,
                attempts: f.int()?,
                history: f.history()?,
            },
            18 => Self::Letter {
                consumer: f.int()?,
                id: f.long()?,
                key: f.option(Reading::text)?,
                reason: f.text()?,
                history: f.history()?,
            },
            _ => return None,
        };
        fields.0.is_empty().then_some(entry)
    }

    /// Returns the entry that an object of the ledger is.
    pub(crate) fn of(object: &Object<'_>, sequence: u64) -> Result<Self, StoreError> {
        let is_known = object.schema == SCHEMA && object.version == VERSION;
        let entry = is_known.then(|| Self::decode(object.bytes)).flatten();
        entry.ok_or_else(|| unknown(sequence))
    }
}

/// Returns the error of a record that is none of this version's.
pub(crate) fn unknown(sequence: u64) -> StoreError {
    StoreError::Corrupt {
        segment: "of the groups' ledger".to_owned(),
        offset: 0,
        sequence,
        expected: "an entry that this version knows",
    }
}

/// Returns one of each entry.
#[cfg(any(test, tickbus_fuzz))]
fn one_of_each() -> Vec<Entry> {
    let failed = FailedAttempt { attempt: 2, reason: "why".into() };
    let history = vec![failed.clone(), FailedAttempt { attempt: 3, reason: "".into() }];
    let (consumer, id, key, name) = (3, 1 << 40, Some("account 7".into()), "risk".into());
    vec![
        Entry::SnapshotBegun { next_group: 4, next_consumer: 9, published: Some(7) },
        Entry::SnapshotEnded,
        Entry::GroupRegistered {
            group: 1,
            name,
            cursor: 5,
            max_idle: Some(8),
            at: 9,
            is_expired: true,
        },
        Entry::GroupDone { group: 1, from: 2, end: 3, at: 4 },
        Entry::GroupExpired { group: 1 },
        Entry::GroupRemoved { group: 1 },
        Entry::ConsumerRegistered { consumer, name: "näme".into(), is_ordered: true },
        Entry::ConsumerRemoved { consumer },
        Entry::Published { id, key: None },
        Entry::Published { id, key: key.clone() },
        Entry::AttemptBegun { consumer, id, attempt: 1 },
        Entry::Acked { consumer, id },
        Entry::Failed { consumer, id, failed },
        Entry::Escalated { consumer, id },
        Entry::DeadLettered { consumer, id, reason: "enough".into() },
        Entry::Redelivered { consumer, id },
        Entry::Discarded { consumer, id },
        Entry::Pending { consumer, id, key, attempts: 3, history: history.clone() },
        Entry::Letter { consumer, id, key: None, reason: "enough".into(), history },
    ]
}

/// Returns the bytes of one of each entry of a ledger.
#[cfg(tickbus_fuzz)]
pub fn real_entries() -> Vec<Vec<u8>> {
    one_of_each().iter().map(Entry::encode).collect()
}

/// Reads any bytes as an entry of a ledger.
///
/// # Panics
///
/// They are read as an entry that is written as others.
#[cfg(tickbus_fuzz)]
pub fn look_at_any_entry(bytes: &[u8]) {
    if let Some(entry) = Entry::decode(bytes) {
        assert_eq!(Entry::decode(&entry.encode()), Some(entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_is_read_as_it_was_written_and_no_part_of_it_is_taken_for_one() {
        for entry in one_of_each() {
            let bytes = entry.encode();
            for count in 0..bytes.len() {
                assert_eq!(Entry::decode(&bytes[..count]), None, "{count} bytes of {entry:?}");
            }
            assert_eq!(Entry::decode(&[&*bytes, &[0]].concat()), None, "{entry:?} and a byte");
            assert_eq!(Entry::decode(&bytes), Some(entry));
        }
        assert_eq!(Entry::decode(&[99]), None);
    }
}
