//! Publishing and receiving allocate nothing: counted by the allocator, per thread.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

#[path = "support/counting.rs"]
mod counting;
mod support;

use counting::{ALLOCATIONS, REPEATED, allocations};
use std::future::Future;
use std::task::{Context, Poll, Waker};
use support::{FOREVER, assert_sums_close, bus_that_keeps, patient_bus};
use tickbus::{
    AsyncEventSubscription, Backend, Event, EventBus, EventBusImpl, EventSubscription, EventSystem,
    EventSystemConfig, EventType, KeyFn, Lane, Pattern, Policy, Priority, SourceId,
    SubscribeOptions, Symbol, SystemSubscribeOptions, SystemSubscription, TryRecvError,
};

#[derive(Debug, Clone, Copy, PartialEq)]
struct Tick([u64; 4]);

const _: () = assert!(size_of::<Tick>() == 32, "bytes");

const SUBSCRIBERS: [usize; 3] = [1, 4, 16];
const ROUNDS: u64 = 1_000;

fn tick(number: u64) -> Tick {
    Tick([number; 4])
}

fn new_bus(backend: Backend) -> EventBusImpl<Tick> {
    patient_bus(backend, 64, FOREVER)
}

fn subscriptions(bus: &EventBusImpl<Tick>, count: usize) -> Vec<EventSubscription<Tick>> {
    (0..count).map(|_| bus.subscribe(64).unwrap()).collect()
}

#[test]
fn the_allocator_counts() {
    assert!(allocations(|| drop(Box::new(1))) >= 2);
}

#[test]
fn a_publish_and_a_recv_allocate_nothing() {
    for &backend in Backend::ALL {
        for count in SUBSCRIBERS {
            let bus = new_bus(backend);
            let subscriptions = subscriptions(&bus, count);
            let allocated = allocations(|| {
                for number in 0..ROUNDS {
                    assert_eq!(bus.publish(tick(number)), Ok(count));
                    for subscription in &subscriptions {
                        assert_eq!(subscription.recv(), Ok(tick(number)));
                    }
                }
            });
            assert_eq!(allocated, 0, "{}, {count} subscriptions", backend.name());
            assert_sums_close(&bus.metrics());
        }
    }
}

#[test]
fn a_publish_on_a_topic_allocates_nothing() {
    for &backend in Backend::ALL {
        let bus = new_bus(backend);
        let pattern = Some(Pattern::new("trades.*").unwrap());
        let trades =
            bus.subscribe_with(SubscribeOptions { pattern, ..Default::default() }).unwrap();
        let wanted = bus.topic("trades.BTC").unwrap();
        let unwanted = bus.topic("quotes.BTC").unwrap();
        let allocated = allocations(|| {
            for number in 0..ROUNDS {
                assert_eq!(bus.publish_to(&wanted, tick(number)), Ok(1));
                assert_eq!(bus.publish_to(&unwanted, tick(number)), Ok(0));
                assert_eq!(trades.recv(), Ok(tick(number)));
            }
        });
        assert_eq!(allocated, 0, "{}", backend.name());
    }
}

