//! The ring whose publisher never waits: for plain events, whose slots are atomic words.
//!
//! A reader that is overtaken reads words of two events; it finds out afterwards, by the sequence up
//! to which the publisher had announced to write, and throws away what it read. So nobody pins, no
//! cursor is looked at, and publishing is a few stores, whatever readers there are.
//!
//! ```text
//!  publisher                           reader
//!  claim = next + 1 (or some more)     tail (acquire): what may be read
//!      fence (release)                 words of the slots
//!  words of the slot                       fence (acquire)
//!  tail = next + 1 (release)           claim: everything below claim - capacity is lost
//! ```
//!
//! | store | load | so that |
//! |---|---|---|
//! | `tail` | `tail` | the words of what may be read are there |
//! | `claim`, before its fence | `claim`, after its fence | whoever has read a newer word than it wanted sees the claim for it |
//!
//! This is a seqlock (Boehm 2012, "Can seqlocks get along with programming language memory
//! models?") with one counter for all slots. The words are atomics: there is no data race to begin
//! with, and any words are an event.

use crate::error::{ConfigError, Lagged, TryRecvError};
use crate::policy::rounded_capacity;
use crate::sync::{AtomicU64, Counter, Flag, Ordering, words_fence};
use bytemuck::{AnyBitPattern, NoUninit};
use crossbeam_utils::CachePadded;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// The most sequences that are announced at once; a store saved for each of them.
const LARGEST_CLAIM: u64 = 8;

/// Events copied between two looks at the claim.
const BATCH: usize = 64;

/// An event of plain words: `Copy`, without padding, any bits of which are an event.
pub trait PlainEvent: AnyBitPattern + NoUninit + Send + Sync {}

impl<T: AnyBitPattern + NoUninit + Send + Sync> PlainEvent for T {}

struct Shared<T> {
    words: Box<[AtomicU64]>,
    capacity: u64,
    tail: CachePadded<Counter>,
    claim: CachePadded<Counter>,
    closed: Flag,
    event: PhantomData<fn(T) -> T>,
}

/// A ring that overwrites its oldest events, from which readers are made. Clones are the same ring.
///
/// Publishing and reading are wait-free: neither ever waits for the other, however slow or stopped
/// that is. Nobody is woken: a reader polls.
pub struct OverwriteRing<T>(Arc<Shared<T>>);

impl<T> Clone for OverwriteRing<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for OverwriteRing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverwriteRing")
            .field("capacity", &self.0.capacity)
            .field("tail", &self.0.tail.observe())
            .finish()
    }
}

/// The only publisher of an [`OverwriteRing`]; dropping it closes the ring.
pub struct OverwritePublisher<T> {
    shared: Arc<Shared<T>>,
    next: u64,
    /// Sequences below are announced.
    claimed: u64,
    /// How many are announced at once.
    ahead: u64,
}

impl<T> fmt::Debug for OverwritePublisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverwritePublisher").field("next", &self.next).finish_non_exhaustive()
    }
}

/// One reader of an [`OverwriteRing`].
pub struct OverwriteReader<T> {
    shared: Arc<Shared<T>>,
    next: u64,
    overwritten: u64,
    batch: Vec<T>,
    began_at: u64,
}

impl<T> fmt::Debug for OverwriteReader<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverwriteReader").field("next", &self.next).finish_non_exhaustive()
    }
}

/// Words of one event, the last one filled up with zeros.
const fn words_of<T>() -> usize {
    size_of::<T>().div_ceil(size_of::<u64>())
}

impl<T: PlainEvent> Shared<T> {
    #[inline]
    fn slot(&self, sequence: u64) -> &[AtomicU64] {
        let first = (sequence & (self.capacity - 1)) as usize * words_of::<T>();
        &self.words[first..first + words_of::<T>()]
    }

