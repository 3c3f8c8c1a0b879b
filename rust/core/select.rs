//! Waiting for whichever of several subscriptions has something first, or for a shutdown signal.

use crate::subscription::EventSubscription;
use crate::sync::{Exclusion, Flag};
use crate::system::SystemSubscription;
use crate::wait::{AnySubscription, Bell, PlaceInLine, park_on_any, pass_time_until};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// A signal that is given once and seen by everybody, for ending loops. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    inner: Arc<ShutdownInner>,
}

#[derive(Debug, Default)]
struct ShutdownInner {
    flag: Flag,
    bell: Arc<Bell>,
}

impl Shutdown {
    /// Returns a signal that is not given yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the signal; again does nothing.
    pub fn set(&self) {
        if self.inner.flag.set() {
            self.inner.bell.wake_all();
        }
    }

    /// Returns whether the signal was given.
    pub fn is_set(&self) -> bool {
        self.inner.flag.is_set()
    }

    /// Waits for the signal. Cancelling loses nothing.
    pub async fn wait(&self) {
        let mut sleeper = self.inner.bell.sleeper();
        sleeper.enter();
        // Whoever gives the signal wakes those who are in line by then.
        if !self.is_set() {
            sleeper.await;
        }
    }
}

macro_rules! any_subscription {
    ($name:ty $(, $parameter:ident: $bound:ident)*) => {
        impl<$($parameter: $bound),*> AnySubscription for $name {
            fn id(&self) -> u64 {
                self.id()
            }

            fn pending(&self) -> usize {
                self.pending()
            }

            fn is_closed(&self) -> bool {
                self.is_closed()
            }

            fn is_ready(&self) -> bool {
                self.is_ready()
            }

            fn arm(&self) {
                self.arm();
            }

            fn disarm(&self) {
                self.disarm();
            }

            fn place_in_line(&self) -> Option<PlaceInLine> {
                self.place_in_line()
            }

            fn pass_on(&self) {
                self.pass_on();
            }
        }
    };
}

any_subscription!(EventSubscription<T, R>, T: Clone, R: Exclusion);
any_subscription!(SystemSubscription);

/// What ended a [`Selector`]'s wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selected {
    /// This subscription, by its place in the slice, has an event, a hole to tell, or is closed.
    Ready(usize),
    /// The shutdown signal was given.
    Shutdown,
    /// The deadline passed.
    TimedOut,
}

/// An armed wait for several subscriptions and a shutdown signal.
pub struct Selector<'a, S: AnySubscription + ?Sized> {
    subscriptions: &'a [&'a S],
    shutdown: Option<&'a Shutdown>,
    /// The places in line of all subscriptions and the signal; `None` if nobody wakes the readers of
    /// one of them, so that all are looked at again and again.
    places: Option<Vec<PlaceInLine>>,
    first: usize,
    /// How often it has looked again since something was ready.
    looks: u32,
    /// The place of the subscription that has ended the last wait.
    woken: Option<usize>,
}

impl<S: AnySubscription + ?Sized> fmt::Debug for Selector<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selector")
            .field("subscriptions", &self.subscriptions.len())
            .finish_non_exhaustive()
    }
}

impl<'a, S: AnySubscription + ?Sized> Selector<'a, S> {
    /// Returns a selector that looks at the subscriptions from place `first` on, round and round,
    /// so that a busy one cannot hide the others from a caller that advances `first`.
    pub fn new(subscriptions: &'a [&'a S], shutdown: Option<&'a Shutdown>, first: usize) -> Self {
        let places = subscriptions.iter().map(|subscription| subscription.place_in_line());
        let signal = shutdown.map(|shutdown| Some(PlaceInLine::new(&shutdown.inner.bell)));
        let mut places: Option<Vec<_>> = places.chain(signal).collect();
        if let Some(places) = &mut places {
            places.iter_mut().for_each(PlaceInLine::enter);
            subscriptions.iter().for_each(|subscription| subscription.arm());
        }
        Self { subscriptions, shutdown, places, first, looks: 0, woken: None }
    }

    /// Returns what is ready now: the shutdown signal first.
    pub fn ready(&mut self) -> Option<Selected> {
        // Who was woken and stands in line anew says so, before it looks.
        if let Some(woken) = self.woken.take() {
            self.subscriptions[woken].arm();
            self.subscriptions[woken].disarm();
        }
        if self.shutdown.is_some_and(Shutdown::is_set) {
            return Some(Selected::Shutdown);
        }
        let count = self.subscriptions.len();
        let place = (0..count)
            .map(|step| (self.first + step) % count)
            .find(|&place| self.subscriptions[place].is_ready())?;
        self.looks = 0;
        Some(Selected::Ready(place))
    }

    /// Parks the thread until it is worth asking what is ready; false if the deadline passed. It is
    /// the one method that may be called without the exclusion of the subscriptions. With a
    /// subscription among them of [`WakeMode::Polling`](crate::WakeMode::Polling), it spins a little
    /// or lets others run, once.
    pub fn park(&mut self, deadline: Option<Instant>) -> bool {
        let Some(places) = &mut self.places else {
            return pass_time_until(&mut self.looks, deadline);
        };
        let Some(woken) = park_on_any(places, deadline) else { return false };
        if woken < self.subscriptions.len() {
            places[woken].enter();
            self.woken = Some(woken);
        }
        true
    }
}

impl<S: AnySubscription + ?Sized> Drop for Selector<'_, S> {
    fn drop(&mut self) {
        // Its place in line goes first, and a wake-up that came to it goes to the next in line.
        if self.places.take().is_none() {
            return;
        }
        for subscription in self.subscriptions {
            subscription.disarm();
            subscription.pass_on();
        }
    }
}

/// Waits until one of the subscriptions has something, the signal is given, or the deadline
/// passes. Nothing is taken: receive from the subscription that is named.
///
/// ```
/// use tickbus::{EventBus, LockFreeEventBus, Selected, Shutdown, select};
///
/// let bus = LockFreeEventBus::new(16)?;
/// let (orders, fills) = (bus.subscribe(16)?, bus.subscribe(16)?);
/// let shutdown = Shutdown::new();
/// bus.publish("filled")?;
/// let Selected::Ready(place) = select(&[&orders, &fills], Some(&shutdown), None) else {
///     panic!("nothing was ready");
/// };
/// assert_eq!([&orders, &fills][place].try_recv()?, "filled");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Subscriptions of several types of events are waited for together as [`AnySubscription`]:
///
/// ```
/// use tickbus::{AnySubscription, EventBus, EventSystem, LockFreeEventBus, Selected, select};
///
/// let (bus, system) = (LockFreeEventBus::new(16)?, EventSystem::new(Default::default())?);
/// let (orders, alerts) = (bus.subscribe(16)?, system.subscribe(Default::default())?);
/// bus.publish("order")?;
/// let both: [&dyn AnySubscription; 2] = [&alerts, &orders];
/// assert_eq!(select(&both, None, None), Selected::Ready(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn select<S: AnySubscription + ?Sized>(
    subscriptions: &[&S],
    shutdown: Option<&Shutdown>,
    deadline: Option<Instant>,
) -> Selected {
    let mut selector = Selector::new(subscriptions, shutdown, 0);
    loop {
        if let Some(selected) = selector.ready() {
            return selected;
        }
        if !selector.park(deadline) {
            return selector.ready().unwrap_or(Selected::TimedOut);
        }
    }
}
