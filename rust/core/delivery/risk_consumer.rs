//! Consumers of risk events, and what they are given.

use super::Delivery;
use super::desk::LiveEvent;
use super::entry::ConsumerId;
use super::error::DeliveryError;
use super::payload::Payload;
use super::risk::Begun;
use crate::store::{Directory, LogReader, StoreError};
use parking_lot::Mutex;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most bytes of a reason that are kept.
const MAX_REASON: usize = 1024;

/// Which attempt at which event a consumer has been given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    /// The event: its sequence in the log.
    pub id: u64,
    /// From 1. 0 is an event that was delivered without a record of it, which needs no
    /// acknowledgment.
    pub attempt: u32,
}

/// An event that a consumer has been given.
#[derive(Debug, Clone)]
pub struct CriticalDelivery {
    /// What it is acknowledged by.
    pub token: Token,
    /// Events of a key are delivered in order.
    pub key: Option<Arc<str>>,
    /// The event.
    pub event: Arc<Payload>,
}

impl CriticalDelivery {
    /// Returns whether there is no record of it, because the log refused it: it is delivered once.
    pub fn is_live(&self) -> bool {
        self.token.attempt == 0
    }
}

/// What a consumer is given.
enum Found {
    Live(LiveEvent),
    Begun(Begun, Option<Arc<Payload>>),
    Nothing,
}

/// A consumer of risk events. Several threads and tasks may take from it: each event goes to one of
/// them.
pub struct RiskConsumer {
    delivery: Arc<Delivery>,
    /// That of its system.
    life: u64,
    id: ConsumerId,
    name: Arc<str>,
    /// It stands behind what was read last.
    reader: Mutex<Option<LogReader<Directory>>>,
}

impl fmt::Debug for RiskConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RiskConsumer").field("name", &self.name).finish_non_exhaustive()
    }
}

/// An attempt that was begun and that nobody has yet: given up, it has failed.
struct Handing<'a>(&'a RiskConsumer, Option<Token>);

impl Drop for Handing<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.1 {
            // If the ledger cannot take it, the lease ends it.
            _ = self.0.decide_nack(token, "the consumer gave up before it got the event");
        }
    }
}

impl RiskConsumer {
    pub(super) fn new(delivery: &Arc<Delivery>, life: u64, id: ConsumerId, name: &str) -> Self {
        delivery.desk.books().open_handle(id);
        Self { delivery: delivery.clone(), life, id, name: name.into(), reader: Mutex::default() }
    }

    /// Returns its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the next event, after this attempt was counted durably; `None` if there is none now.
    ///
    /// # Errors
    ///
    /// `Removed`; `Store`: `Closed` once the system is.
    pub fn try_take(&self) -> Result<Option<CriticalDelivery>, DeliveryError> {
        match self.begin()? {
            Some((found, end)) => self.hand_over(found, end).map(Some),
            None => Ok(None),
        }
    }

    /// As [`RiskConsumer::try_take`], after it has waited for one; `None` once the deadline has
    /// passed.
    ///
    /// # Errors
    ///
    /// As [`RiskConsumer::try_take`].
    pub fn take(
        &self,
        deadline: Option<Instant>,
    ) -> Result<Option<CriticalDelivery>, DeliveryError> {
        match self.delivery.desk.wait(deadline, || self.begin())? {
            Some((found, end)) => self.hand_over(found, end).map(Some),
            None => Ok(None),
        }
    }

    /// As [`RiskConsumer::take`], in a task, without a deadline. Cancelling it loses nothing, but an
    /// attempt may have been counted.
    ///
    /// # Errors
    ///
    /// As [`RiskConsumer::try_take`].
    pub async fn take_async(&self) -> Result<CriticalDelivery, DeliveryError> {
        let (found, end) = self.delivery.desk.wait_async(|| self.begin()).await?;
        let mut handing = Handing(self, found.token());
        if handing.1.is_some() {
            self.delivery.desk.commit_async(end).await?;
        }
        let delivery = self.read(found)?;
        handing.1 = None;
        Ok(delivery)
    }