#[test]
fn overwriting_and_being_told_allocate_nothing() {
    for &backend in Backend::ALL {
        let bus = new_bus(backend);
        let options = SubscribeOptions { policy: Some(Policy::DropOldest), ..Default::default() };
        let subscription = bus.subscribe_with(options).unwrap();
        let allocated = allocations(|| {
            for number in 0..ROUNDS {
                assert_eq!(bus.publish(tick(number)), Ok(1));
            }
            assert!(matches!(subscription.try_recv(), Err(TryRecvError::Lagged(_))));
            // A ring makes room for a quarter of it at once.
            let left = (0..64).filter(|_| subscription.try_recv().is_ok()).count();
            assert!(left == 64 || backend == Backend::Ring && left >= 48, "{left}");
            assert_eq!(subscription.try_recv(), Err(TryRecvError::Empty));
        });
        assert_eq!(allocated, 0, "{}", backend.name());
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_full_subscription_that_misses_or_refuses_allocates_nothing() {
    let bus = new_bus(Backend::LockFree);
    let options = |policy| SubscribeOptions { policy: Some(policy), ..Default::default() };
    let refusing = bus.subscribe_with(options(Policy::DropNewest)).unwrap();
    let allocated = allocations(|| {
        for number in 0..ROUNDS {
            assert!(bus.publish(tick(number)).is_ok());
        }
    });
    assert_eq!(allocated, 0);
    assert_eq!(refusing.metrics().dropped.refused, REPEATED * ROUNDS - 64);
}

#[test]
fn conflating_allocates_nothing() {
    for &backend in Backend::ALL {
        // By topic, by a number, and by a text whose number is looked up.
        let keys = [
            (None, 1),
            (Some(KeyFn::number(|tick: &Tick| tick.0[0] % 80)), 80),
            (Some(KeyFn::new(|tick: &Tick| ["BTC", "ETH", "SOL"][tick.0[0] as usize % 3])), 3),
        ];
        for (key, pending) in keys {
            let bus = new_bus(backend);
            let options =
                SubscribeOptions { policy: Some(Policy::Conflate), key, ..Default::default() };
            let subscription = bus.subscribe_with(options).unwrap();
            let allocated = allocations(|| {
                for number in 0..ROUNDS {
                    assert_eq!(bus.publish(tick(number)), Ok(1));
                }
                let lagged = matches!(subscription.try_recv(), Err(TryRecvError::Lagged(_)));
                assert_eq!(lagged, pending > 64, "it holds 64 keys");
                while subscription.try_recv().is_ok() {}
            });
            assert_eq!(allocated, 0, "{}, {pending} keys", backend.name());
            assert_sums_close(&bus.metrics());
        }
    }
}

#[test]
fn keeping_last_events_and_reading_them_allocates_nothing() {
    for &backend in Backend::ALL {
        let bus = bus_that_keeps(backend, 64, Some(">"));
        let topic = bus.topic("quotes.BTC").unwrap();
        let subscription = bus.subscribe(64).unwrap();
        let allocated = allocations(|| {
            for number in 0..ROUNDS {
                assert_eq!(bus.publish_to(&topic, tick(number)), Ok(1));
                assert_eq!(bus.last("quotes.BTC"), Ok(Some(tick(number))));
                assert_eq!(subscription.try_recv(), Ok(tick(number)));
            }
        });
        assert_eq!(allocated, 0, "{}", backend.name());
    }
}

#[test]
fn compact_events_and_names_that_are_known_allocate_nothing() {
    Symbol::new("BTCUSDT").unwrap();
    SourceId::new("binance").unwrap();
    let allocated = allocations(|| {
        for timestamp in 0..ROUNDS {
            let event = Event {
                timestamp,
                event_type: EventType::from_name("price_update").unwrap(),
                priority: Priority::High,
                source_id: SourceId::new("binance").unwrap(),
                symbol: Symbol::new("BTCUSDT").unwrap(),
                value: 1.5,
                metadata: 0,
            };
            assert_eq!(event.symbol.name(), Some("BTCUSDT"));
            assert_eq!(event.lane(), Lane::High);
            assert_eq!(Event::from_bytes(event.to_bytes()), event);
        }
    });
    assert_eq!(allocated, 0);
}

#[test]
fn recv_many_into_a_batch_that_is_kept_allocates_nothing() {
    for &backend in Backend::ALL {
        let bus = new_bus(backend);
        let subscription = bus.subscribe(64).unwrap();
        let mut batch = Vec::with_capacity(64);
        let allocated = allocations(|| {
            for _ in 0..100 {
                assert_eq!(bus.publish_many((0..64).map(tick)), Ok(64));
                batch.clear();
                assert_eq!(subscription.try_recv_many(&mut batch, 64), Ok(64));
            }
        });
        assert_eq!(allocated, 0, "{}", backend.name());
    }
}

#[test]
fn waking_a_sleeping_thread_allocates_nothing() {
    for &backend in Backend::ALL {
        let (there, back) = (new_bus(backend), new_bus(backend));
        let (ping, pong) = (there.subscribe(64).unwrap(), back.subscribe(64).unwrap());
        std::thread::scope(|scope| {
            let echo = scope.spawn(|| {
                allocations(|| {
                    for _ in 0..ROUNDS {
                        assert_eq!(back.publish(ping.recv().unwrap()), Ok(1));
                    }
                })
            });
            let allocated = allocations(|| {
                for number in 0..ROUNDS {
                    assert_eq!(there.publish(tick(number)), Ok(1));
                    assert_eq!(pong.recv(), Ok(tick(number)));
                }
            });
            assert_eq!((allocated, echo.join().unwrap()), (0, 0), "{}", backend.name());
        });
    }
}

#[test]
fn waking_sleeping_tasks_allocates_nothing() {
    for &backend in Backend::ALL {
        // As many as have a bit of their own to sleep by, and some that have none.
        for count in [1, 16, 70] {
            let bus = new_bus(backend);
            let readers: Vec<AsyncEventSubscription<Tick>> =
                subscriptions(&bus, count).into_iter().map(Into::into).collect();
            let context = &mut Context::from_waker(Waker::noop());
            let allocated = (0..REPEATED).map(|number| {
                let mut waits: Vec<_> =
                    readers.iter().map(|reader| Box::pin(reader.recv())).collect();
                let before = ALLOCATIONS.get();
                for wait in &mut waits {
                    assert_eq!(wait.as_mut().poll(context), Poll::Pending);
                }
                assert_eq!(bus.publish(tick(number)), Ok(count));
                for wait in &mut waits {
                    assert_eq!(wait.as_mut().poll(context), Poll::Ready(Ok(tick(number))));
                }
                ALLOCATIONS.get() - before
            });
            assert_eq!(allocated.max(), Some(0), "{}, {count} readers", backend.name());
        }
    }
}

#[test]
fn awaiting_allocates_nothing() {
    for &backend in Backend::ALL {
        let bus = new_bus(backend);
        let subscription = AsyncEventSubscription::from(bus.subscribe(64).unwrap());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for _ in 0..2 {
                let before = ALLOCATIONS.get();
                for number in 0..ROUNDS {
                    // The first is ready, the second is waited for.
                    assert_eq!(bus.publish(tick(number)), Ok(1));
                    assert_eq!(subscription.recv().await, Ok(tick(number)));
                    let publish = async { bus.publish(tick(number)) };
                    let (received, taken) = tokio::join!(subscription.recv(), publish);
                    assert_eq!((received, taken), (Ok(tick(number)), Ok(1)));
                }
                let allocated = ALLOCATIONS.get() - before;
                assert_eq!(allocated, 0, "{}", backend.name());
            }
        });
    }
}

