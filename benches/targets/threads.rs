//! What passing events between threads costs: one way of a ping-pong, and streams without a loss.

use crate::harness::{
    CAPACITY, Case, Comparison, P50, P99, P999, Row, Target, Trade, Unit, case, clock_cost,
    median_of_means, nanoseconds, percentiles, pin, two_cpus,
};
use crate::lmax;
use crate::peers::with_disruptor;
use crossbeam_utils::CachePadded;
use disruptor::Producer as _;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::yield_now;
use std::time::{Duration, Instant};
use tickbus::{
    Backend, BackpressureConfig, BusConfig, EventBus, EventBusImpl, EventReader, EventSubscription,
    RingEventBus, WaitStrategy,
};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::TryRecvError as TokioError;

const HOPS: u64 = 20_000;
const PARKED_HOPS: u64 = 4_000;
const WARM_UP_HOPS: u64 = 1_000;
/// Events of a stream, altogether, where every thread has a CPU of its own, and where not.
const STREAM: u64 = 1 << 20;
const CROWDED_STREAM: u64 = 1 << 19;
const BATCH: usize = 64;
const MOST_PRODUCERS: usize = 4;
/// Longer than any round: nobody misses an event.
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) fn comparisons() -> Vec<Comparison> {
    vec![spinning(), parked(), one_to_one(), one_to_three(), four_to_one()]
}

/// Returns a bus whose publishers wait until there is room.
pub(crate) fn patient(backend: Backend, capacity: usize) -> EventBusImpl<Trade> {
    let backpressure = BackpressureConfig { max_block_duration: PATIENCE, ..Default::default() };
    let config = BusConfig { capacity, backpressure, ..Default::default() };
    EventBusImpl::new(backend, config).expect("the capacity is good")
}

fn patient_ring() -> RingEventBus<Trade> {
    match patient(Backend::Ring, CAPACITY) {
        EventBusImpl::Ring(bus) => bus,
        _ => unreachable!("a ring was asked for"),
    }
}

fn subscribe(bus: &impl EventBus<Trade>) -> EventSubscription<Trade> {
    bus.subscribe(CAPACITY).expect("the capacity is good")
}

/// Returns the reader of a stream that takes what there is, at least one event.
fn read_ring(
    bus: &RingEventBus<Trade>,
    wait: WaitStrategy,
) -> impl FnMut(&mut Check) + Send + use<> {
    let mut reader = EventReader::from(subscribe(bus));
    move |check| {
        let read = reader.read_by(wait, CAPACITY, |trade| check.see(trade));
        assert!(read.is_ok(), "a stream without a loss has a hole");
    }
}

/// One direction between two threads: how an event is given, and taken.
type Way<S, R> = (S, R);

/// Returns p50, p99 and p99.9 of one way of a ping-pong between two threads, each bound to a CPU of
/// its own, in nanoseconds: half of each round, less what the clock takes; p50 is a median of means.
pub(crate) fn one_way<S, R, T, Q>(hops: u64, there: Way<S, R>, back: Way<T, Q>) -> Vec<f64>
where
    S: FnMut(Trade) + Send,
    R: FnMut() -> Trade + Send,
    T: FnMut(Trade) + Send,
    Q: FnMut() -> Trade + Send,
{
    let (cpus, clock) = (two_cpus(), clock_cost());
    let ((mut send, mut echo_recv), (mut echo_send, mut recv)) = (there, back);
    let latencies = std::thread::scope(|scope| {
        scope.spawn(move || {
            pin(cpus[1]);
            for _ in 0..WARM_UP_HOPS + hops {
                echo_send(echo_recv());
            }
        });
        let pinging = scope.spawn(move || {
            pin(cpus[0]);
            let rounds = (0..WARM_UP_HOPS + hops).map(|number| {
                let trade = Trade::numbered(number);
                let start = Instant::now();
                send(trade);
                let received = recv();
                let spent = nanoseconds(start.elapsed());
                assert_eq!(received, trade, "another event came back");
                (spent - clock) / 2.0
            });
            rounds.skip(WARM_UP_HOPS as usize).collect::<Vec<_>>()
        });
        pinging.join().expect("the ping-pong does not panic")
    });
    let p50 = median_of_means(&latencies);
    [vec![p50], percentiles(latencies, &[0.99, 0.999])].concat()
}

