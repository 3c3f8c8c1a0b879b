//! The whole bus with its wakers under shuttle: every scene is played over schedules that shuttle
//! draws, at random and by probabilistic concurrency testing (Burckhardt et al. 2010), and a lost
//! wake-up is a deadlock that shuttle sees. Shuttle is sequentially consistent, so this checks what
//! the whole does; orderings and fences are loom's (`tests/loom.rs`).
//!
//! `make test` plays each scene over a few schedules, `make soak` all of them over a million. A
//! failure prints its backend and its schedule, which play the same again:
//!
//! ```text
//! make shuttle SCENE=a_narrow_reader REPLAY='ring 9103f6...'
//! ```

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(tickbus_shuttle)]

mod support;

use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner, future, thread};
use std::collections::BTreeSet;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, Wake, Waker};
use std::time::Duration;
use support::{FOREVER, assert_row_closes, assert_sums_close};
use tickbus::{
    AsyncEventSubscription, Backend, BackpressureConfig, Bus, BusConfig, Event, EventBus,
    EventBusImpl, EventReader, EventSubscription, EventSystem, EventSystemConfig, EventType,
    Exclusion, Lagged, Lane, LockFreeEventQueue, OverwriteRing, Pattern, Policy, Priority,
    Producers, PublishError, RecvError, RingEventBus, Selected, Shutdown, SourceId,
    SubscribeOptions, Symbol, SystemError, SystemSubscribeOptions, TakeError, ThreadExclusion,
    TryRecvError, WaitStrategy, WakeMode, select,
};

/// What is played, and on which backends.
struct Scene {
    name: &'static str,
    backends: &'static [Backend],
    play: fn(Backend),
}

const ALL: &[Backend] = Backend::ALL;
/// Those that lose nothing if they are told not to.
const LOSSLESS: &[Backend] = &[Backend::LockFree, Backend::Ring];
const RING: &[Backend] = &[Backend::Ring];

/// Makes each scene a test, and a row of what `make soak` plays.
macro_rules! scenes {
    ($($name:ident on $backends:expr;)*) => {
        const SCENES: &[Scene] =
            &[$(Scene { name: stringify!($name), backends: $backends, play: $name }),*];

        mod scene {
            $(#[test]
            fn $name() {
                super::play_a_few(stringify!($name));
            })*
        }
    };
}

scenes! {
    every_reader_gets_what_was_taken_before_the_end_in_order on ALL;
    cancelling_a_recv_loses_nothing_and_doubles_nothing on ALL;
    who_joins_in_the_middle_sees_every_event_from_then_on on ALL;
    a_publisher_goes_on_when_room_is_freed_or_a_reader_leaves on LOSSLESS;
    a_publication_that_is_cancelled_is_nobodys_and_passes_its_turn_on on LOSSLESS;
    a_hole_is_told_exactly_where_events_are_missing on ALL;
    an_event_stays_where_it_is_while_it_is_read on LOSSLESS;
    a_narrow_reader_asleep_is_woken_by_what_it_wants on ALL;
    a_narrow_reader_that_reads_no_more_stops_nobody on LOSSLESS;
    closing_ends_every_wait on LOSSLESS;
    events_published_in_batches_arrive_whole on ALL;
    a_producer_that_is_handed_over_loses_nothing on RING;
    who_selects_among_subscriptions_misses_no_wake_up on LOSSLESS;
    who_only_looks_gets_every_event_and_the_end on ALL;
    a_foreign_loop_that_arms_once_is_woken_for_all_that_comes on ALL;
    a_foreign_loop_that_arms_once_is_woken_for_every_lane on RING;
    a_queue_gives_each_event_to_one_consumer on &[Backend::LockFree];
    nothing_critical_is_lost_silently_and_a_retry_doubles_nothing on RING;
    draining_ends_when_everything_was_read on RING;
    a_lapped_reader_gets_whole_events on RING;
}

/// Schedules of a scene on a backend in `make test`.
const A_FEW: usize = 1_000;

fn config(persistence: FailurePersistence) -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.failure_persistence = persistence;
    // A scene takes some thousands: more is a thread that waits for what will not happen.
    config.max_steps = MaxSteps::FailAfter(200_000);
    config.silence_warnings = true;
    config
}

impl Scene {
    /// Plays it on a backend over so many schedules, and returns over how many it was.
    fn explore(&self, backend: Backend, schedules: usize) -> usize {
        let play = self.play;
        println!("{} on {}", self.name, backend.name());
        if let Ok(replay) = std::env::var("REPLAY") {
            if let Some(schedule) = replay.strip_prefix(backend.name()) {
                let schedule = ReplayScheduler::new_from_encoded(schedule.trim());
                Runner::new(schedule, config(FailurePersistence::None)).run(move || play(backend));
            }
            return schedules;
        }
        let runner = || config(FailurePersistence::Print);
        let at_random = RandomScheduler::new(schedules / 2);
        let played = Runner::new(at_random, runner()).run(move || play(backend));
        let by_priority = PctScheduler::new(4, schedules - schedules / 2);
        played + Runner::new(by_priority, runner()).run(move || play(backend))
    }
}

fn play_a_few(name: &str) {
    let scene = SCENES.iter().find(|scene| scene.name == name).unwrap();
    for &backend in scene.backends {
        assert_eq!(scene.explore(backend, A_FEW), A_FEW, "{}", backend.name());
    }
}

