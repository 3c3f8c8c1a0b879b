//! Compact events as columns, through the C data interface of Apache Arrow, which every reader of
//! Arrow takes without either side depending on the other.
//!
//! | column | type | |
//! |---|---|---|
//! | `timestamp` | timestamp in ns, UTC | null where it is unknown (0) |
//! | `event_type` | dictionary of text | null where the code has no name here |
//! | `event_type_code` | u8 | |
//! | `priority` | u8 | 0 normal, 1 high, 2 and more critical |
//! | `source`, `symbol` | dictionary of text | null where there is none, or it has no name here |
//! | `value` | f64 | |
//! | `metadata` | u64 | |
//!
//! Numbers of symbols and sources are left out: they mean nothing elsewhere.
//! Indices into dictionaries are signed, as the specification recommends.
//!
//! Source: <https://arrow.apache.org/docs/format/CDataInterface.html>.

use crate::error::TimestampError;
use crate::event::Event;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::hash::Hash;
use std::ptr;

/// The types of columns, `struct ArrowSchema` of the C data interface. Dropping it releases it,
/// unless a consumer has done so or moved it.
#[repr(C)]
pub struct ArrowSchema {
    format: *const c_char,
    name: *const c_char,
    metadata: *const c_char,
    flags: i64,
    n_children: i64,
    children: *mut *mut ArrowSchema,
    dictionary: *mut ArrowSchema,
    release: Option<unsafe extern "C" fn(*mut ArrowSchema)>,
    private_data: *mut c_void,
}

/// Columns of equal length, `struct ArrowArray` of the C data interface. Dropping it releases it,
/// unless a consumer has done so or moved it.
#[repr(C)]
pub struct ArrowArray {
    length: i64,
    null_count: i64,
    offset: i64,
    n_buffers: i64,
    n_children: i64,
    buffers: *mut *const c_void,
    children: *mut *mut ArrowArray,
    dictionary: *mut ArrowArray,
    release: Option<unsafe extern "C" fn(*mut ArrowArray)>,
    private_data: *mut c_void,
}

/// What a structure owns beyond itself: where its children and its dictionary are. Consumers may
/// move what is there and mark it as released, but the places stay.
struct Owned<T> {
    children: Vec<*mut T>,
    dictionary: *mut T,
    pointers: Vec<*const c_void>,
    _buffers: Vec<Buffer>,
}

impl<T> Owned<T> {
    fn new(children: Vec<T>, dictionary: Option<T>, buffers: Vec<Buffer>) -> Box<Self> {
        let place = |value| Box::into_raw(Box::new(value));
        Box::new(Self {
            children: children.into_iter().map(place).collect(),
            dictionary: dictionary.map_or(ptr::null_mut(), place),
            pointers: buffers.iter().map(|buffer| buffer.pointer).collect(),
            _buffers: buffers,
        })
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        let dictionary = Some(self.dictionary).filter(|dictionary| !dictionary.is_null());
        for place in self.children.iter().copied().chain(dictionary) {
            // SAFETY: made by `new`, dropped here and nowhere else; consumers leave the place alone.
            drop(unsafe { Box::from_raw(place) });
        }
    }
}

/// A buffer of a column, and what keeps it.
struct Buffer {
    pointer: *const c_void,
    _keeps: Option<Box<dyn Send>>,
}

impl Buffer {
    /// No validity bitmap: nothing is null.
    const ABSENT: Self = Self { pointer: ptr::null(), _keeps: None };

    fn new<T: Send + 'static>(values: Vec<T>) -> Self {
        Self { pointer: values.as_ptr().cast(), _keeps: Some(Box::new(values)) }
    }
}

/// The flag of a column that may hold nulls.
const NULLABLE: i64 = 2;

impl ArrowSchema {
    /// Returns the types of the columns of events.
    pub fn of_events() -> Self {
        let column = |name, format| Self::new(name, format, 0, Vec::new(), None);
        let nullable = |name, format| Self::new(name, format, NULLABLE, Vec::new(), None);
        let names = |name| Self::new(name, c"i", NULLABLE, Vec::new(), Some(column(c"", c"u")));
        let columns = vec![
            nullable(c"timestamp", c"tsn:UTC"),
            names(c"event_type"),
            column(c"event_type_code", c"C"),
            column(c"priority", c"C"),
            names(c"source"),
            names(c"symbol"),
            column(c"value", c"g"),
            column(c"metadata", c"L"),
        ];
        Self::new(c"", c"+s", 0, columns, None)
    }

    fn new(
        name: &'static CStr,
        format: &'static CStr,
        flags: i64,
        children: Vec<Self>,
        dictionary: Option<Self>,
    ) -> Self {
        let mut owned = Owned::new(children, dictionary, Vec::new());
        Self {
            format: format.as_ptr(),
            name: name.as_ptr(),
            metadata: ptr::null(),
            flags,
            n_children: owned.children.len() as i64,
            children: owned.children.as_mut_ptr(),
            dictionary: owned.dictionary,
            release: Some(release_schema),
            private_data: Box::into_raw(owned).cast(),
        }
    }
}

