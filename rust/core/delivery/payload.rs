//! A record of a log, taken out of it.

use crate::event::Event;
use crate::store::{Batch, NewRecords, Object, Records};

/// An object, taken out of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredObject {
    /// When it happened: nanoseconds since the Unix epoch, UTC. 0 is unknown.
    pub timestamp: u64,
    /// The topic it was published to.
    pub topic: Option<String>,
    /// What the bytes are.
    pub schema: String,
    /// Which version of that.
    pub version: u32,
    /// The object.
    pub bytes: Vec<u8>,
}

/// A risk event: one event, or an object.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Payload {
    /// An event.
    Event(Event),
    /// An object.
    Object(StoredObject),
}

impl Payload {
    /// Returns it as what can be appended.
    pub(crate) fn record(&self) -> NewRecords<'_> {
        match self {
            Self::Event(event) => NewRecords::Events(std::slice::from_ref(event)),
            Self::Object(object) => NewRecords::Object(Object {
                timestamp: object.timestamp,
                topic: object.topic.as_deref(),
                schema: &object.schema,
                version: object.version,
                bytes: &object.bytes,
                is_replayed: false,
            }),
        }
    }

    /// Returns the first record of a batch; `None` if it stands for records that are missing.
    pub(crate) fn first(batch: &Batch<'_>) -> Option<Self> {
        match &batch.records {
            Records::Events(events) => events.first().copied().map(Self::Event),
            Records::Objects(objects) => objects.iter().next().map(|object| {
                Self::Object(StoredObject {
                    timestamp: object.timestamp,
                    topic: object.topic.map(str::to_owned),
                    schema: object.schema.to_owned(),
                    version: object.version,
                    bytes: object.bytes.to_vec(),
                })
            }),
            Records::Gap(_) => None,
        }
    }
}
