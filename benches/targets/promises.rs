//! The promised figures, for every backend and number of subscribers, as a table of their own.
//!
//! - *Publish p50* is of batches, as in the other table; *p99* is of single calls, each less what the
//!   clock itself takes.
//! - *Events a second*: from a thread that publishes flat out until another thread has read
//!   everything from every subscription in turn, each on a CPU of its own; *lost* is what it was told
//!   to have missed.
//! - *Thread to thread* is one way of a ping-pong.

use crate::counting::allocations;
use crate::harness::{
    Arguments, CAPACITY, Case, P50, P99, Trade, Unit, assert_all_arrived, clock_cost, medians,
    nanoseconds, percentiles, publish_cost, verdict,
};
use crate::threads::{Check, bus_way, one_way, patient, stream};
use std::ops::Range;
use std::time::Instant;
use tickbus::{
    Backend, Event, EventBus, EventBusImpl, EventReader, EventSubscription, EventSystem, EventType,
    Priority, SourceId, Symbol, SystemSubscribeOptions, SystemSubscription, TryRecvError,
    WaitStrategy,
};

const SUBSCRIBERS: [usize; 3] = [1, 4, 16];
const SYSTEM: &str = "EventSystem";
/// Events of a stream, counted once for each subscription.
const STREAM: u64 = 1 << 20;
const HOPS: u64 = 5_000;
/// Events published between two readings.
const BATCH: u64 = CAPACITY as u64;
/// Batches of single calls.
const TIMED_BATCHES: u64 = 64;

/// A figure that is promised of each column of a table.
struct Promise {
    name: String,
    target: &'static str,
    /// Which of the figures of its cases.
    figure: usize,
    is_kept: fn(f64) -> bool,
    show: fn(f64) -> String,
    /// The column to which it is not promised.
    exempt: &'static str,
}

impl Promise {
    fn cost(
        name: impl Into<String>,
        target: &'static str,
        figure: usize,
        most: fn(f64) -> bool,
    ) -> Self {
        let show = |cost| Unit::Nanoseconds.show(cost);
        Self { name: name.into(), target, figure, is_kept: most, show, exempt: "" }
    }

    fn none(name: impl Into<String>, figure: usize) -> Self {
        let show = |count| format!("{count}");
        Self {
            name: name.into(),
            target: "0",
            figure,
            is_kept: |count| count == 0.0,
            show,
            exempt: "",
        }
    }
}

/// Cases by column, and what is promised of them.
struct Group {
    cases: Vec<Case>,
    promises: Vec<Promise>,
}

/// Measures, prints the table, and returns how many promises were not kept.
pub(crate) fn measure(arguments: &Arguments) -> usize {
    let columns: Vec<&str> =
        Backend::ALL.iter().map(|backend| backend.name()).chain([SYSTEM]).collect();
    println!("| promised | target | {} |", columns.join(" | "));
    println!("|---|---|{}", "---:|".repeat(columns.len()));
    let mut missed = 0;
    for Group { cases, mut promises } in groups() {
        promises.retain(|promise| arguments.wants(&promise.name));
        if promises.is_empty() {
            continue;
        }
        let medians = medians(cases, arguments.rounds);
        for Promise { name, target, figure, is_kept, show, exempt } in promises {
            let cell = |column: &&str| match medians.get(column) {
                None => String::new(),
                Some(figures) => {
                    let figure = figures[figure];
                    let is_promised = *column != exempt;
                    let verdict = verdict(is_promised.then(|| is_kept(figure)));
                    format!("{} {verdict}", show(figure))
                }
            };
            let cells: Vec<_> = columns.iter().map(cell).collect();
            missed += cells.iter().filter(|cell| cell.ends_with("FAIL")).count();
            println!("| {name} | {target} | {} |", cells.join(" | "));
        }
    }
    missed
}

fn groups() -> Vec<Group> {
    let mut groups: Vec<_> = SUBSCRIBERS.into_iter().map(publishing).collect();
    groups.extend(SUBSCRIBERS.map(critical));
    groups.extend(SUBSCRIBERS.map(streaming));
    groups.extend([("spinning", WaitStrategy::Spin), ("parked", WaitStrategy::Park)].map(hopping));
    groups.extend(SUBSCRIBERS.map(allocating));
    let size = || Box::new(|| vec![size_of::<Event>() as f64]);
    groups.push(Group {
        cases: vec![(SYSTEM, size())],
        promises: vec![Promise {
            target: "32",
            is_kept: |bytes| bytes == 32.0,
            ..Promise::none("bytes of an event", P50)
        }],
    });
    groups
}