    #[inline]
    fn write(&self, sequence: u64, event: &T) {
        let bytes = bytemuck::bytes_of(event);
        for (word, part) in self.slot(sequence).iter().zip(bytes.chunks(size_of::<u64>())) {
            let mut whole = [0; size_of::<u64>()];
            whole[..part.len()].copy_from_slice(part);
            word.store(u64::from_ne_bytes(whole), Ordering::Relaxed);
        }
    }

    /// Returns the words of a slot as an event, which need not be one that was published.
    #[inline]
    fn read(&self, sequence: u64) -> T {
        let mut event = T::zeroed();
        // Any bytes are an event, so it may be filled a part at a time.
        let bytes = bytemuck::bytes_of_mut(&mut event);
        for (word, part) in self.slot(sequence).iter().zip(bytes.chunks_mut(size_of::<u64>())) {
            let whole = word.load(Ordering::Relaxed).to_ne_bytes();
            part.copy_from_slice(&whole[..part.len()]);
        }
        event
    }

    /// Returns the oldest sequence that no publication has begun to overwrite; called after
    /// reading.
    #[inline]
    fn oldest(&self) -> u64 {
        // ORDERING: pairs with the fence of `publish`.
        words_fence(Ordering::Acquire);
        self.claim.value().saturating_sub(self.capacity)
    }
}

impl<T: PlainEvent> OverwriteRing<T> {
    /// Returns a ring of the given capacity in events, rounded up to a power of two, and its
    /// publisher.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the capacity is zero or too large.
    pub fn new(capacity: usize) -> Result<(OverwritePublisher<T>, Self), ConfigError> {
        let capacity = rounded_capacity(capacity)?;
        let ahead = (capacity as u64 / 8).clamp(1, LARGEST_CLAIM);
        Ok(Self::with_claims(capacity, ahead))
    }

    /// Returns a ring whose publisher announces so many sequences at once.
    pub(crate) fn with_claims(capacity: usize, ahead: u64) -> (OverwritePublisher<T>, Self) {
        let shared = Arc::new(Shared {
            words: (0..capacity * words_of::<T>()).map(|_| AtomicU64::new(0)).collect(),
            capacity: capacity as u64,
            tail: CachePadded::default(),
            claim: CachePadded::default(),
            closed: Flag::default(),
            event: PhantomData,
        });
        let publisher = OverwritePublisher { shared: shared.clone(), next: 0, claimed: 0, ahead };
        (publisher, Self(shared))
    }

    /// Returns the most events that the ring holds, a power of two.
    pub fn capacity(&self) -> usize {
        self.0.capacity as usize
    }

    /// Returns a reader of everything that is published from now on.
    pub fn reader(&self) -> OverwriteReader<T> {
        self.reader_from(self.0.tail.observe())
    }

    /// Returns a reader that begins at the oldest event that is still there.
    pub fn reader_from_oldest(&self) -> OverwriteReader<T> {
        let tail = self.0.tail.observe();
        self.reader_from(self.0.oldest().min(tail))
    }

    fn reader_from(&self, next: u64) -> OverwriteReader<T> {
        let batch = Vec::with_capacity(BATCH);
        OverwriteReader { shared: self.0.clone(), next, overwritten: 0, batch, began_at: next }
    }
}

impl<T: PlainEvent> OverwritePublisher<T> {
    /// Publishes an event; it takes the place of the oldest if the ring is full. It never waits.
    #[inline]
    pub fn publish(&mut self, event: &T) {
        let Shared { claim, tail, .. } = &*self.shared;
        if self.next >= self.claimed {
            self.claimed = self.next + self.ahead;
            claim.set(self.claimed);
            // ORDERING: pairs with the fence of `oldest`: who reads a word of this event sees the
            // claim for it.
            words_fence(Ordering::Release);
        }
        self.shared.write(self.next, event);
        self.next += 1;
        tail.publish(self.next);
    }