    fn begin(&self) -> Result<Option<(Found, u64)>, DeliveryError> {
        let (found, end) =
            self.delivery.desk.decide::<_, DeliveryError>(self.delivery.times(), |books| {
                // Those of another system are for its consumers.
                if books.risk.is_past(self.life) {
                    return Err(StoreError::Closed.into());
                }
                if let Some(event) = books.take_live(self.id) {
                    return Ok((Vec::new(), Found::Live(event)));
                }
                if !books.risk.is_running() {
                    return Err(StoreError::Closed.into());
                }
                if books.risk.get(self.id).is_none() {
                    return Err(DeliveryError::Removed { name: self.name.clone() });
                }
                Ok(match books.risk.take(self.id) {
                    Some((begun, entry)) => {
                        let payload = books.payload(begun.id);
                        (vec![entry], Found::Begun(begun, payload))
                    }
                    None => (Vec::new(), Found::Nothing),
                })
            })?;
        Ok((!matches!(found, Found::Nothing)).then_some((found, end)))
    }

    fn hand_over(&self, found: Found, end: u64) -> Result<CriticalDelivery, DeliveryError> {
        let mut handing = Handing(self, found.token());
        if handing.1.is_some() {
            self.delivery.desk.commit(end)?;
        }
        let delivery = self.read(found)?;
        handing.1 = None;
        Ok(delivery)
    }

    fn read(&self, found: Found) -> Result<CriticalDelivery, DeliveryError> {
        match found {
            Found::Live((event, key)) => {
                Ok(CriticalDelivery { token: Token { id: 0, attempt: 0 }, key, event })
            }
            Found::Begun(Begun { id, attempt, key }, payload) => {
                let event = match payload {
                    Some(event) => event,
                    None => self.delivery.event(id, &self.reader)?,
                };
                Ok(CriticalDelivery { token: Token { id, attempt }, key, event })
            }
            Found::Nothing => unreachable!("something was found"),
        }
    }

    /// Acknowledges an event durably: this consumer never gets it again.
    ///
    /// # Errors
    ///
    /// `Stale` if it was delivered again since, or is settled; `Store`: it may be delivered again.
    pub fn ack(&self, token: Token) -> Result<(), DeliveryError> {
        match self.decide_ack(token)? {
            Some(end) => Ok(self.delivery.desk.commit(end)?),
            None => Ok(()),
        }
    }

    /// As [`RiskConsumer::ack`], in a task. Cancelling it takes nothing back.
    ///
    /// # Errors
    ///
    /// As [`RiskConsumer::ack`].
    pub async fn ack_async(&self, token: Token) -> Result<(), DeliveryError> {
        match self.decide_ack(token)? {
            Some(end) => Ok(self.delivery.desk.commit_async(end).await?),
            None => Ok(()),
        }
    }

    fn decide_ack(&self, token: Token) -> Result<Option<u64>, DeliveryError> {
        if token.attempt == 0 {
            return Ok(None);
        }
        let (_, end) =
            self.delivery.desk.decide::<_, DeliveryError>(self.delivery.times(), |books| {
                let entry = books.risk.ack(self.id, token.id, token.attempt);
                Ok((vec![entry.ok_or_else(|| self.stale(token))?], ()))
            })?;
        Ok(Some(end))
    }

    /// Says durably that an attempt has failed, and why: the event is delivered again after a while,
    /// or becomes a dead letter. Of the reason 1,024 bytes are kept.
    ///
    /// # Errors
    ///
    /// As [`RiskConsumer::ack`].
    pub fn nack(&self, token: Token, reason: &str) -> Result<(), DeliveryError> {
        match self.decide_nack(token, reason)? {
            Some(end) => Ok(self.delivery.desk.commit(end)?),
            None => Ok(()),
        }
    }

    /// As [`RiskConsumer::nack`], in a task. Cancelling it takes nothing back.
    ///
    /// # Errors
    ///
    /// As [`RiskConsumer::ack`].
    pub async fn nack_async(&self, token: Token, reason: &str) -> Result<(), DeliveryError> {
        match self.decide_nack(token, reason)? {
            Some(end) => Ok(self.delivery.desk.commit_async(end).await?),
            None => Ok(()),
        }
    }