/// Returns a case for each backend.
fn of_backends(run: impl Fn(Backend) -> Vec<f64> + Copy + 'static) -> Vec<Case> {
    let case = |&backend: &Backend| -> Case { (backend.name(), Box::new(move || run(backend))) };
    Backend::ALL.iter().map(case).collect()
}

fn with_subscribers(name: &str, k: usize) -> String {
    format!("{name}, {k} subscribers")
}

/// Returns p50 of batches and p99 of single calls.
fn publish_figures(
    k: usize,
    mut publish: impl FnMut(Trade),
    mut check: impl FnMut(Range<u64>),
) -> Vec<f64> {
    let mut end = 0;
    let in_batches = publish_cost(k, &mut publish, |batch| {
        end = batch.end;
        check(batch);
    });
    let clock = clock_cost();
    let mut single = Vec::with_capacity((TIMED_BATCHES * BATCH) as usize);
    for first in (0..TIMED_BATCHES).map(|number| end + number * BATCH) {
        for number in first..first + BATCH {
            let trade = Trade::numbered(number);
            let start = Instant::now();
            publish(trade);
            single.push(nanoseconds(start.elapsed()) - clock);
        }
        check(first..first + BATCH);
    }
    vec![in_batches, percentiles(single, &[0.99])[0]]
}

fn subscribe(bus: &EventBusImpl<Trade>, k: usize) -> Vec<EventSubscription<Trade>> {
    (0..k).map(|_| bus.subscribe(CAPACITY).expect("the capacity is good")).collect()
}

fn publish_on_bus(backend: Backend, k: usize) -> Vec<f64> {
    let bus = patient(backend, CAPACITY);
    let subscriptions = subscribe(&bus, k);
    let publish = |trade| assert!(bus.publish(trade).is_ok_and(|taken| taken == k));
    publish_figures(k, publish, |batch| {
        for subscription in &subscriptions {
            assert_all_arrived(batch.clone(), || subscription.try_recv().ok());
        }
    })
}

/// Returns a compact event that says the same as a trade with this number.
fn event(event_type: EventType, number: u64) -> Event {
    Event {
        timestamp: number,
        event_type,
        priority: Priority::Normal,
        source_id: SourceId::NONE,
        symbol: Symbol::NONE,
        value: number as f64,
        metadata: !number,
    }
}

fn subscribe_to_system(system: &EventSystem, k: usize) -> Vec<SystemSubscription> {
    let all = SystemSubscribeOptions::default;
    (0..k).map(|_| system.subscribe(all()).expect("the options are good")).collect()
}

fn publish_on_system(event_type: EventType, k: usize) -> Vec<f64> {
    let system = EventSystem::new(Default::default()).expect("the numbers are good");
    let subscriptions = subscribe_to_system(&system, k);
    let publish = |trade: Trade| {
        let taken = system.publish(event(event_type, trade.sequence));
        assert!(taken.is_ok_and(|taken| taken == k));
    };
    publish_figures(k, publish, |batch| {
        for subscription in &subscriptions {
            for number in batch.clone() {
                let expected = event(event_type, number);
                assert!(subscription.try_recv().is_ok_and(|found| found == expected));
            }
            assert!(subscription.try_recv().is_err(), "there are more events");
        }
    })
}

fn publishing(k: usize) -> Group {
    let mut cases = of_backends(move |backend| publish_on_bus(backend, k));
    cases.push((SYSTEM, Box::new(move || publish_on_system(EventType::PriceUpdate, k))));
    let promise = |name: &str, figure| {
        Promise::cost(with_subscribers(name, k), "< 1 us", figure, |cost| cost < 1e3)
    };
    Group { cases, promises: vec![promise("publish p50", P50), promise("publish p99", P99)] }
}

fn critical(k: usize) -> Group {
    let name = with_subscribers("publish of a critical event, p50", k);
    Group {
        cases: vec![(SYSTEM, Box::new(move || publish_on_system(EventType::EmergencyStop, k)))],
        promises: vec![Promise::cost(name, "<= 100 ns", P50, |cost| cost <= 100.0)],
    }
}

/// What a thread that reads several subscriptions in turn has seen of each.
struct Reading {
    reader: EventReader<Trade>,
    check: Check,
}

impl Reading {
    /// Reads what is there, and returns how many events it has seen or missed.
    fn go_on(&mut self) -> u64 {
        let check = &mut self.check;
        match self.reader.read(CAPACITY, |trade| check.see(trade)) {
            Ok(_) => {}
            Err(TryRecvError::Lagged(lagged)) => check.miss(lagged.missed),
            Err(error) => assert_eq!(error, TryRecvError::Empty, "the bus is open"),
        }
        check.seen
    }
}