impl ArrowArray {
    /// Returns the columns of events.
    ///
    /// # Errors
    ///
    /// `TimestampError` if a timestamp is after 2262-04-11, where those of Arrow end.
    pub fn of_events(events: &[Event]) -> Result<Self, TimestampError> {
        let length = events.len();
        if let Some(place) = events.iter().position(|event| event.timestamp > i64::MAX as u64) {
            return Err(TimestampError { place, timestamp: events[place].timestamp });
        }
        let (known, unknown) = validity(events.iter().map(|event| event.timestamp != 0));
        let timestamps = events.iter().map(|event| event.timestamp as i64).collect();
        let columns = vec![
            Self::new(length, unknown, vec![known, Buffer::new::<i64>(timestamps)], vec![], None),
            names(events, |event| event.event_type, |event_type| event_type.name()),
            Self::plain(events.iter().map(|event| event.event_type.0).collect()),
            Self::plain(events.iter().map(|event| event.priority.level().0).collect()),
            names(events, |event| event.source_id, |source| source.name()),
            names(events, |event| event.symbol, |symbol| symbol.name()),
            Self::plain(events.iter().map(|event| event.value).collect()),
            Self::plain(events.iter().map(|event| event.metadata).collect()),
        ];
        Ok(Self::new(length, 0, vec![Buffer::ABSENT], columns, None))
    }

    /// Returns a column without nulls.
    fn plain<T: Send + 'static>(values: Vec<T>) -> Self {
        let length = values.len();
        Self::new(length, 0, vec![Buffer::ABSENT, Buffer::new(values)], vec![], None)
    }

    fn new(
        length: usize,
        null_count: usize,
        buffers: Vec<Buffer>,
        children: Vec<Self>,
        dictionary: Option<Self>,
    ) -> Self {
        let mut owned = Owned::new(children, dictionary, buffers);
        Self {
            length: length as i64,
            null_count: null_count as i64,
            offset: 0,
            n_buffers: owned.pointers.len() as i64,
            n_children: owned.children.len() as i64,
            buffers: owned.pointers.as_mut_ptr(),
            children: owned.children.as_mut_ptr(),
            dictionary: owned.dictionary,
            release: Some(release_array),
            private_data: Box::into_raw(owned).cast(),
        }
    }
}

/// Returns a column of names, each of which is in its dictionary once, in the order of appearance.
fn names<K: Copy + Eq + Hash>(
    events: &[Event],
    key: impl Fn(&Event) -> K,
    name: impl Fn(K) -> Option<&'static str>,
) -> ArrowArray {
    let mut indices: HashMap<K, i32> = HashMap::new();
    let (mut text, mut ends) = (Vec::new(), vec![0_i32]);
    let column: Vec<i32> = events
        .iter()
        .map(|event| {
            *indices.entry(key(event)).or_insert_with_key(|&key| {
                let Some(name) = name(key) else { return NO_NAME };
                text.extend_from_slice(name.as_bytes());
                // All names that a process can know have fewer bytes than 2^31.
                ends.push(text.len() as i32);
                ends.len() as i32 - 2
            })
        })
        .collect();
    let buffers = vec![Buffer::ABSENT, Buffer::new(ends), Buffer::new(text)];
    let count = indices.values().filter(|&&index| index != NO_NAME).count();
    let dictionary = ArrowArray::new(count, 0, buffers, vec![], None);
    let (named, nameless) = validity(column.iter().map(|&index| index != NO_NAME));
    // What is null is not looked at, but some readers check all indices.
    let column: Vec<i32> = column.into_iter().map(|index| index.max(0)).collect();
    let buffers = vec![named, Buffer::new(column)];
    ArrowArray::new(events.len(), nameless, buffers, vec![], Some(dictionary))
}

const NO_NAME: i32 = -1;

/// Returns a validity bitmap, and how many values are null.
fn validity(are_valid: impl ExactSizeIterator<Item = bool>) -> (Buffer, usize) {
    let mut bits = vec![0_u8; are_valid.len().div_ceil(8)];
    let mut nulls = 0;
    for (place, is_valid) in are_valid.enumerate() {
        bits[place / 8] |= u8::from(is_valid) << (place % 8);
        nulls += usize::from(!is_valid);
    }
    (if nulls == 0 { Buffer::ABSENT } else { Buffer::new(bits) }, nulls)
}

unsafe extern "C" fn release_schema(schema: *mut ArrowSchema) {
    // SAFETY: the holder of the structure calls this once; `private_data` is the box of `new`.
    unsafe {
        (*schema).release = None;
        drop(Box::from_raw((*schema).private_data.cast::<Owned<ArrowSchema>>()));
    }
}

