//! When what is replayed comes: the pace, and what those who watch it want: pause, step, seek, stop.

use super::digest::Digest;
use crate::error::ConfigError;
use crate::sync::Counter;
use parking_lot::{Condvar, Mutex};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A clock that shows the time of what is replayed, in nanoseconds since the Unix epoch, UTC. Cheap to
/// clone: all show the same.
#[derive(Debug, Clone, Default)]
pub struct VirtualClock(Arc<Counter>);

impl VirtualClock {
    /// Returns a clock that shows 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the time.
    #[inline]
    pub fn time_ns(&self) -> u64 {
        self.0.observe()
    }

    /// Sets the time, also back.
    pub fn set(&self, time: u64) {
        self.0.publish(time);
    }

    /// Sets the time unless it is later already.
    #[inline]
    pub fn advance(&self, time: u64) {
        self.0.raise(time);
    }
}

/// How far a replay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ReplayState {
    /// It publishes, or waits for what is due.
    #[default]
    Running,
    /// It was told to pause.
    Paused,
    /// Everything was replayed.
    Ended,
    /// It was told to stop, or could not go on.
    Stopped,
}

impl ReplayState {
    /// Returns whether nothing will be replayed any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Ended | Self::Stopped)
    }
}

/// The numbers of a replay at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReplayProgress {
    /// How far it is.
    pub state: ReplayState,
    /// Records that were replayed.
    pub replayed: u64,
    /// The sequence of the next record.
    pub sequence: u64,
    /// Events that the log says were lost on the way into it or were removed since. They are known
    /// only where all of a log is replayed.
    pub missed: u64,
    /// Gaps in time that were not waited for.
    pub skipped_gaps: u64,
}

/// What a replay is told by others. Cheap to clone.
#[derive(Clone, Default)]
pub struct Transport(Arc<Shared>);

#[derive(Default)]
struct Shared {
    wish: Mutex<Wish>,
    changed: Condvar,
    digest: Mutex<Digest>,
    replayed: Counter,
    sequence: Counter,
    missed: Counter,
    skipped_gaps: Counter,
}

#[derive(Debug, Default)]
struct Wish {
    state: ReplayState,
    /// Records that are wanted though it is paused.
    steps: u64,
    seek: Option<u64>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

/// What a replay has to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Replay so many records; 0 where there are none.
    Go(usize),
    /// Go on at the first record that is not earlier than this time.
    Seek(u64),
    /// Nothing any more.
    Stop,
}

impl Transport {
    /// Returns one for a replay that has not begun: it may be told to pause before.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the digest of what was replayed so far, in the order in which it was; see [`Digest`].
    pub fn digest(&self) -> [u8; 16] {
        self.0.digest.lock().finish()
    }

    /// Returns the numbers of this moment.
    pub fn progress(&self) -> ReplayProgress {
        ReplayProgress {
            state: self.0.wish.lock().state,
            replayed: self.0.replayed.value(),
            sequence: self.0.sequence.value(),
            missed: self.0.missed.value(),
            skipped_gaps: self.0.skipped_gaps.value(),
        }
    }

    /// Replays nothing from now on, but for what is on its way. Returns false if it is over.
    pub fn pause(&self) -> bool {
        self.change(|wish| (wish.state, wish.steps) = (ReplayState::Paused, 0))
    }

    /// Goes on after a pause. Returns false if it is over.
    pub fn resume(&self) -> bool {
        self.change(|wish| (wish.state, wish.steps) = (ReplayState::Running, 0))
    }

    /// Replays so many more records at once, and pauses. Returns false if it is over.
    pub fn step(&self, records: u64) -> bool {
        self.change(|wish| {
            wish.state = ReplayState::Paused;
            wish.steps = wish.steps.saturating_add(records);
        })
    }

    /// Goes on at the first record that is not earlier than a time, forth or back, as if the replay
    /// had that start: what is earlier is left out. Returns false if it is over.
    pub fn seek(&self, time: u64) -> bool {
        self.change(|wish| wish.seek = Some(time))
    }

    /// Ends the replay.
    pub fn stop(&self) {
        self.change(|wish| wish.state = ReplayState::Stopped);
    }

    /// Returns whether it was told to stop.
    pub fn is_stopped(&self) -> bool {
        self.0.wish.lock().state == ReplayState::Stopped
    }

    fn change(&self, change: impl FnOnce(&mut Wish)) -> bool {
        let mut wish = self.0.wish.lock();
        if wish.state.is_over() {
            return false;
        }
        change(&mut wish);
        self.0.changed.notify_all();
        true
    }

