//! What may be lost, and who syncs when: those that wait, and a thread for the others.

use super::commit::Committed;
use super::directory::Directory;
use super::error::StoreError;
use super::log::{Log, UNSYNCED_SEGMENTS};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What may be lost, and when an append that was not waited for is synced.
///
/// Whatever it is, an append that was waited for ([`Ticket::wait`],
/// [`EventStore::sync`](super::EventStore::sync)) is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Durability {
    /// Nothing is synced before it is asked for: a crash of the process may lose what was appended
    /// in the last second, a power cut everything since the last
    /// [`EventStore::sync`](super::EventStore::sync).
    None,
    /// A power cut loses what was appended in so long a time.
    Interval(Duration),
    /// What was acknowledged is never lost; all that wait are served by one sync. What nobody waits
    /// for is synced a millisecond after it was appended.
    #[default]
    Group,
    /// Each append is durable when it returns.
    Always,
    /// As `Always`, and so sure that a bit that flips in the very last commit is known for damage: two
    /// syncs each.
    Double,
}

/// Appends as the durability says.
pub(super) struct Appender {
    pub(super) committed: Arc<Committed<Directory>>,
    pub(super) durability: Durability,
}

impl Appender {
    #[inline]
    pub(super) fn append(
        &self,
        append: impl FnOnce(&mut Log<Directory>) -> Result<u64, StoreError>,
    ) -> Result<u64, StoreError> {
        let (appended, was_idle, end) = {
            let mut log = self.committed.log();
            let was_idle = log.next() == log.durable();
            (self.committed.note(append(&mut log)), was_idle, log.next())
        };
        // Some may be stored where the rest was refused.
        match self.durability {
            Durability::Always | Durability::Double => {
                let committed = self.committed.commit(end);
                return appended.and_then(|first| committed.map(|()| first));
            }
            Durability::Group if was_idle => self.committed.want(),
            _ => {}
        }
        appended
    }
}

/// Appended records that can be waited for, from any thread or task, and more than once.
#[derive(Clone)]
#[must_use = "nothing says that the records are durable before it was waited for"]
pub struct Ticket {
    pub(super) committed: Arc<Committed<Directory>>,
    /// The sequence after the last record.
    pub(super) end: u64,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("sequence", &self.sequence()).finish_non_exhaustive()
    }
}

impl Ticket {
    /// Returns the sequence of the last record.
    pub fn sequence(&self) -> u64 {
        self.end.saturating_sub(1)
    }

    /// Returns whether the records are durable by now.
    pub fn is_durable(&self) -> bool {
        self.committed.durable() >= self.end
    }

    /// Blocks the thread until the records are durable, and returns the sequence of the last one.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`](super::EventStore::sync).
    pub fn wait(&self) -> Result<u64, StoreError> {
        self.committed.commit(self.end)?;
        Ok(self.sequence())
    }

    /// As [`Ticket::wait`], at most for so long; `None` says that the records are not durable yet.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`](super::EventStore::sync).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<u64>, StoreError> {
        let Some(deadline) = Instant::now().checked_add(timeout) else {
            return self.wait().map(Some);
        };
        let is_durable = self.committed.wait_until(self.end, deadline)?;
        Ok(is_durable.then(|| self.sequence()))
    }

    /// Waits until the records are durable, and returns the sequence of the last one. Cancelling it
    /// takes nothing back.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`](super::EventStore::sync).
    pub async fn wait_async(&self) -> Result<u64, StoreError> {
        self.committed.wait(self.end).await?;
        Ok(self.sequence())
    }
}

/// How long records that nobody waits for may stay unsynced where what is acknowledged is.
const WINDOW: Duration = Duration::from_millis(1);
/// How often what waits in memory is written where nothing is synced.
const TICK: Duration = Duration::from_secs(1);
/// After so long without records the last commit is confirmed on the disk.
const IDLE: Duration = Duration::from_millis(50);

/// Syncs when it is time to, until the store is closed or poisoned. An error is told to those that
/// append or wait.
pub(super) fn run(committed: &Committed<Directory>, durability: Durability) {
    let pace = match durability {
        Durability::None => Some(TICK),
        Durability::Interval(interval) => Some(interval),
        _ => None,
    };
    loop {
        let checked = committed.log().check();
        if let Err(error) = checked {
            return committed.stop(error);
        }
        let patience = pace.or(committed.is_unconfirmed().then_some(IDLE));
        let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
        let Some(is_wanted) = committed.wait_for_wish(deadline) else { return };
        if durability == Durability::None && !is_wanted {
            let mut log = committed.log();
            _ = log.flush();
            // Each is an open file.
            if log.unsynced_segments() < UNSYNCED_SEGMENTS {
                continue;
            }
        }
        let is_behind = || committed.durable() < committed.log().next();
        if !is_behind() {
            // With a deadline it has waited long enough for a commit that would take the marker along.
            if deadline.is_some() && !is_wanted && committed.is_unconfirmed() {
                _ = committed.settle();
            }
            continue;
        }
        while is_behind() {
            if durability == Durability::Group {
                // Those that come meanwhile are served too.
                std::thread::sleep(WINDOW);
            }
            let next = committed.log().next();
            if committed.commit(next).is_err() {
                break;
            }
        }
    }
}