/// Plays all scenes over `SCHEDULES` in all, 10^6 in `make soak`, and says how many they were.
#[test]
fn so_many_schedules_lose_no_wake_up_and_close_every_sum() {
    let wanted: usize = std::env::var("SCHEDULES").map_or(1_000, |n| n.parse().unwrap());
    let plays: Vec<_> =
        SCENES.iter().flat_map(|scene| scene.backends.iter().map(move |&on| (scene, on))).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().unwrap().get();
    let played: usize = std::thread::scope(|scope| {
        let play = || {
            let mut played = 0;
            while let Some((scene, backend)) =
                plays.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
            {
                let schedules = scene.explore(*backend, wanted.div_ceil(plays.len()));
                println!("shuttle: {schedules} schedules: {}, {}", scene.name, backend.name());
                played += schedules;
            }
            played
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(play)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    println!("shuttle: {played} schedules in all");
    assert!(played >= wanted);
}

const PUBLISHERS: usize = 2;

/// The event of a publisher with a number.
fn event(publisher: usize, number: u64) -> u64 {
    (publisher as u64) << 32 | number
}

/// What one reader got.
#[derive(Debug, Default)]
struct Seen {
    /// By publisher, the number after its last event.
    next: [u64; PUBLISHERS],
    events: u64,
    missed: u64,
}

impl Seen {
    /// Notes what was received; false after the end.
    #[track_caller]
    fn note(&mut self, received: Result<u64, RecvError>) -> bool {
        match received {
            Ok(event) => {
                let (publisher, number) = ((event >> 32) as usize, event & 0xFFFF_FFFF);
                let next = &mut self.next[publisher];
                assert!(number >= *next, "{event:#x} came after {next}");
                let skipped = number - *next;
                assert!(skipped <= self.missed, "{skipped} are missing before {event:#x}");
                *next = number + 1;
                self.events += 1;
            }
            Err(RecvError::Lagged(Lagged { missed, .. })) => self.missed += missed,
            Err(_) => return false,
        }
        true
    }
}

/// Reads until so many events were received or missed. In most scenes nobody closes before that:
/// it would wake whom a publisher forgot.
async fn read(subscription: &AsyncEventSubscription<u64>, events: u64) -> Seen {
    let mut seen = Seen::default();
    while seen.events + seen.missed < events {
        assert!(seen.note(subscription.recv().await));
    }
    seen
}

/// How many events those who compete have taken.
#[derive(Default)]
struct Tally {
    taken: Mutex<u64>,
    grown: Condvar,
}

impl Tally {
    fn add_one(&self) {
        *self.taken.lock().unwrap() += 1;
        self.grown.notify_all();
    }

    fn wait_for(&self, events: u64) {
        let taken = self.taken.lock().unwrap();
        drop(self.grown.wait_while(taken, |taken| *taken < events).unwrap());
    }
}

/// A bus whose publishers wait as long as they must; on a ring they hold no lock or do.
fn bus<T: Clone>(backend: Backend, capacity: usize) -> EventBusImpl<T> {
    bus_in(WakeMode::Auto, backend, capacity)
}

fn bus_in<T: Clone>(wake_mode: WakeMode, backend: Backend, capacity: usize) -> EventBusImpl<T> {
    let backpressure = BackpressureConfig { max_block_duration: FOREVER, ..Default::default() };
    // Nothing may depend on the time.
    let latency_sampling = None;
    let producers = match backend {
        Backend::Ring if shuttle::rand::thread_rng().r#gen() => Producers::Strict,
        _ => Producers::Shared,
    };
    EventBusImpl::new(
        backend,
        BusConfig {
            capacity,
            backpressure,
            latency_sampling,
            producers,
            wake_mode,
            ..Default::default()
        },
    )
    .unwrap()
}

/// Room for a few events, so that publishers wait; on a ring also so many that they publish some
/// without asking; on the shared channel so many that none is overwritten.
fn room(backend: Backend) -> usize {
    match backend {
        Backend::Broadcast => 8,
        Backend::Ring if shuttle::rand::thread_rng().r#gen() => 8,
        _ => 2,
    }
}

/// Who wants to lose nothing, as far as the backend can.
fn careful(backend: Backend) -> SubscribeOptions<u64> {
    let policy = if backend == Backend::Broadcast { Policy::DropOldest } else { Policy::Block };
    SubscribeOptions { policy: Some(policy), ..Default::default() }
}

fn awaited(bus: &EventBusImpl<u64>, options: SubscribeOptions<u64>) -> AsyncEventSubscription<u64> {
    bus.subscribe_with(options).unwrap().into()
}

fn join<T>(task: future::JoinHandle<T>) -> T {
    future::block_on(task).unwrap()
}

/// Publishes until the bus is closed, and returns how many were taken.
async fn publish_until_closed(bus: &EventBusImpl<u64>, publisher: usize) -> u64 {
    for number in 0..3 {
        match bus.publish_async(event(publisher, number), None).await {
            Ok(taken) => assert_eq!(taken, 2),
            Err(PublishError::Closed(given_back)) => {
                assert_eq!(given_back, event(publisher, number));
                return number;
            }
            Err(other) => panic!("{other}"),
        }
    }
    3
}

/// Publishers, one a task and one a thread, two readers, and a close at any moment.
fn every_reader_gets_what_was_taken_before_the_end_in_order(backend: Backend) {
    let bus = bus(backend, if backend == Backend::Broadcast { 2 } else { room(backend) });
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let subscription = awaited(&bus, careful(backend));
            future::spawn(async move {
                let mut seen = Seen::default();
                while seen.note(subscription.recv().await) {}
                (seen, subscription)
            })
        })
        .collect();
    let task = {
        let bus = bus.clone();
        future::spawn(async move { publish_until_closed(&bus, 0).await })
    };
    let thread = {
        let bus = bus.clone();
        thread::spawn(move || {
            (0..3).find(|&number| bus.publish(event(1, number)).is_err()).unwrap_or(3)
        })
    };
    let closing = {
        let bus = bus.clone();
        thread::spawn(move || bus.close())
    };
    let taken = [join(task), thread.join().unwrap()];
    closing.join().unwrap();
    for reader in readers {
        let (seen, subscription) = join(reader);
        assert_eq!(seen.events + seen.missed, taken.iter().sum(), "{seen:?}, {taken:?}");
        if backend != Backend::Broadcast {
            assert_eq!((seen.next, seen.missed), (taken, 0));
        }
        let row = subscription.metrics();
        assert_eq!((row.offered, row.delivered), (taken.iter().sum(), seen.events), "{row:?}");
        assert_eq!(row.pending, 0);
        assert_row_closes(&row);
    }
    assert_eq!(bus.metrics().total_published, taken.iter().sum());
}

/// Looks at a future so many times, and then drops it.
async fn cancelled_after<F: Future>(looks: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..looks {
        let look = poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await;
        if let Poll::Ready(output) = look {
            return Some(output);
        }
        future::yield_now().await;
    }
    None
}

/// Two tasks compete for one subscription; one of them cancels, and goes away before the end.
fn cancelling_a_recv_loses_nothing_and_doubles_nothing(backend: Backend) {
    const EVENTS: u64 = 4;
    let bus = bus(backend, room(backend));
    let subscription = Arc::new(awaited(&bus, careful(backend)));
    let tally = Arc::new(Tally::default());
    let fickle = {
        let (subscription, tally) = (subscription.clone(), tally.clone());
        future::spawn(async move {
            let mut seen = Vec::new();
            for looks in [1, 2, 1] {
                if let Some(Ok(event)) = cancelled_after(looks, subscription.recv()).await {
                    seen.push(event);
                    tally.add_one();
                }
            }
            seen
        })
    };
    let patient = {
        let (subscription, tally) = (subscription.clone(), tally.clone());
        future::spawn(async move {
            let mut seen = Vec::new();
            while let Ok(event) = subscription.recv().await {
                seen.push(event);
                tally.add_one();
            }
            seen
        })
    };
    let publishing = {
        let bus = bus.clone();
        thread::spawn(move || {
            for number in 0..EVENTS {
                assert_eq!(bus.publish(number), Ok(1));
            }
        })
    };
    tally.wait_for(EVENTS);
    bus.close();
    let mut all = Vec::new();
    for reader in [fickle, patient] {
        let seen = join(reader);
        assert!(seen.is_sorted(), "each reader keeps the order: {seen:?}");
        all.extend(seen);
    }
    publishing.join().unwrap();
    all.sort_unstable();
    assert_eq!(all, Vec::from_iter(0..EVENTS));
    assert_sums_close(&bus.metrics());
}

/// One publishes; one reads all; two join at any moment, of whom one leaves before the end.
fn who_joins_in_the_middle_sees_every_event_from_then_on(backend: Backend) {
    const EVENTS: u64 = 5;
    let bus = bus(backend, room(backend));
    let standing = awaited(&bus, careful(backend));
    let standing = future::spawn(async move { (read(&standing, EVENTS).await, standing) });
    // The number of the first event whose publication has not begun.
    let begun = Arc::new(AtomicU64::new(0));
    let publishing = {
        let (bus, begun) = (bus.clone(), begun.clone());
        thread::spawn(move || {
            for number in 0..EVENTS {
                begun.store(number + 1, Ordering::SeqCst);
                assert!(bus.publish(number).unwrap() >= 1);
            }
        })
    };
    let guests = [2, EVENTS].map(|stay| {
        let (bus, begun) = (bus.clone(), begun.clone());
        thread::spawn(move || {
            let guest = bus.subscribe_with(careful(backend)).unwrap();
            let from = begun.load(Ordering::SeqCst);
            let mut seen = Vec::new();
            while (seen.len() as u64) < stay && !seen.contains(&(EVENTS - 1)) && from < EVENTS {
                seen.push(guest.recv().unwrap());
            }
            let first = seen.first().copied().unwrap_or(from);
            assert!(first <= from, "{seen:?} from {from}");
            assert_eq!(seen, Vec::from_iter(first..first + seen.len() as u64), "a gap");
            guest.close();
            let row = guest.metrics();
            assert_eq!((row.delivered, row.pending), (seen.len() as u64, 0), "{row:?}");
            assert_eq!(row.dropped.total(), row.dropped.closed, "{row:?}");
            assert_row_closes(&row);
        })
    });
    publishing.join().unwrap();
    guests.into_iter().for_each(|guest| guest.join().unwrap());
    let (seen, _standing) = join(standing);
    assert_eq!((seen.events, seen.missed), (EVENTS, 0));
    assert_sums_close(&bus.metrics());
}

/// Two publishers wait for two readers, of which one leaves after an event.
fn a_publisher_goes_on_when_room_is_freed_or_a_reader_leaves(backend: Backend) {
    const EVENTS: u64 = 2;
    let bus = bus(backend, 1);
    let with = |policy| SubscribeOptions { policy: Some(policy), ..Default::default() };
    let (staying, leaving) =
        (bus.subscribe_with(with(Policy::Block)), bus.subscribe_with(with(Policy::Reject)));
    let (staying, leaving) = (staying.unwrap(), leaving.unwrap());
    let publishing: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let bus = bus.clone();
            let publish = move || -> usize {
                let publish = |number| bus.publish_timeout(event(publisher, number), None, FOREVER);
                (0..EVENTS).map(|number| publish(number).unwrap()).sum()
            };
            thread::spawn(publish)
        })
        .collect();
    let reading = thread::spawn(move || {
        let mut seen = Seen::default();
        (0..EVENTS * PUBLISHERS as u64).for_each(|_| assert!(seen.note(staying.recv())));
        assert_eq!((seen.next, seen.missed), ([EVENTS; PUBLISHERS], 0));
        staying
    });
    let left = thread::spawn(move || {
        assert!(leaving.recv().is_ok());
        leaving.close();
        leaving
    });
    let taken: usize = publishing.into_iter().map(|publisher| publisher.join().unwrap()).sum();
    let rows = [reading, left].map(|reader| reader.join().unwrap().metrics());
    rows.iter().for_each(assert_row_closes);
    assert_eq!(rows[0].offered, EVENTS * PUBLISHERS as u64);
    assert_eq!(rows[0].offered + rows[1].offered, taken as u64, "{rows:?}");
    assert_sums_close(&bus.metrics());
}

