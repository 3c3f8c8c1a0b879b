//! The queue between the publishers and the readers of one subscription.

use crossbeam_channel as channel;

/// Both ends of a bounded queue, first in, first out. Clones are ends of the same queue.
pub trait EventQueue<E>: Clone {
    /// Returns an empty queue that holds up to `capacity` entries and allocates no more.
    fn bounded(capacity: usize) -> Self;

    /// Appends an entry, or gives it back if the queue is full. Never waits.
    fn push(&self, entry: E) -> Result<(), E>;

    /// Takes the oldest entry. Never waits.
    fn pop(&self) -> Option<E>;

    /// Returns the number of entries.
    fn len(&self) -> usize;

    /// Returns whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A crossbeam bounded channel: the queue between threads.
#[derive(Debug)]
pub struct CrossbeamQueue<E> {
    sender: channel::Sender<E>,
    receiver: channel::Receiver<E>,
}

impl<E> Clone for CrossbeamQueue<E> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), receiver: self.receiver.clone() }
    }
}

impl<E> EventQueue<E> for CrossbeamQueue<E> {
    fn bounded(capacity: usize) -> Self {
        let (sender, receiver) = channel::bounded(capacity);
        Self { sender, receiver }
    }

    #[inline]
    fn push(&self, entry: E) -> Result<(), E> {
        self.sender.try_send(entry).map_err(channel::TrySendError::into_inner)
    }

    #[inline]
    fn pop(&self) -> Option<E> {
        self.receiver.try_recv().ok()
    }

    fn len(&self) -> usize {
        self.receiver.len()
    }
}