/// Returns a way over a bus.
pub(crate) fn bus_way(
    bus: EventBusImpl<Trade>,
    wait: WaitStrategy,
) -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let mut reader = EventReader::from(subscribe(&bus));
    let send = move |trade| assert!(bus.publish(trade).is_ok_and(|taken| taken == 1));
    (send, move || reader.recv(wait).expect("the bus is open"))
}

/// Returns a way over a ring with a `Producer`.
fn ring_way(wait: WaitStrategy) -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let bus = patient_ring();
    let mut reader = EventReader::from(subscribe(&bus));
    let mut producer = bus.bus().producer().expect("there is no other");
    let send = move |trade| {
        let _open = &bus;
        assert!(producer.publish(trade).is_ok_and(|taken| taken == 1));
    };
    (send, move || reader.recv(wait).expect("the bus is open"))
}

/// A number that one thread stores and the other looks at: what no way can be faster than.
fn atomic_way() -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let stored = Arc::new(CachePadded::new(AtomicU64::new(u64::MAX)));
    let seen = stored.clone();
    let mut last = u64::MAX;
    let send = move |trade: Trade| stored.store(trade.sequence, Ordering::Release);
    (send, move || {
        loop {
            let number = seen.load(Ordering::Acquire);
            if number != last {
                last = number;
                return Trade::numbered(number);
            }
        }
    })
}

fn rtrb_way() -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let (mut producer, mut consumer) = rtrb::RingBuffer::new(CAPACITY);
    let send = move |trade| assert!(producer.push(trade).is_ok());
    (send, move || {
        loop {
            if let Ok(trade) = consumer.pop() {
                return trade;
            }
        }
    })
}

fn disruptor_way() -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let builder = disruptor::build_single_producer(CAPACITY, Trade::default, disruptor::BusySpin);
    let (mut poller, builder) = builder.new_event_poller();
    let mut producer = builder.build();
    let send = move |trade| producer.publish(|slot| *slot = trade);
    (send, move || {
        loop {
            if let Ok(mut events) = poller.poll()
                && let Some(trade) = (&mut events).next()
            {
                return *trade;
            }
        }
    })
}

fn tokio_way(is_parked: bool) -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let (sender, mut receiver) = broadcast::channel(CAPACITY);
    let send = move |trade| assert!(sender.send(trade).is_ok());
    (send, move || {
        if is_parked {
            return receiver.blocking_recv().expect("the channel is open");
        }
        loop {
            if let Ok(trade) = receiver.try_recv() {
                return trade;
            }
        }
    })
}

fn crossbeam_way(is_parked: bool) -> Way<impl FnMut(Trade) + Send, impl FnMut() -> Trade + Send> {
    let (sender, receiver) = crossbeam_channel::bounded(CAPACITY);
    let send = move |trade| assert!(sender.try_send(trade).is_ok());
    (send, move || {
        if is_parked {
            return receiver.recv().expect("the channel is open");
        }
        loop {
            if let Ok(trade) = receiver.try_recv() {
                return trade;
            }
        }
    })
}

/// Returns a case of a ping-pong over two ways of one kind.
macro_rules! ping_pong {
    ($name:literal, $hops:expr, $way:expr) => {
        ($name, Box::new(|| one_way($hops, $way, $way)) as Box<dyn FnMut() -> Vec<f64>>)
    };
}

fn latency_row(name: &str, figure: usize, against: &'static [&'static str], most: f64) -> Row {
    let target = if most.is_finite() { Target::TimesAsMuch(most) } else { Target::None };
    Row { figure, ..Row::new(name, "Producer", against, target) }
}

fn spinning() -> Comparison {
    const ATOMICS: &[&str] = &["two atomics"];
    let mut cases: Vec<Case> = vec![
        ping_pong!("Producer", HOPS, ring_way(WaitStrategy::Spin)),
        ping_pong!("two atomics", HOPS, atomic_way()),
        ping_pong!("rtrb", HOPS, rtrb_way()),
        ping_pong!("disruptor", HOPS, disruptor_way()),
        ping_pong!("crossbeam", HOPS, crossbeam_way(false)),
        ping_pong!("tokio broadcast", HOPS, tokio_way(false)),
    ];
    cases.extend(lmax::case("LMAX", format!("latency {HOPS}")));
    Comparison {
        cases,
        rows: vec![
            latency_row("one way, spinning, p50", P50, ATOMICS, 1.1),
            latency_row("one way, spinning, p99", P99, ATOMICS, f64::INFINITY),
            latency_row("one way, spinning, p99.9", P999, ATOMICS, 3.0),
        ],
    }
}