/// One waits for room; the other looks twice for each of its events and gives up.
fn a_publication_that_is_cancelled_is_nobodys_and_passes_its_turn_on(backend: Backend) {
    const EVENTS: u64 = 3;
    let bus = bus(backend, 1);
    let reader = bus.subscribe_with(careful(backend)).unwrap();
    let fickle = {
        let bus = bus.clone();
        future::spawn(async move {
            let mut taken = Vec::new();
            for number in 0..EVENTS {
                let event = event(0, number);
                match cancelled_after(2, bus.publish_async(event, None)).await {
                    Some(result) => {
                        assert_eq!(result, Ok(1));
                        taken.push(event);
                    }
                    None => future::yield_now().await,
                }
            }
            taken
        })
    };
    let patient = {
        let bus = bus.clone();
        thread::spawn(move || {
            (0..EVENTS).for_each(|number| assert_eq!(bus.publish(event(1, number)), Ok(1)));
        })
    };
    let reading = thread::spawn(move || {
        let seen: Vec<_> = std::iter::from_fn(|| reader.recv().ok()).collect();
        (seen, reader)
    });
    patient.join().unwrap();
    let taken = join(fickle);
    bus.close();
    let (seen, reader) = reading.join().unwrap();
    let (of_fickle, of_patient): (Vec<u64>, Vec<u64>) = seen.iter().partition(|&&e| e >> 32 == 0);
    assert_eq!(of_fickle, taken);
    assert_eq!(of_patient, Vec::from_iter((0..EVENTS).map(|number| event(1, number))));
    assert_eq!(reader.metrics().offered, seen.len() as u64);
    assert_row_closes(&reader.metrics());
}