    /// Waits until something is to be done with the records that have these times, which come next.
    pub(super) fn order(
        &self,
        pace: &mut Pace,
        times: impl ExactSizeIterator<Item = u64>,
    ) -> Order {
        let mut wish = self.0.wish.lock();
        let mut times = times.peekable();
        loop {
            if wish.state.is_over() {
                return Order::Stop;
            }
            if let Some(time) = wish.seek.take() {
                pace.restart();
                return Order::Seek(time);
            }
            let is_paused = wish.state == ReplayState::Paused;
            let Some(&first) = times.peek() else {
                if is_paused {
                    // Whoever seeks back has more to come.
                    self.0.changed.wait(&mut wish);
                    continue;
                }
                return Order::Go(0);
            };
            if is_paused && wish.steps == 0 {
                let since = Instant::now();
                self.0.changed.wait(&mut wish);
                pace.delay(since.elapsed());
                continue;
            }
            if is_paused {
                let most = usize::try_from(wish.steps).unwrap_or(usize::MAX);
                let count = times.len().min(most);
                wish.steps -= count as u64;
                pace.restart();
                return Order::Go(count);
            }
            if pace.speed == 0.0 {
                return Order::Go(times.len());
            }
            let due = pace.due(first);
            let now = Instant::now();
            if due > now {
                self.0.changed.wait_until(&mut wish, due);
                continue;
            }
            let mut count = 0;
            for time in times {
                if pace.due(time) > now {
                    break;
                }
                pace.next = None;
                count += 1;
            }
            self.0.skipped_gaps.set(pace.skipped_gaps);
            return Order::Go(count);
        }
    }

    /// Waits for so long, or until something else is wanted.
    pub fn nap(&self, time: Duration) {
        let mut wish = self.0.wish.lock();
        if !wish.state.is_over() && wish.seek.is_none() {
            self.0.changed.wait_for(&mut wish, time);
        }
    }

    /// Counts records that were replayed and are added to the digest; the next one has this sequence.
    pub(super) fn count(&self, records: u64, next: u64, add: impl FnOnce(&mut Digest)) {
        add(&mut self.0.digest.lock());
        self.0.replayed.add_exclusive(records);
        self.0.sequence.set(next);
    }

    /// Counts events that are missing.
    pub(super) fn miss(&self, events: u64) {
        self.0.missed.add_exclusive(events);
    }

    /// Says that everything was replayed, unless something is wanted still.
    pub(super) fn end(&self) -> bool {
        let mut wish = self.0.wish.lock();
        if wish.state == ReplayState::Running && wish.seek.is_none() {
            wish.state = ReplayState::Ended;
        }
        wish.state.is_over()
    }
}

/// Lets what was recorded come when it is due. What is late is not waited for.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    speed: f64,
    longest_gap: Duration,
    /// When the last record was due.
    last: Option<Instant>,
    /// When the next one is.
    next: Option<Instant>,
    /// The time of the last record that has one.
    time: u64,
    skipped_gaps: u64,
}

/// The longest gap that is waited for unless another one is asked for.
const LONGEST_GAP: Duration = Duration::from_secs(3_600);

impl Pace {
    /// Returns the pace of a speed: recorded time per real time, 1 as recorded, 10 ten times faster, 0
    /// as fast as it goes. Longer gaps of recorded time than `longest_gap` are not waited for.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the speed is below 0 or not finite.
    pub(super) fn new(speed: f64, longest_gap: Option<Duration>) -> Result<Self, ConfigError> {
        if !(speed.is_finite() && speed >= 0.0) {
            return Err(ConfigError::new(format!(
                "speed was {speed}; it must be a finite number of at least 0: 1 as recorded, 10 ten \
                 times faster, 0 as fast as it goes"
            )));
        }
        let longest_gap = longest_gap.unwrap_or(LONGEST_GAP);
        Ok(Self { speed, longest_gap, last: None, next: None, time: 0, skipped_gaps: 0 })
    }

    /// Lets the next record come at once.
    fn restart(&mut self) {
        (self.last, self.next, self.time) = (None, None, 0);
    }

    /// Lets everything come later.
    fn delay(&mut self, by: Duration) {
        self.last = self.last.map(|last| last + by);
        self.next = self.next.map(|next| next + by);
    }

