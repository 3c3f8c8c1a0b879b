//! A task and a thread read next to a shutdown signal: `tokio::select!` in the one, the blocking
//! `select` in the other. Neither loses an event when the signal ends its loop.

use std::error::Error;
use tickbus::{EventBus, LockFreeEventBus, Selected, Shutdown, select};

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn main() -> Result<(), Box<dyn Error>> {
    let bus = LockFreeEventBus::new(64)?;
    let awaited = bus.subscribe_async(64)?;
    let (trades, audit) = (bus.subscribe(64)?, bus.subscribe(64)?);
    let shutdown = Shutdown::new();

    let thread = std::thread::spawn({
        let shutdown = shutdown.clone();
        move || {
            let subscriptions = [&trades, &audit];
            let mut read = [0; 2];
            while let Selected::Ready(place) = select(&subscriptions, Some(&shutdown), None) {
                match subscriptions[place].try_recv() {
                    Ok(_) => read[place] += 1,
                    Err(error) => println!("subscription {place}: {error}"),
                }
            }
            // What is still pending was not lost: it is there to be read, or to be left.
            [read[0] + trades.pending(), read[1] + audit.pending()]
        }
    });
    let task = tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            let mut read = 0;
            loop {
                tokio::select! {
                    event = awaited.recv() => match event {
                        Ok(_) => read += 1,
                        Err(error) => println!("{error}"),
                    },
                    () = shutdown.wait() => return read + awaited.pending(),
                }
            }
        }
    });

    for price in 61_000..61_050_u32 {
        bus.publish_async(price, None).await?;
    }
    shutdown.set();
    let in_thread = thread.join().map_err(|_| "the thread panicked")?;
    let in_task = task.await?;
    println!("the thread accounts for {in_thread:?} events, the task for {in_task}");
    assert_eq!((in_thread, in_task), ([50, 50], 50));
    Ok(())
}
