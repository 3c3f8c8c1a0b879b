//! A thread publishes trades, two threads read: one everything, one the latest only.

use std::error::Error;
use tickbus::{EventBus, LockFreeEventBus, Policy, RecvError, SubscribeOptions};

#[derive(Debug, Clone)]
struct Trade {
    price: u64,
    size: u64,
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let bus = LockFreeEventBus::<Trade>::new(1024)?;
    let all = bus.subscribe(1024)?;
    let latest = bus.subscribe_with(SubscribeOptions {
        capacity: Some(4),
        policy: Some(Policy::DropOldest),
        ..Default::default()
    })?;

    let volume = std::thread::spawn(move || {
        let mut volume = 0;
        while let Ok(trade) = all.recv() {
            volume += trade.size;
        }
        volume
    });
    for number in 1..=1_000 {
        bus.publish(Trade { price: 61_000 + number, size: number })?;
    }
    bus.close(); // readers first read what is pending

    let volume = volume.join().map_err(|_| "the reader panicked")?;
    println!("volume {volume}");
    loop {
        match latest.recv() {
            Ok(trade) => println!("traded at {}", trade.price),
            Err(RecvError::Lagged(lagged)) => println!("missed {} trades here", lagged.missed),
            Err(_) => break,
        }
    }
    assert_eq!(volume, 500_500);
    assert_eq!(latest.metrics().dropped.overwritten, 996);
    Ok(())
}