    /// Publishes events in order, which become readable at once. More of them than the ring holds
    /// overwrite each other.
    pub fn publish_batch(&mut self, events: &[T]) {
        let end = self.next + events.len() as u64;
        if end > self.claimed {
            self.claimed = end;
            self.shared.claim.set(end);
            // ORDERING: as in `publish`.
            words_fence(Ordering::Release);
        }
        let kept = events.len().saturating_sub(self.shared.capacity as usize);
        for (sequence, event) in (self.next..end).zip(events).skip(kept) {
            self.shared.write(sequence, event);
        }
        self.next = end;
        self.shared.tail.publish(end);
    }

    /// Returns how many events were published: the sequence of the next one.
    pub fn sequence(&self) -> u64 {
        self.next
    }
}

impl<T> Drop for OverwritePublisher<T> {
    fn drop(&mut self) {
        self.shared.closed.set();
    }
}

impl<T: PlainEvent> OverwriteReader<T> {
    /// Returns the next event if there is one.
    ///
    /// # Errors
    ///
    /// `Empty`; `Lagged` with the number of events that were overwritten before it came to them,
    /// after which it goes on in the middle of the ring; `Closed` when the publisher is gone and
    /// everything was read.
    #[inline]
    pub fn try_recv(&mut self) -> Result<T, TryRecvError> {
        self.find(1)?;
        let event = self.shared.read(self.next);
        if self.next < self.shared.oldest() {
            return Err(self.resume().into());
        }
        self.next += 1;
        Ok(event)
    }

    /// Appends up to `limit` events to `batch` and returns how many: at least one.
    ///
    /// # Errors
    ///
    /// As [`OverwriteReader::try_recv`]; nothing was appended then.
    pub fn try_recv_many(
        &mut self,
        batch: &mut Vec<T>,
        limit: usize,
    ) -> Result<usize, TryRecvError> {
        let mut taken = 0;
        while taken < limit {
            let found = match self.find((limit - taken).min(BATCH)) {
                Ok(found) => found,
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            };
            self.batch.clear();
            let sequences = self.next..self.next + found as u64;
            self.batch.extend(sequences.map(|sequence| self.shared.read(sequence)));
            // Looked at once: it may be overtaken between two looks.
            let is_overtaken = self.next < self.shared.oldest();
            match is_overtaken {
                // It is told by the next call.
                true if taken > 0 => break,
                true => return Err(self.resume().into()),
                false => self.next += found as u64,
            }
            batch.extend_from_slice(&self.batch);
            taken += found;
        }
        Ok(taken)
    }

    /// Returns how many events it has given out.
    pub fn delivered(&self) -> u64 {
        self.next - self.began_at - self.overwritten
    }

    /// Returns how many events were overwritten before it came to them, as far as it has told.
    pub fn overwritten(&self) -> u64 {
        self.overwritten
    }

    /// Returns how many events wait to be read, those included that are being overwritten.
    pub fn pending(&self) -> usize {
        (self.shared.tail.observe() - self.next) as usize
    }

    /// Returns how many events can be read, up to `limit`.
    #[inline]
    fn find(&self, limit: usize) -> Result<usize, TryRecvError> {
        // Before looking: what was published before closing is seen below.
        let closed = self.shared.closed.is_set();
        let found = self.shared.tail.observe() - self.next;
        match found {
            0 if closed => Err(TryRecvError::Closed),
            0 => Err(TryRecvError::Empty),
            _ => Ok(usize::try_from(found).unwrap_or(usize::MAX).min(limit)),
        }
    }

    /// Goes on where the publisher is half a ring away, so that it is not overtaken again at once.
    #[cold]
    fn resume(&mut self) -> Lagged {
        let tail = self.shared.tail.observe();
        let middle = tail.saturating_sub(self.shared.capacity / 2).max(self.shared.oldest());
        let resumed = middle.min(tail).max(self.next + 1);
        let missed = resumed - self.next;
        self.overwritten += missed;
        self.next = resumed;
        Lagged { missed, exact: true }
    }
}

const _: () = assert!(words_of::<[u64; 4]>() == 4, "a compact event has no word too many");
