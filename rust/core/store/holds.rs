//! What has to stay in the log: retiring old segments never passes it.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The places of a log that are held.
#[derive(Debug, Default)]
pub(crate) struct Holds(Mutex<Places>);

#[derive(Debug, Default)]
struct Places {
    next: u64,
    held: BTreeMap<u64, u64>,
}

/// Keeps the records of a log from a sequence on, as long as it lives.
#[derive(Debug)]
pub struct Hold {
    holds: Arc<Holds>,
    place: u64,
}

impl Holds {
    /// Holds the records from a sequence on.
    pub(crate) fn hold(self: &Arc<Self>, sequence: u64) -> Hold {
        let mut places = self.0.lock();
        let place = places.next;
        places.next += 1;
        places.held.insert(place, sequence);
        Hold { holds: self.clone(), place }
    }

    /// Returns the lowest sequence that is held.
    pub(super) fn lowest(&self) -> Option<u64> {
        self.0.lock().held.values().min().copied()
    }
}

impl Hold {
    /// Returns the sequence from which on records stay.
    pub fn sequence(&self) -> u64 {
        self.holds.0.lock().held[&self.place]
    }

    /// Gives up the records below a sequence. A lower one than before changes nothing: what was given
    /// up may be gone.
    pub fn advance(&self, sequence: u64) {
        if let Some(held) = self.holds.0.lock().held.get_mut(&self.place) {
            *held = sequence.max(*held);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holds.0.lock().held.remove(&self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_place_is_held_until_its_holder_goes_on_or_away() {
        let holds = Arc::new(Holds::default());
        assert_eq!(holds.lowest(), None);
        let (slow, fast) = (holds.hold(5), holds.hold(9));
        assert_eq!(holds.lowest(), Some(5));
        slow.advance(7);
        slow.advance(6);
        assert_eq!((slow.sequence(), holds.lowest()), (7, Some(7)));
        drop(slow);
        assert_eq!(holds.lowest(), Some(9));
        drop(fast);
        assert_eq!(holds.lowest(), None);
    }
}