#[test]
fn the_lanes_of_an_event_system_allocate_nothing_for_topics_that_are_known() {
    let config = EventSystemConfig {
        critical_capacity: 64,
        high_capacity: 64,
        normal_capacity: 64,
        ..Default::default()
    };
    let system = EventSystem::new(config).unwrap();
    let symbols = ["ALLOC1", "ALLOC2", "ALLOC3"].map(|name| Symbol::new(name).unwrap());
    let all = system.subscribe(SystemSubscribeOptions::default()).unwrap();
    let options = SystemSubscribeOptions { symbols: symbols[..1].to_vec(), ..Default::default() };
    let narrow = system.subscribe(options).unwrap();
    let make = |number: u64| Event {
        timestamp: number,
        event_type: [EventType::PriceUpdate, EventType::EmergencyStop][number as usize % 2],
        priority: [Priority::Normal, Priority::High][number as usize / 2 % 2],
        source_id: SourceId::NONE,
        symbol: symbols[number as usize % 3],
        value: 1.0,
        metadata: 0,
    };
    let events: Vec<Event> = (0..48).map(make).collect();
    // The first of each type and symbol is compiled.
    assert_eq!(system.publish_batch(&events).unwrap(), 48);
    let mut batch = Vec::with_capacity(64);
    let mut read = |reader: &SystemSubscription, expected| {
        batch.clear();
        assert_eq!(reader.try_recv_each(64, |event| batch.push(event)), Ok(expected));
    };
    read(&all, 48);
    read(&narrow, 16);
    let allocated = allocations(|| {
        for number in 0..ROUNDS {
            let event = make(number);
            let wanted = usize::from(event.symbol == symbols[0]);
            assert_eq!(system.publish(event).unwrap(), 1 + wanted);
            assert_eq!(all.recv(), Ok(event));
            assert_eq!(narrow.try_recv().is_ok(), wanted == 1);
        }
        assert_eq!(system.publish_batch(&events).unwrap(), 48);
        read(&all, 48);
        read(&narrow, 16);
    });
    assert_eq!(allocated, 0);
    Lane::ALL.iter().for_each(|&lane| assert_sums_close(system.metrics().lane(lane)));
}