fn parked() -> Comparison {
    const PEERS: &[&str] = &["crossbeam", "tokio broadcast"];
    Comparison {
        cases: vec![
            ping_pong!("Producer", PARKED_HOPS, ring_way(WaitStrategy::Park)),
            ping_pong!("crossbeam", PARKED_HOPS, crossbeam_way(true)),
            ping_pong!("tokio broadcast", PARKED_HOPS, tokio_way(true)),
        ],
        rows: vec![
            latency_row("one way, parked, p50", P50, PEERS, f64::INFINITY),
            latency_row("one way, parked, p99", P99, PEERS, f64::INFINITY),
        ],
    }
}

/// What a reader of a stream has seen: every event in the order of its producer, and the sum of what
/// they carry.
#[derive(Debug, Default)]
pub(crate) struct Check {
    next: [u64; MOST_PRODUCERS],
    prices: u64,
    /// How many events it has seen or missed.
    pub(crate) seen: u64,
    pub(crate) missed: u64,
}

impl Check {
    #[inline]
    pub(crate) fn see(&mut self, trade: &Trade) {
        let (producer, number) = trade.origin();
        assert!(number >= self.next[producer], "events are out of order");
        self.next[producer] = number + 1;
        self.prices = self.prices.wrapping_add(trade.price ^ trade.ts_event ^ trade.quantity);
        self.seen += 1;
    }

    pub(crate) fn miss(&mut self, missed: u64) {
        self.missed += missed;
        self.seen += missed;
    }

    /// Ends the run unless everything arrived that so many producers gave, or was told as missed.
    pub(crate) fn assert_complete(&self, producers: usize, each: u64) {
        assert_eq!(self.seen, producers as u64 * each, "received and missed are not the sum");
        if self.missed == 0 {
            let trades = (0..producers)
                .flat_map(|producer| (0..each).map(move |n| Trade::of_producer(producer, n)));
            let prices = |trade: Trade| trade.price ^ trade.ts_event ^ trade.quantity;
            let sum = trades.map(prices).fold(0, u64::wrapping_add);
            assert_eq!(self.prices, sum, "the events are others");
        }
    }
}

/// Returns what an event of a stream costs, in nanoseconds, from the first start to the last end, and
/// how many the readers missed. Each sender gives its share; each receiver is called until it has
/// seen everything. With one of each, both threads are bound to CPUs of their own.
pub(crate) fn stream<S, R>(senders: Vec<S>, receivers: Vec<R>, count: u64) -> (f64, u64)
where
    S: FnMut(Trade) + Send,
    R: FnMut(&mut Check) + Send,
{
    let (producers, readers) = (senders.len(), receivers.len());
    let each = count / producers as u64;
    let (cpus, start) = (two_cpus(), &Barrier::new(producers + readers));
    let bind = move |cpu: usize| {
        if producers + readers == 2 {
            pin(cpus[cpu]);
        }
    };
    let mut missed = 0;
    let spent = std::thread::scope(|scope| {
        let reading: Vec<_> = receivers
            .into_iter()
            .map(|mut receive| {
                scope.spawn(move || {
                    bind(1);
                    let mut check = Check::default();
                    start.wait();
                    while check.seen < producers as u64 * each {
                        receive(&mut check);
                    }
                    (Instant::now(), check)
                })
            })
            .collect();
        let sending: Vec<_> = senders
            .into_iter()
            .enumerate()
            .map(|(producer, mut send)| {
                scope.spawn(move || {
                    bind(0);
                    start.wait();
                    let begun = Instant::now();
                    (0..each).for_each(|number| send(Trade::of_producer(producer, number)));
                    // Whatever closes with the sender stays open until everything was read.
                    (begun, send)
                })
            })
            .collect();
        let sent: Vec<_> =
            sending.into_iter().map(|thread| thread.join().expect("sends do not panic")).collect();
        let mut end = None;
        for thread in reading {
            let (ended, check) = thread.join().expect("readers do not panic");
            check.assert_complete(producers, each);
            missed += check.missed;
            end = end.max(Some(ended));
        }
        let begun = sent.iter().map(|(begun, _)| *begun).min();
        end.zip(begun).map_or(Duration::ZERO, |(end, begun)| end - begun)
    });
    (nanoseconds(spent) / count as f64, missed)
}