unsafe extern "C" fn release_array(array: *mut ArrowArray) {
    // SAFETY: as above.
    unsafe {
        (*array).release = None;
        drop(Box::from_raw((*array).private_data.cast::<Owned<ArrowArray>>()));
    }
}

// SAFETY: what a structure points to belongs to it alone and is not bound to a thread.
unsafe impl Send for ArrowSchema {}
// SAFETY: as above.
unsafe impl Send for ArrowArray {}

impl Drop for ArrowSchema {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: neither a consumer nor this value has released it yet.
            unsafe { release(self) };
        }
    }
}

impl Drop for ArrowArray {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: as above.
            unsafe { release(self) };
        }
    }
}

impl fmt::Debug for ArrowSchema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArrowSchema").field("n_children", &self.n_children).finish_non_exhaustive()
    }
}

impl fmt::Debug for ArrowArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArrowArray").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{ArrowArray, ArrowSchema};
    use crate::event::{Event, Priority};
    use crate::event_type::EventType;
    use crate::names::{SourceId, Symbol};
    use std::ffi::CStr;
    use std::ptr;

    fn events(count: usize) -> Vec<Event> {
        let symbols = [Symbol::NONE, Symbol::new("BTCUSDT").expect("a name"), Symbol(u32::MAX)];
        let event = |number: usize| Event {
            timestamp: number as u64,
            event_type: EventType::PriceUpdate,
            priority: Priority::High,
            source_id: SourceId::NONE,
            symbol: symbols[number % 3],
            value: number as f64,
            metadata: u64::MAX - number as u64,
        };
        (0..count).map(event).collect()
    }

    /// Moves a structure out, as consumers do: copied, and marked as released where it was.
    unsafe fn take(place: *mut ArrowArray) -> ArrowArray {
        // SAFETY: the caller's promise: a live structure.
        unsafe {
            let moved = ptr::read(place);
            (*place).release = None;
            moved
        }
    }

    #[test]
    fn schema_and_array_have_the_same_columns() {
        let schema = ArrowSchema::of_events();
        let array = ArrowArray::of_events(&events(10)).expect("timestamps are small");
        assert_eq!((schema.n_children, array.n_children, array.length), (8, 8, 10));
        for column in 0..8 {
            // SAFETY: both have eight children, alive as long as they are.
            unsafe {
                let (schema, array) =
                    (&**schema.children.add(column), &**array.children.add(column));
                assert_eq!(schema.dictionary.is_null(), array.dictionary.is_null());
                assert_eq!(array.length, 10);
                assert!(array.null_count == 0 || schema.flags & super::NULLABLE != 0);
            }
        }
        // SAFETY: as above; formats are static texts.
        let format = unsafe { CStr::from_ptr((**schema.children).format) };
        assert_eq!(format, c"tsn:UTC");
    }

    #[test]
    fn a_column_of_names_has_each_name_once_and_nulls_without() {
        let array = ArrowArray::of_events(&events(7)).expect("timestamps are small");
        // SAFETY: the sixth column is that of symbols, of 7 indices, with a dictionary.
        unsafe {
            let symbols = &**array.children.add(5);
            let dictionary = &*symbols.dictionary;
            assert_eq!((symbols.null_count, dictionary.length), (5, 1));
            let text = (*dictionary.buffers.add(2)).cast::<u8>();
            assert_eq!(std::slice::from_raw_parts(text, 7), b"BTCUSDT");
            assert_eq!(*(*symbols.buffers).cast::<u8>(), 0b0001_0010);
        }
    }

    #[test]
    fn what_a_consumer_moved_out_outlives_the_rest_and_is_released_once() {
        let mut array = ArrowArray::of_events(&events(5)).expect("timestamps are small");
        // SAFETY: children and dictionary are alive until they are taken.
        let (values, dictionary) =
            unsafe { (take(*array.children.add(6)), take((**array.children.add(5)).dictionary)) };
        let release = array.release.expect("it is alive");
        // SAFETY: the consumer releases it once; dropping it then does nothing.
        unsafe { release(&raw mut array) };
        assert!(array.release.is_none());
        drop(array);
        // SAFETY: the column was moved out, with its 5 values.
        let values_are =
            unsafe { std::slice::from_raw_parts((*values.buffers.add(1)).cast::<f64>(), 5) };
        assert_eq!(values_are, [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(dictionary.length, 1);
    }

    #[test]
    fn a_timestamp_that_arrow_cannot_hold_is_refused() {
        let mut events = events(3);
        events[2].timestamp = i64::MAX as u64;
        assert!(ArrowArray::of_events(&events).is_ok());
        events[1].timestamp = i64::MAX as u64 + 1;
        let refused = ArrowArray::of_events(&events).map(|array| array.length);
        assert_eq!(refused.expect_err("it is too late").place, 1);
    }

    #[test]
    fn no_events_are_columns_of_length_0() {
        let array = ArrowArray::of_events(&[]).expect("there is no timestamp");
        assert_eq!((array.length, array.n_children), (0, 8));
    }
}