/// An event that notices when it is overwritten while it is cloned.
struct Watched(std::sync::atomic::AtomicU64);

impl From<u64> for Watched {
    fn from(number: u64) -> Self {
        Self(number.into())
    }
}

impl Watched {
    fn number(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl Clone for Watched {
    fn clone(&self) -> Self {
        let number = self.number();
        // Others run, with nothing about it that a scheduler could take for waiting.
        thread::sleep(Duration::ZERO);
        assert_eq!(self.number(), number, "it was overwritten while it was read");
        number.into()
    }
}

impl PartialEq<u64> for Watched {
    fn eq(&self, number: &u64) -> bool {
        self.number() == *number
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number().fmt(f)
    }
}

/// One who wants every event and one who wants every second one, both too slow.
fn a_hole_is_told_exactly_where_events_are_missing(backend: Backend) {
    match backend {
        // The channel clones under a lock of the system.
        Backend::Broadcast => holes::<u64>(backend),
        _ => holes::<Watched>(backend),
    }
}

fn holes<T>(backend: Backend)
where
    T: Clone + From<u64> + PartialEq<u64> + fmt::Debug + Send + Sync + 'static,
{
    const EVENTS: u64 = 9;
    let bus = bus::<T>(backend, 2 * room(backend).min(4));
    let topics = ["even", "odd"].map(|name| bus.topic(name).unwrap());
    let reading = [None, Some("odd")].map(|pattern| {
        let reader: EventSubscription<T> = bus
            .subscribe_with(SubscribeOptions {
                pattern: pattern.map(|pattern| Pattern::new(pattern).unwrap()),
                policy: Some(Policy::DropOldest),
                ..Default::default()
            })
            .unwrap();
        thread::spawn(move || {
            let step = if pattern.is_some() { 2 } else { 1 };
            let wanted: Vec<_> = (0..EVENTS).filter(|n| n % step == step - 1).collect();
            let mut found = 0;
            while found < wanted.len() {
                match reader.recv() {
                    Ok(event) => {
                        assert_eq!(event, wanted[found], "after {found}");
                        found += 1;
                    }
                    Err(RecvError::Lagged(Lagged { missed, exact: true })) => {
                        assert!(missed > 0);
                        found += missed as usize;
                    }
                    // It is told how many slots were overwritten, and cannot know which it missed.
                    Err(RecvError::Lagged(_)) => {
                        assert_eq!((backend, step), (Backend::Broadcast, 2));
                        return (reader, 0);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            assert_eq!(found, wanted.len());
            (reader, found as u64)
        })
    });
    let publishing = {
        let bus = bus.clone();
        thread::spawn(move || {
            for number in 0..EVENTS {
                bus.publish_to(&topics[number as usize % 2], number.into()).unwrap();
            }
        })
    };
    publishing.join().unwrap();
    for reading in reading {
        let (reader, found) = reading.join().unwrap();
        let row = reader.metrics();
        assert!(row.offered == found || !row.exact, "{row:?}");
        assert_row_closes(&row);
    }
}

/// Readers that see events in the ring: one loses nothing, two are too slow, of which one is narrow.
fn an_event_stays_where_it_is_while_it_is_read(backend: Backend) {
    const EVENTS: u64 = 8;
    let bus = bus::<Watched>(backend, 2 * room(backend).min(4));
    let topics = ["even", "odd"].map(|name| bus.topic(name).unwrap());
    let kinds =
        [(None, Policy::Block), (None, Policy::DropOldest), (Some("odd"), Policy::DropOldest)];
    let reading = kinds.map(|(pattern, policy)| {
        let options = SubscribeOptions {
            pattern: pattern.map(|pattern| Pattern::new(pattern).unwrap()),
            policy: Some(policy),
            ..Default::default()
        };
        let mut reader = EventReader::from(bus.subscribe_with(options).unwrap());
        thread::spawn(move || {
            let step = if pattern.is_some() { 2 } else { 1 };
            let mut next = step - 1;
            while next < EVENTS {
                let looked = reader.read_by(WaitStrategy::Park, 3, |event| {
                    assert_eq!(*event, next);
                    drop(event.clone());
                    next += step;
                });
                if let Err(error) = looked {
                    let RecvError::Lagged(Lagged { missed, exact: true }) = error else {
                        panic!("{error}")
                    };
                    assert!(policy == Policy::DropOldest && missed > 0);
                    next += step * missed;
                }
            }
            reader
        })
    });
    let publishing = {
        let bus = bus.clone();
        thread::spawn(move || {
            for number in 0..EVENTS {
                bus.publish_to(&topics[number as usize % 2], number.into()).unwrap();
            }
        })
    };
    publishing.join().unwrap();
    for reading in reading {
        let row = reading.join().unwrap().metrics();
        assert_eq!((row.pending, row.dropped.closed), (0, 0));
        assert_row_closes(&row);
    }
}

/// A flood of what it does not want, before and between what it wants.
fn a_narrow_reader_asleep_is_woken_by_what_it_wants(backend: Backend) {
    const WANTED: u64 = 3;
    let bus = bus(backend, room(backend));
    let narrow = awaited(&bus, narrow(backend));
    let reading = future::spawn(async move { (read(&narrow, WANTED).await, narrow) });
    let publishing = [flood(&bus, "wanted", WANTED, 1), flood(&bus, "foreign", 4, 0)];
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    let (seen, narrow) = join(reading);
    assert_eq!((seen.events, seen.missed), (WANTED, 0));
    let row = narrow.metrics();
    assert_eq!((row.offered, row.delivered), (WANTED, WANTED));
    assert_row_closes(&row);
}

/// Once it has what it wants, and a look that took nothing, it is not looked after any more.
fn a_narrow_reader_that_reads_no_more_stops_nobody(backend: Backend) {
    let bus = bus(backend, room(backend));
    let sated = bus.subscribe_with(narrow(backend)).unwrap();
    let reading = thread::spawn(move || {
        assert_eq!(sated.recv_many(2), Ok(vec![0]));
        sated
    });
    let publishing = [flood(&bus, "wanted", 1, 1), flood(&bus, "foreign", 4, 0)];
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    assert_row_closes(&reading.join().unwrap().metrics());
}

fn narrow(backend: Backend) -> SubscribeOptions<u64> {
    SubscribeOptions { pattern: Some(Pattern::new("wanted").unwrap()), ..careful(backend) }
}

/// Publishes events of one topic, of which each has so many takers.
fn flood(
    bus: &EventBusImpl<u64>,
    topic: &str,
    events: u64,
    taken: usize,
) -> thread::JoinHandle<()> {
    let (bus, topic) = (bus.clone(), bus.topic(topic).unwrap());
    thread::spawn(move || {
        (0..events).for_each(|number| assert_eq!(bus.publish_to(&topic, number), Ok(taken)));
    })
}

/// Publishers that wait for one who does not read, and readers of another topic.
fn closing_ends_every_wait(backend: Backend) {
    let bus = bus(backend, 1);
    let stuck = bus.subscribe_with(careful(backend)).unwrap();
    let idle = awaited(&bus, narrow(backend));
    let idle = future::spawn(async move { idle.recv().await });
    let thread = {
        let bus = bus.clone();
        thread::spawn(move || (0..3).take_while(|&number| bus.publish(number).is_ok()).count())
    };
    let task = {
        let bus = bus.clone();
        future::spawn(async move { bus.publish_async(3, None).await.is_ok() })
    };
    bus.close();
    let taken = thread.join().unwrap() + usize::from(join(task));
    assert!(taken <= 1);
    assert_eq!(join(idle), Err(RecvError::Closed));
    assert_eq!(stuck.pending(), taken);
    assert_sums_close(&bus.metrics());
}

/// Two publish batches larger than the room; readers take one by one and in batches.
fn events_published_in_batches_arrive_whole(backend: Backend) {
    const EVENTS: u64 = 3;
    let bus = bus(backend, room(backend));
    let singly = awaited(&bus, careful(backend));
    let in_batches = bus.subscribe_with(careful(backend)).unwrap();
    let all = EVENTS * PUBLISHERS as u64;
    let singly = future::spawn(async move { (read(&singly, all).await, singly) });
    let in_batches = thread::spawn(move || {
        let mut seen = Seen::default();
        while seen.events < all {
            let batch = in_batches.recv_many(2).unwrap();
            batch.into_iter().for_each(|event| assert!(seen.note(Ok(event))));
        }
        (seen, in_batches)
    });
    let publishing: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let bus = bus.clone();
            thread::spawn(move || {
                let batch: Vec<_> = (0..EVENTS).map(|number| event(publisher, number)).collect();
                assert_eq!(bus.publish_batch(None, &batch), Ok(batch.len()));
            })
        })
        .collect();
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    let ((singly, _one), (in_batches, _other)) = (join(singly), in_batches.join().unwrap());
    for seen in [singly, in_batches] {
        assert_eq!((seen.next, seen.missed), ([EVENTS; PUBLISHERS], 0));
    }
    assert_sums_close(&bus.metrics());
}

/// Two have the `Producer` one after the other, while a third publishes through the bus whenever
/// it may.
fn a_producer_that_is_handed_over_loses_nothing(_: Backend) {
    let backpressure = BackpressureConfig { max_block_duration: FOREVER, ..Default::default() };
    let config = BusConfig {
        capacity: room(Backend::Ring),
        backpressure,
        latency_sampling: None,
        ..Default::default()
    };
    let bus = RingEventBus::with_config(config).unwrap();
    let reader = bus.subscribe_with(careful(Backend::Ring)).unwrap();
    let reading = thread::spawn(move || {
        let mut next = [0; 3];
        while next != [2; 3] {
            let event = reader.recv().unwrap();
            let publisher = (event >> 32) as usize;
            assert_eq!(event, self::event(publisher, next[publisher]));
            next[publisher] += 1;
        }
        reader
    });
    let mut publishing: Vec<_> = (0..2)
        .map(|publisher| {
            let bus = bus.clone();
            thread::spawn(move || {
                let mut producer = loop {
                    match bus.bus().producer() {
                        Ok(producer) => break producer,
                        Err(_) => thread::yield_now(),
                    }
                };
                for number in 0..2 {
                    assert_eq!(producer.publish(event(publisher, number)), Ok(1));
                }
            })
        })
        .collect();
    publishing.push({
        let bus = bus.clone();
        thread::spawn(move || {
            for number in 0..2 {
                while let Err(error) = bus.publish(event(2, number)) {
                    assert_eq!(error, PublishError::Reserved(event(2, number)));
                    thread::yield_now();
                }
            }
        })
    });
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    assert_eq!(bus.metrics().total_published, 6);
    let reader = reading.join().unwrap();
    assert_eq!((reader.metrics().delivered, reader.pending()), (6, 0));
    assert_sums_close(&bus.metrics());
}

/// A thread sleeps on two subscriptions and a signal, and leaves all that is in one of them to
/// another.
fn who_selects_among_subscriptions_misses_no_wake_up(backend: Backend) {
    const EVENTS: u64 = 2;
    let bus = bus(backend, room(backend));
    let shutdown = Shutdown::new();
    let shared = Arc::new(bus.subscribe_with(careful(backend)).unwrap());
    let own = bus.subscribe_with(careful(backend)).unwrap();
    let selecting = {
        let (shutdown, shared) = (shutdown.clone(), shared.clone());
        thread::spawn(move || {
            let (mut taken, mut ended) = (0, false);
            while taken < EVENTS || !ended {
                match select(&[&own, &shared], (!ended).then_some(&shutdown), None) {
                    Selected::Ready(0) => {
                        assert_eq!(own.try_recv(), Ok(taken));
                        taken += 1;
                    }
                    Selected::Ready(_) => thread::yield_now(),
                    Selected::Shutdown => ended = true,
                    Selected::TimedOut => panic!("there was no deadline"),
                }
            }
            own
        })
    };
    let competing = {
        let shared = shared.clone();
        thread::spawn(move || {
            (0..EVENTS).for_each(|number| assert_eq!(shared.recv(), Ok(number)));
        })
    };
    let ending = thread::spawn(move || shutdown.set());
    (0..EVENTS).for_each(|number| assert_eq!(bus.publish(number), Ok(2)));
    [ending, competing].into_iter().for_each(|thread| thread.join().unwrap());
    let own = selecting.join().unwrap();
    for subscription in [&*shared, &own] {
        assert_eq!(subscription.pending(), 0);
        assert_row_closes(&subscription.metrics());
    }
}

/// Threads read in every way that there is from a bus that wakes nobody; publishers wait for room,
/// and are told of it.
fn who_only_looks_gets_every_event_and_the_end(backend: Backend) {
    let bus = bus_in(WakeMode::Polling, backend, room(backend));
    let ways: [fn(EventSubscription<u64>) -> Seen; 3] = [
        |reader| {
            let mut seen = Seen::default();
            while seen.note(reader.recv()) {}
            seen
        },
        |reader| {
            let (mut seen, mut reader) = (Seen::default(), EventReader::from(reader));
            while seen.note(reader.recv(WaitStrategy::Park)) {}
            seen
        },
        |reader| {
            let mut seen = Seen::default();
            while {
                assert_eq!(select(&[&reader], None, None), Selected::Ready(0));
                seen.note(reader.recv())
            } {}
            seen
        },
    ];
    let readers = ways.map(|way| {
        let reader = bus.subscribe_with(careful(backend)).unwrap();
        thread::spawn(move || way(reader))
    });
    let publishers = [0, 1].map(|publisher| {
        let bus = bus.clone();
        thread::spawn(move || {
            (0..3).for_each(|number| assert_eq!(bus.publish(event(publisher, number)), Ok(3)));
        })
    });
    publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
    bus.close();
    for reader in readers {
        let seen = reader.join().unwrap();
        assert_eq!((seen.next, seen.events, seen.missed), ([3, 3], 6, 0));
    }
}

/// What a loop of another runtime sleeps on.
struct Loop(thread::Thread);

impl Wake for Loop {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Loop {
    /// Calls `take` whenever it is woken, until that says that it is done.
    fn run(mut is_done: impl FnMut() -> bool) {
        while !is_done() {
            thread::park();
        }
    }

    fn waker() -> Waker {
        Arc::new(Self(thread::current())).into()
    }
}

/// It reads what is there when it is woken, and stays armed.
fn a_foreign_loop_that_arms_once_is_woken_for_all_that_comes(backend: Backend) {
    const EVENTS: u64 = 3;
    let bus = bus(backend, room(backend));
    let subscription = bus.subscribe_with(careful(backend)).unwrap();
    let reading = thread::spawn(move || {
        assert_eq!(subscription.set_waker(Loop::waker()), Ok(true));
        subscription.arm();
        let mut seen = Seen::default();
        Loop::run(|| {
            while let Ok(event) = subscription.try_recv() {
                assert!(seen.note(Ok(event)));
            }
            seen.next == [EVENTS; PUBLISHERS]
        });
        subscription.disarm();
        subscription
    });
    let publishing: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let bus = bus.clone();
            thread::spawn(move || {
                (0..EVENTS).for_each(|n| assert_eq!(bus.publish(event(publisher, n)), Ok(1)));
            })
        })
        .collect();
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    let subscription = reading.join().unwrap();
    assert_eq!(subscription.pending(), 0);
    assert_sums_close(&bus.metrics());
}

/// As above, with a look at all lanes before anything is taken.
fn a_foreign_loop_that_arms_once_is_woken_for_every_lane(_: Backend) {
    let system = system(8);
    let subscription = system.subscribe(SystemSubscribeOptions::default()).unwrap();
    let types = [EventType::EmergencyStop, EventType::PriceUpdate, EventType::PriceUpdate];
    let reading = thread::spawn(move || {
        assert_eq!(subscription.set_waker(Loop::waker()), Ok(true));
        subscription.arm();
        let take = || match subscription.try_recv() {
            Ok(_) => Some(1),
            Err(TakeError::Lagged(lagged)) => Some(lagged.missed),
            Err(_) => None,
        };
        let mut seen = 0;
        Loop::run(|| {
            seen += std::iter::from_fn(take).sum::<u64>();
            // As a loop does that asks how many of its tasks have a reason to be woken.
            while subscription.is_ready() {
                seen += take().unwrap();
            }
            seen == 2 * types.len() as u64
        });
        subscription.disarm();
        subscription
    });
    let publishing = types.map(|event_type| {
        let system = system.clone();
        thread::spawn(move || {
            (0..2).for_each(|n| assert_eq!(system.publish(compact(event_type, n)).unwrap(), 1));
        })
    });
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    assert_eq!(reading.join().unwrap().pending(), 0);
}

/// Producers and consumers, a thread and a task of each.
fn a_queue_gives_each_event_to_one_consumer(_: Backend) {
    const EVENTS: u64 = 3;
    let queue = LockFreeEventQueue::new(1).unwrap();
    let tally = Arc::new(Tally::default());
    let consumers = {
        let (first, second) = (queue.clone(), queue.clone());
        let (by_thread, by_task) = (tally.clone(), tally.clone());
        let thread = thread::spawn(move || {
            let taken = std::iter::from_fn(|| first.dequeue().ok());
            taken.inspect(|_| by_thread.add_one()).collect()
        });
        let task = future::spawn(async move {
            let mut taken = Vec::new();
            while let Ok(event) = second.dequeue_async().await {
                taken.push(event);
                by_task.add_one();
            }
            taken
        });
        (thread, task)
    };
    let producers = {
        let (first, second) = (queue.clone(), queue.clone());
        let thread = thread::spawn(move || {
            (0..EVENTS).for_each(|number| first.enqueue_timeout(number, FOREVER).unwrap());
        });
        let task = future::spawn(async move {
            for number in EVENTS..2 * EVENTS {
                second.enqueue_async(number).await.unwrap();
            }
        });
        (thread, task)
    };
    producers.0.join().unwrap();
    join(producers.1);
    tally.wait_for(2 * EVENTS);
    queue.close();
    let mut all: Vec<u64> = consumers.0.join().unwrap();
    all.extend(join(consumers.1));
    all.sort_unstable();
    assert_eq!(all, Vec::from_iter(0..2 * EVENTS));
    assert!(queue.is_empty());
}

fn system(critical_capacity: usize) -> EventSystem {
    EventSystem::new(EventSystemConfig {
        critical_capacity,
        high_capacity: room(Backend::Ring),
        normal_capacity: room(Backend::Ring),
        max_block_duration: Duration::ZERO,
        latency_sampling: None,
        ..Default::default()
    })
    .unwrap()
}

fn compact(event_type: EventType, metadata: u64) -> Event {
    let (source_id, symbol, priority) = (SourceId::NONE, Symbol::NONE, Priority::Normal);
    Event { timestamp: 0, event_type, priority, source_id, symbol, value: 0.0, metadata }
}

/// Two readers with room for one critical event, and two publishers that try again for who misses
/// one.
fn nothing_critical_is_lost_silently_and_a_retry_doubles_nothing(_: Backend) {
    const EVENTS: u64 = 2;
    let all = EVENTS * PUBLISHERS as u64;
    let system = system(1);
    let reading: Vec<_> = (0..2)
        .map(|_| {
            let reader = system.subscribe(SystemSubscribeOptions::default()).unwrap();
            future::spawn(async move {
                let (mut critical, mut normal, mut missed) = (Vec::new(), 0, 0);
                while critical.len() < all as usize || normal + missed < all {
                    match reader.recv_async().await {
                        Ok(event) if event.lane() == Lane::Critical => {
                            critical.push(event.metadata)
                        }
                        Ok(_) => normal += 1,
                        Err(TakeError::Lagged(lagged)) => {
                            missed += u64::from(lagged.lane == Lane::Normal) * lagged.missed;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                let each = BTreeSet::from_iter(&critical);
                assert_eq!(each.len(), critical.len(), "a retry doubled one: {critical:?}");
                assert_eq!(normal + missed, all);
                reader
            })
        })
        .collect();
    let publishing: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let system = system.clone();
            thread::spawn(move || {
                for number in 0..EVENTS {
                    let critical = compact(EventType::EmergencyStop, event(publisher, number));
                    let mut outcome = system.publish(critical);
                    while let Err(SystemError::Overflow(overflow)) = outcome {
                        assert_eq!(overflow.taken() + overflow.missing().len(), 2);
                        thread::yield_now();
                        outcome = overflow.retry().map_err(SystemError::from).map(|_| 2);
                    }
                    assert_eq!(outcome.unwrap(), 2);
                    let normal = compact(EventType::PriceUpdate, event(publisher, number));
                    assert_eq!(system.publish(normal).unwrap(), 2);
                }
            })
        })
        .collect();
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    let readers: Vec<_> = reading.into_iter().map(join).collect();
    assert!(readers.iter().all(|reader| reader.pending() == 0));
    assert_eq!(system.total_events(), 2 * all);
    let metrics = system.metrics();
    Lane::ALL.iter().for_each(|&lane| assert_sums_close(metrics.lane(lane)));
}

/// `drain` sleeps until the readers have read everything or have left.
fn draining_ends_when_everything_was_read(_: Backend) {
    let system = system(1);
    let [reading, leaving] =
        [0, 1].map(|_| system.subscribe(SystemSubscribeOptions::default()).unwrap());
    assert_eq!(system.publish(compact(EventType::EmergencyStop, 0)).unwrap(), 2);
    assert_eq!(system.publish(compact(EventType::PriceUpdate, 1)).unwrap(), 2);
    let reading = future::spawn(async move {
        let mut events = 0;
        while reading.recv_async().await.is_ok() {
            events += 1;
        }
        events
    });
    let leaving = thread::spawn(move || leaving.close());
    assert_eq!(system.drain(None), 0);
    assert_eq!(system.pending(), 0);
    assert_eq!(join(reading), 2);
    leaving.join().unwrap();
}

/// The ring whose publisher never waits: words that are read while they are overwritten are noticed.
fn a_lapped_reader_gets_whole_events(_: Backend) {
    const EVENTS: u64 = 6;
    let (mut publisher, ring) = OverwriteRing::new(2).unwrap();
    let mut reader = ring.reader();
    let reading = thread::spawn(move || {
        let mut next = 0;
        loop {
            match reader.try_recv() {
                Ok(event) => {
                    assert_eq!(event, [next, !next], "torn, or another one");
                    next += 1;
                }
                Err(TryRecvError::Lagged(Lagged { missed, .. })) => next += missed,
                Err(TryRecvError::Closed) => break,
                Err(_) => thread::yield_now(),
            }
        }
        assert_eq!(next, EVENTS);
        assert_eq!(reader.delivered() + reader.overwritten(), EVENTS);
    });
    (0..EVENTS).for_each(|number| publisher.publish(&[number, !number]));
    drop(publisher);
    reading.join().unwrap();
}

/// Twins of the scenes in which one thing is missing: shuttle has to find that.
mod twins {
    use super::support::serial::Serial;
    use super::*;

    /// Plays over schedules that are the same each time.
    fn explore(twin: fn()) {
        let scheduler = RandomScheduler::new_from_seed(7, 10_000);
        Runner::new(scheduler, config(FailurePersistence::None)).run(twin);
    }

    /// Two readers of a foreign loop that arm at the same time, of which one then gives up.
    fn two_that_arm<R: Exclusion>()
    where
        Bus<u64, R>: Send,
        EventSubscription<u64, R>: Send + Sync,
    {
        let config = BusConfig { capacity: 2, latency_sampling: None, ..Default::default() };
        let bus = Bus::<u64, R>::new(Backend::LockFree, config).unwrap();
        let reader = Arc::new(bus.subscribe_with(SubscribeOptions::default()).unwrap());
        let mut publishing = None;
        // Not a thread that parks: it may wake up without a reason.
        let event = future::block_on(poll_fn(|context| {
            if publishing.is_none() {
                assert_eq!(reader.set_waker(context.waker().clone()), Ok(true));
                let arming = [0, 1].map(|_| {
                    let reader = reader.clone();
                    thread::spawn(move || reader.arm())
                });
                arming.into_iter().for_each(|arming| arming.join().unwrap());
                reader.disarm();
                // The end of the bus would wake whom a publisher forgot.
                let own = bus.clone();
                publishing =
                    Some(thread::spawn(move || own.publish_ready(7, None, own.enter()).unwrap()));
            }
            reader.try_recv().map_or(Poll::Pending, Poll::Ready)
        }));
        assert_eq!((event, publishing.unwrap().join().unwrap()), (7, 1));
    }

    #[test]
    fn of_two_that_arm_at_the_same_time_none_is_forgotten() {
        explore(two_that_arm::<ThreadExclusion>);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn those_that_arm_and_are_not_serialized_are_forgotten() {
        explore(two_that_arm::<Serial>);
    }

    /// A reader made from the parts that the bus offers for foreign loops.
    fn a_reader_of_parts(looks_again: bool) {
        let bus = bus::<u64>(Backend::Ring, 2);
        let reader = bus.subscribe_with(careful(Backend::Ring)).unwrap();
        let reading = future::spawn(async move {
            loop {
                if let Ok(event) = reader.try_recv() {
                    return event;
                }
                let mut asleep = reader.place_in_line().unwrap();
                asleep.enter();
                reader.arm();
                if !looks_again || !reader.is_ready() {
                    asleep.await;
                }
                reader.disarm();
            }
        });
        assert_eq!(bus.publish(7), Ok(1));
        assert_eq!(join(reading), 7);
    }

    #[test]
    fn a_reader_that_looks_again_is_woken() {
        explore(|| a_reader_of_parts(true));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn a_reader_that_does_not_look_again_sleeps_on() {
        explore(|| a_reader_of_parts(false));
    }
}
