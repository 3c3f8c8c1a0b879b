//! The slots of a ring: a power of two of places, each with the topic of its event beside it.

use crate::sync::{AtomicU32, Ordering, UnsafeCell};
use std::mem::MaybeUninit;

/// A tagged place. The topic can be read at any time, the event only by who is entitled to it.
struct Slot<T> {
    topic: AtomicU32,
    event: UnsafeCell<MaybeUninit<T>>,
}

/// The slots by sequence. A slot holds an event from its first `write` until the ring is dropped.
pub(crate) struct Slots<T> {
    slots: Box<[Slot<T>]>,
    /// Their number less one.
    mask: u64,
}

// SAFETY: who writes a slot and who reads it is settled by the ring: see its module head. An event
// is read by reference in several threads at once and dropped in any.
unsafe impl<T: Send + Sync> Send for Slots<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Slots<T> {}

impl<T> Slots<T> {
    /// Returns empty slots; `capacity` is a power of two.
    pub(crate) fn new(capacity: usize) -> Self {
        assert!(capacity.is_power_of_two(), "capacity was {capacity}");
        let empty =
            || Slot { topic: AtomicU32::new(0), event: UnsafeCell::new(MaybeUninit::uninit()) };
        Self { slots: (0..capacity).map(|_| empty()).collect(), mask: capacity as u64 - 1 }
    }

    #[inline]
    pub(crate) fn capacity(&self) -> u64 {
        self.slots.len() as u64
    }

    /// Returns how far a sweep lets publishers go.
    #[inline]
    pub(crate) fn stride(&self) -> u64 {
        (self.capacity() / 4).max(1)
    }

    #[inline]
    fn slot(&self, sequence: u64) -> &Slot<T> {
        let index = (sequence & self.mask) as usize;
        // SAFETY: the number of slots is a power of two, so one less has all lower bits set.
        unsafe { self.slots.get_unchecked(index) }
    }

    /// Returns the topic in the slot of a sequence, whatever event is there now.
    #[inline]
    pub(crate) fn topic(&self, sequence: u64) -> u32 {
        // Whoever must not err about it has acquired `tail` beyond the sequence and is entitled to
        // read the event too.
        self.slot(sequence).topic.load(Ordering::Relaxed)
    }

    /// Puts an event into the slot of a sequence and returns the one of the lap before.
    ///
    /// # Safety
    ///
    /// The caller is the publisher of `sequence`, every slot of the lap before was written, and no
    /// reader is entitled to the one that is overwritten.
    #[inline(always)]
    pub(crate) unsafe fn write(&self, sequence: u64, topic: u32, event: T) -> Option<T> {
        let slot = self.slot(sequence);
        slot.topic.store(topic, Ordering::Relaxed);
        slot.event.with_mut(|place| {
            let place = place.cast::<T>();
            let before = match std::mem::needs_drop::<T>() && sequence >= self.capacity() {
                // SAFETY: the slot was written one lap before, and nobody else touches it.
                true => Some(unsafe { place.read() }),
                false => None,
            };
            // SAFETY: the caller says that nobody else touches the slot.
            unsafe { place.write(event) };
            before
        })
    }

    /// Runs `f` on the event of a sequence.
    ///
    /// # Safety
    ///
    /// The event was published, and the publisher does not overwrite it before `f` returns.
    #[inline]
    pub(crate) unsafe fn read<O>(&self, sequence: u64, f: impl FnOnce(&T) -> O) -> O {
        // SAFETY: the caller says that the slot was written and stays.
        self.slot(sequence).event.with(|event| f(unsafe { (*event).assume_init_ref() }))
    }

    /// Runs `f` on the place of a sequence that is still to be published, filled by `first` if it
    /// was never written. If `f` panics nothing is published.
    ///
    /// # Safety
    ///
    /// As for `write`.
    #[inline]
    pub(crate) unsafe fn write_in_place<O>(
        &self,
        sequence: u64,
        topic: u32,
        first: impl FnOnce() -> T,
        f: impl FnOnce(&mut T) -> O,
    ) -> O {
        let slot = self.slot(sequence);
        slot.topic.store(topic, Ordering::Relaxed);
        slot.event.with_mut(|place| {
            // SAFETY: the caller says that nobody else touches the slot.
            let place = unsafe { &mut *place };
            if sequence < self.capacity() {
                // A first event whose writer panics is written again, and the older one leaks:
                // only the published ones are known to be there.
                place.write(first());
            }
            // SAFETY: it was written just now or one lap before.
            f(unsafe { place.assume_init_mut() })
        })
    }

    /// Drops the events of the ring.
    ///
    /// # Safety
    ///
    /// The caller owns the slots alone, `published` events were written, and none is used later.
    pub(crate) unsafe fn drop_events(&mut self, published: u64) {
        if !std::mem::needs_drop::<T>() {
            return;
        }
        let written = published.min(self.capacity()) as usize;
        for slot in &mut self.slots[..written] {
            // SAFETY: the first slots were written, and the caller owns them.
            slot.event.with_mut(|event| unsafe { (*event).assume_init_drop() });
        }
    }
}