/// What a thread does when there is nothing to do: it has a CPU of its own, or has not.
fn wait_for(readers: usize) -> impl Fn() + Copy + Send {
    move || if readers == 1 { spin_loop() } else { yield_now() }
}

/// The same of a thread that reads by a strategy.
fn strategy_for(readers: usize) -> WaitStrategy {
    if readers == 1 { WaitStrategy::Spin } else { WaitStrategy::Yield }
}

/// Sends by a `Producer`.
fn producer_stream<R: FnMut(&mut Check) + Send>(
    bus: &RingEventBus<Trade>,
    receivers: Vec<R>,
    count: u64,
) -> f64 {
    let mut producer = bus.bus().producer().expect("there is no other");
    let readers = receivers.len();
    let send = |trade| assert!(producer.publish(trade).is_ok_and(|taken| taken == readers));
    stream(vec![send], receivers, count).0
}

fn ring_stream(readers: usize, count: u64) -> f64 {
    let bus = patient_ring();
    let receivers = (0..readers).map(|_| read_ring(&bus, strategy_for(readers))).collect();
    producer_stream(&bus, receivers, count)
}

fn ring_stream_one_by_one(count: u64) -> f64 {
    let bus = patient_ring();
    let mut reader = EventReader::from(subscribe(&bus));
    let receive = move |check: &mut Check| {
        check.see(&reader.recv(WaitStrategy::Spin).expect("the bus is open"));
    };
    producer_stream(&bus, vec![receive], count)
}

fn shared_ring_stream(producers: usize, count: u64) -> f64 {
    let bus = patient_ring();
    let receive = read_ring(&bus, strategy_for(producers));
    let sender = || |trade| assert!(bus.publish(trade).is_ok_and(|taken| taken == 1));
    stream((0..producers).map(|_| sender()).collect(), vec![receive], count).0
}

fn rtrb_stream(readers: usize, in_chunks: bool, count: u64) -> f64 {
    let wait = wait_for(readers);
    let (mut producers, consumers): (Vec<_>, Vec<_>) =
        (0..readers).map(|_| rtrb::RingBuffer::<Trade>::new(CAPACITY)).unzip();
    let mut gathered = Vec::with_capacity(BATCH);
    let mut send = move |trade: Trade| {
        if in_chunks {
            gathered.push(trade);
            let is_last = (trade.sequence + 1).is_multiple_of(BATCH as u64);
            for producer in producers.iter_mut().filter(|_| is_last) {
                while producer.push_entire_slice(&gathered).is_err() {
                    wait();
                }
            }
            if is_last {
                gathered.clear();
            }
            return;
        }
        for producer in &mut producers {
            while producer.push(trade).is_err() {
                wait();
            }
        }
    };
    let receivers = consumers
        .into_iter()
        .map(|mut consumer| {
            move |check: &mut Check| {
                if in_chunks && let Ok(chunk) = consumer.read_chunk(consumer.slots().min(BATCH)) {
                    match chunk.is_empty() {
                        true => wait(),
                        false => chunk.into_iter().for_each(|trade| check.see(&trade)),
                    }
                } else if let Ok(trade) = consumer.pop() {
                    check.see(&trade);
                } else {
                    wait();
                }
            }
        })
        .collect();
    stream(vec![&mut send], receivers, count).0
}

/// Sends through a disruptor, whose publishers spin or yield when it is full, and polls.
macro_rules! disruptor_stream {
    ($build:ident, $readers:expr, $crowd:expr, $count:expr, |$producer:pat_param| $senders:expr) => {
        with_disruptor!($build, $readers, |$producer, pollers| {
            let wait = wait_for($crowd);
            let receivers = pollers
                .into_iter()
                .map(|mut poller| {
                    move |check: &mut Check| match poller.poll() {
                        Ok(mut events) => (&mut events).for_each(|trade| check.see(trade)),
                        Err(_) => wait(),
                    }
                })
                .collect();
            stream($senders, receivers, $count).0
        })
    };
}