    fn decide_nack(&self, token: Token, reason: &str) -> Result<Option<u64>, DeliveryError> {
        if token.attempt == 0 {
            return Ok(None);
        }
        let kept =
            (0..=MAX_REASON.min(reason.len())).rev().find(|&end| reason.is_char_boundary(end));
        let reason = &reason[..kept.unwrap_or(0)];
        let (_, end) =
            self.delivery.desk.decide::<_, DeliveryError>(self.delivery.times(), |books| {
                let entries = books.risk.nack(self.id, token.id, token.attempt, reason);
                Ok((entries.ok_or_else(|| self.stale(token))?, ()))
            })?;
        Ok(Some(end))
    }

    fn stale(&self, Token { id, attempt }: Token) -> DeliveryError {
        let what = format!("event {id} by the consumer {:?}", self.name);
        DeliveryError::Stale { what, attempt }
    }

    /// Calls a handler with each event until the system is closed.
    pub(super) fn run(&self, handler: &impl Fn(&CriticalDelivery) -> Result<(), String>) {
        loop {
            let delivery = match self.take(None) {
                Ok(Some(delivery)) => delivery,
                Err(DeliveryError::Store(StoreError::Closed) | DeliveryError::Removed { .. }) => {
                    return;
                }
                // Nothing can be counted now: what comes live does not need it.
                Ok(None) | Err(_) => match self.wait_live() {
                    Ok(Some(delivery)) => delivery,
                    Ok(None) => continue,
                    Err(_) => return,
                },
            };
            let handled = catch_unwind(AssertUnwindSafe(|| handler(&delivery)));
            // What cannot be said now is delivered again.
            _ = match handled {
                Ok(Ok(())) => self.ack(delivery.token),
                Ok(Err(reason)) => self.nack(delivery.token, &reason),
                Err(panic) => self.nack(delivery.token, &panic_text(&*panic)),
            };
        }
    }

    /// Waits a second for an event without a record; `None` if none came.
    ///
    /// # Errors
    ///
    /// `Closed` once the system is.
    pub fn wait_live(&self) -> Result<Option<CriticalDelivery>, StoreError> {
        const PAUSE: Duration = Duration::from_secs(1);
        let live = self.delivery.desk.wait(Some(Instant::now() + PAUSE), || {
            let mut books = self.delivery.desk.books();
            books.check()?;
            if books.risk.is_past(self.life) {
                return Err(StoreError::Closed);
            }
            match books.take_live(self.id) {
                Some(event) => Ok(Some(Found::Live(event))),
                None if books.risk.is_running() => Ok(None),
                None => Err(StoreError::Closed),
            }
        })?;
        Ok(live.and_then(|found| self.read(found).ok()))
    }
}

impl Found {
    /// Returns the attempt that was begun.
    fn token(&self) -> Option<Token> {
        match self {
            Self::Begun(Begun { id, attempt, .. }, _) => Some(Token { id: *id, attempt: *attempt }),
            Self::Live(_) | Self::Nothing => None,
        }
    }
}

impl Drop for RiskConsumer {
    fn drop(&mut self) {
        self.delivery.desk.books().close_handle(self.id);
    }
}

/// Returns what a panic said.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the handler panicked: {}", text.unwrap_or("without a text"))
}

impl Delivery {
    /// Returns an event of the log; `kept` is a reader that may stand before it.
    pub(super) fn event(
        &self,
        id: u64,
        kept: &Mutex<Option<LogReader<Directory>>>,
    ) -> Result<Arc<Payload>, DeliveryError> {
        let near = kept.lock().take().filter(|reader| reader.is_near(id));
        let mut reader = near.unwrap_or_else(|| LogReader::new(self.storage.clone(), id));
        while reader.next_below(id)?.is_some() {}
        let payload = reader.next_below(id + 1)?.and_then(|batch| Payload::first(&batch));
        *kept.lock() = Some(reader);
        payload.map(Arc::new).ok_or(DeliveryError::Unknown { what: "event", id })
    }
}