    /// Returns when the next record is due, which has this time.
    fn due(&mut self, time: u64) -> Instant {
        if let Some(next) = self.next {
            return next;
        }
        // Of a time that is not known nothing is known, and the clock may have gone back.
        let gap = match self.time {
            0 => 0,
            before => time.saturating_sub(before),
        };
        if time != 0 {
            self.time = time;
        }
        let next = match self.last {
            None => Instant::now(),
            Some(_) if Duration::from_nanos(gap) > self.longest_gap => {
                self.skipped_gaps += 1;
                Instant::now()
            }
            Some(last) => {
                let wait = Duration::try_from_secs_f64(gap as f64 / 1e9 / self.speed);
                // So long nobody waits.
                wait.ok().and_then(|wait| last.checked_add(wait)).unwrap_or(last + LONGEST_GAP * 24)
            }
        };
        (self.last, self.next) = (Some(next), Some(next));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(transport: &Transport, pace: &mut Pace, times: &[u64]) -> Order {
        transport.order(pace, times.iter().copied())
    }

    fn pace(speed: f64) -> Pace {
        Pace::new(speed, None).expect("it is a speed")
    }

    #[test]
    fn a_step_gives_so_many_and_pauses() {
        let (transport, mut pace) = (Transport::default(), pace(0.0));
        assert!(transport.step(2));
        assert_eq!(order(&transport, &mut pace, &[1]), Order::Go(1));
        assert_eq!(order(&transport, &mut pace, &[2, 3, 4]), Order::Go(1));
        assert_eq!(transport.progress().state, ReplayState::Paused);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| order(&transport, &mut pace, &[3, 4]));
            assert!(transport.step(1));
            assert_eq!(waiting.join().expect("it ends"), Order::Go(1));
        });
        assert!(transport.resume());
        assert_eq!(order(&transport, &mut pace, &[4, 5]), Order::Go(2));
    }

    #[test]
    fn whoever_waits_for_its_time_is_told_to_seek_and_to_stop() {
        const HOUR: u64 = 3_600_000_000_000;
        for (tell, told) in [
            ((|transport| assert!(transport.seek(7))) as fn(&Transport), Order::Seek(7)),
            (Transport::stop, Order::Stop),
            (|transport| assert!(transport.step(1)), Order::Go(1)),
        ] {
            let (transport, mut pace) = (Transport::default(), pace(1.0));
            assert_eq!(order(&transport, &mut pace, &[1, HOUR]), Order::Go(1));
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| order(&transport, &mut pace, &[HOUR]));
                tell(&transport);
                assert_eq!(waiting.join().expect("it ends"), told);
            });
        }
    }

    #[test]
    fn it_waits_as_long_as_recorded_times_are_apart_and_not_for_what_is_late_or_long() {
        let mut pace = Pace::new(10.0, Some(Duration::from_secs(60))).expect("it is a speed");
        let mut due = |seconds: u64| {
            let due = pace.due(seconds * 1_000_000_000);
            pace.next = None;
            due
        };
        let first = due(1_000);
        assert_eq!(due(1_050) - first, Duration::from_secs(5));
        assert_eq!(due(1_040) - first, Duration::from_secs(5), "the clock has gone back");
        assert_eq!(due(0) - first, Duration::from_secs(5), "it has no time");
        assert_eq!(due(1_060) - first, Duration::from_secs(7));
        let before = Instant::now();
        let skipped = due(2_000);
        assert!((before..=Instant::now()).contains(&skipped), "the gap is too long");
        assert_eq!(due(2_010) - skipped, Duration::from_secs(1));
        assert_eq!(pace.skipped_gaps, 1);
    }

    #[test]
    fn a_pause_moves_what_is_due_by_its_length() {
        let mut pace = pace(1.0);
        let first = pace.due(1_000_000_000);
        pace.next = None;
        pace.delay(Duration::from_secs(100));
        assert_eq!(pace.due(2_000_000_000) - first, Duration::from_secs(101));
        pace.delay(Duration::from_secs(1));
        assert_eq!(pace.due(2_000_000_000) - first, Duration::from_secs(102));
    }

    #[test]
    fn nothing_is_wanted_of_what_is_over() {
        let (transport, mut pace) = (Transport::default(), pace(0.0));
        assert!(transport.seek(5));
        assert!(!transport.end(), "a seek is waiting");
        assert_eq!(order(&transport, &mut pace, &[]), Order::Seek(5));
        assert_eq!(order(&transport, &mut pace, &[]), Order::Go(0));
        assert!(transport.end());
        assert!(!transport.pause() && !transport.resume() && !transport.step(1));
        transport.stop();
        assert_eq!(transport.progress().state, ReplayState::Ended);
        assert_eq!(order(&transport, &mut pace, &[1]), Order::Stop);
    }

    #[test]
    fn a_speed_is_finite_and_not_negative() {
        for speed in [-1.0, f64::NAN, f64::INFINITY] {
            let error = Pace::new(speed, None).expect_err("it is no speed").to_string();
            assert!(error.contains("finite number of at least 0"), "{error}");
        }
    }
}