fn disruptor_single(readers: usize, count: u64) -> f64 {
    disruptor_stream!(build_single_producer, readers, readers, count, |mut producer| {
        let wait = wait_for(readers);
        vec![move |trade| {
            while producer.try_publish(|slot| *slot = trade).is_err() {
                wait();
            }
        }]
    })
}

fn disruptor_multi(producers: usize, count: u64) -> f64 {
    disruptor_stream!(build_multi_producer, 1, producers, count, |producer| {
        let wait = wait_for(producers);
        (0..producers)
            .map(|_| {
                let mut producer = producer.clone();
                move |trade| {
                    while producer.try_publish(|slot| *slot = trade).is_err() {
                        wait();
                    }
                }
            })
            .collect()
    })
}

/// Sends flat out: readers that cannot keep up are told what they miss.
fn tokio_stream(producers: usize, readers: usize, count: u64) -> f64 {
    let wait = wait_for(producers.max(readers));
    let (sender, first) = broadcast::channel(CAPACITY);
    let mut receivers = vec![first];
    receivers.resize_with(readers, || sender.subscribe());
    let receivers = receivers
        .into_iter()
        .map(|mut receiver| {
            move |check: &mut Check| match receiver.try_recv() {
                Ok(trade) => check.see(&trade),
                Err(TokioError::Lagged(missed)) => check.miss(missed),
                Err(_) => wait(),
            }
        })
        .collect();
    let send = || |trade| assert!(sender.send(trade).is_ok());
    stream((0..producers).map(|_| send()).collect(), receivers, count).0
}

fn stream_row(
    name: &str,
    ours: &'static str,
    against: &'static [&'static str],
    target: Target,
) -> Row {
    let unit = Unit::MillionsPerSecond;
    Row { unit, ..Row::new(format!("stream, {name}"), ours, against, target) }
}

fn one_to_one() -> Comparison {
    let mut cases = vec![
        case("ring", || ring_stream(1, STREAM)),
        case("ring, one by one", || ring_stream_one_by_one(STREAM)),
        case("rtrb", || rtrb_stream(1, false, STREAM)),
        case("rtrb, chunks", || rtrb_stream(1, true, STREAM)),
        case("disruptor", || disruptor_single(1, STREAM)),
        case("tokio broadcast, lossy", || tokio_stream(1, 1, STREAM)),
    ];
    cases.extend(lmax::case("LMAX", format!("stream 1 1 {STREAM}")));
    let (rings, tokio): (&[&str], &[&str]) = (&["rtrb", "disruptor"], &["tokio broadcast, lossy"]);
    Comparison {
        cases,
        rows: vec![
            stream_row("1 to 1", "ring", rings, Target::TimesLess(2.5)),
            stream_row("1 to 1, against tokio", "ring", tokio, Target::TimesLess(10.0)),
            stream_row("1 to 1, read one by one", "ring, one by one", rings, Target::None),
        ],
    }
}

fn one_to_three() -> Comparison {
    let mut cases = vec![
        case("ring", || ring_stream(3, CROWDED_STREAM)),
        case("rtrb", || rtrb_stream(3, false, CROWDED_STREAM)),
        case("disruptor", || disruptor_single(3, CROWDED_STREAM)),
        case("tokio broadcast, lossy", || tokio_stream(1, 3, CROWDED_STREAM)),
    ];
    cases.extend(lmax::case("LMAX", format!("stream 1 3 {CROWDED_STREAM}")));
    let row = stream_row("1 to 3", "ring", &["disruptor"], Target::TimesLess(1.0));
    Comparison { cases, rows: vec![row] }
}

fn four_to_one() -> Comparison {
    let mut cases = vec![
        case("ring", || shared_ring_stream(4, CROWDED_STREAM)),
        case("disruptor", || disruptor_multi(4, CROWDED_STREAM)),
        case("tokio broadcast, lossy", || tokio_stream(4, 1, CROWDED_STREAM)),
    ];
    cases.extend(lmax::case("LMAX", format!("stream 4 1 {CROWDED_STREAM}")));
    let row = stream_row("4 to 1", "ring", &["disruptor"], Target::TimesLess(1.0));
    Comparison { cases, rows: vec![row] }
}