/// Returns what an event costs that a thread publishes flat out until another has read it from every
/// subscription, and how many were missed.
fn stream_on_bus(backend: Backend, k: usize) -> Vec<f64> {
    let bus = patient(backend, CAPACITY);
    let count = STREAM / k as u64;
    let mut readings: Vec<_> = subscribe(&bus, k)
        .into_iter()
        .map(|subscription| Reading { reader: subscription.into(), check: Check::default() })
        .collect();
    let receive = move |all: &mut Check| {
        let seen = readings.iter_mut().map(Reading::go_on).min();
        if seen == Some(count) {
            let missed = readings.iter().map(|reading| reading.check.missed).sum();
            for reading in &mut readings {
                reading.check.assert_complete(1, count);
                *all = std::mem::take(&mut reading.check);
            }
            all.missed = missed;
        }
    };
    let send = |trade| assert!(bus.publish(trade).is_ok_and(|taken| taken == k));
    let (cost, missed) = stream(vec![send], vec![receive], count);
    vec![cost, missed as f64]
}

fn streaming(k: usize) -> Group {
    let per_second = Promise {
        name: with_subscribers("events a second", k),
        target: ">= 1 M/s",
        figure: 0,
        is_kept: |cost| cost <= 1e3,
        show: |cost| Unit::MillionsPerSecond.show(cost),
        exempt: "",
    };
    let lost = with_subscribers(&format!("lost of {STREAM}, the others in order"), k);
    // It can only overwrite what is not read in time.
    let lost = Promise { exempt: "broadcast", ..Promise::none(lost, 1) };
    let cases = of_backends(move |backend| stream_on_bus(backend, k));
    Group { cases, promises: vec![per_second, lost] }
}

/// Returns a way over an event system.
fn system_way(wait: WaitStrategy) -> (impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send) {
    let system = EventSystem::new(Default::default()).expect("the numbers are good");
    let all = SystemSubscribeOptions::default();
    let subscription = system.subscribe(all).expect("the options are good");
    let send = move |trade: Trade| {
        let taken = system.publish(event(EventType::PriceUpdate, trade.sequence));
        assert!(taken.is_ok_and(|taken| taken == 1));
    };
    let recv = move || {
        let event = match wait {
            WaitStrategy::Park => subscription.recv().expect("the system is open"),
            _ => loop {
                if let Ok(event) = subscription.try_recv() {
                    break event;
                }
            },
        };
        Trade::numbered(event.timestamp)
    };
    (send, recv)
}

fn hopping((name, wait): (&str, WaitStrategy)) -> Group {
    let way = move |backend| bus_way(patient(backend, CAPACITY), wait);
    let mut cases = of_backends(move |backend| one_way(HOPS, way(backend), way(backend)));
    let in_system = move || one_way(HOPS, system_way(wait), system_way(wait));
    cases.push((SYSTEM, Box::new(in_system)));
    let promise = |figure, percentile| {
        let name = format!("thread to thread, {name}, {percentile}");
        Promise::cost(name, "< 10 us", figure, |cost| cost < 1e4)
    };
    Group { cases, promises: vec![promise(P50, "p50"), promise(P99, "p99")] }
}

fn allocating(k: usize) -> Group {
    let mut cases = of_backends(move |backend| {
        let bus = patient(backend, CAPACITY);
        let subscriptions = subscribe(&bus, k);
        let work = || {
            for number in 0..BATCH {
                assert_eq!(bus.publish(Trade::numbered(number)), Ok(k));
                for subscription in &subscriptions {
                    assert_eq!(subscription.recv(), Ok(Trade::numbered(number)));
                }
            }
        };
        vec![allocations(work) as f64]
    });
    let in_system = move || {
        let system = EventSystem::new(Default::default()).expect("the numbers are good");
        let subscriptions = subscribe_to_system(&system, k);
        let work = || {
            for number in 0..BATCH {
                for event_type in [EventType::PriceUpdate, EventType::EmergencyStop] {
                    let event = event(event_type, number);
                    assert!(system.publish(event).is_ok_and(|taken| taken == k));
                    for subscription in &subscriptions {
                        assert!(subscription.recv().is_ok_and(|found| found == event));
                    }
                }
            }
        };
        vec![allocations(work) as f64]
    };
    cases.push((SYSTEM, Box::new(in_system)));
    let name = with_subscribers("allocations in 1,024 publishes and receives", k);
    Group { cases, promises: vec![Promise::none(name, P50)] }
}
