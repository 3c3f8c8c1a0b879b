//! Waking asyncio: one bridge per event loop, signalled through one eventfd.
//!
//! ```text
//!  publisher ─► wake ─► bridge.pending ─┬─ another thread: write(eventfd), once ─► reader callback
//!                                       └─ a task of the loop: call_soon, once per iteration
//!  drain (called by the loop, no task runs): 1 mark who is woken   2 step their tasks
//! ```
//!
//! A wake-up carries no event. Loops without `add_reader` are woken by `call_soon_threadsafe`.
//! The core wakes in places where Python code must not run; what needs Python is put on the list of
//! [`DUE`] bridges and done by [`settle`] once the core has returned.

use crate::busy_poll::BusyPoll;
use crate::calls;
use crate::gil::{GilCell, GilFlag};
use crate::wakeup::Wakeup;
use parking_lot::Mutex;
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyWeakref, PyWeakrefMethods, PyWeakrefReference};
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

/// Something that has tasks to be woken.
pub(crate) trait Wakeable: Send + Sync {
    /// Marks the wake-ups that are due as woken and hands them over. Runs on the loop's thread,
    /// attached, and runs no Python code.
    fn collect(&self, py: Python<'_>, woken: &mut Woken);
}

/// Wake-ups to be stepped, and objects to be let go after that.
#[derive(Default)]
pub(crate) struct Woken {
    pub(crate) wakeups: SmallVec<[Py<Wakeup>; 16]>,
    pub(crate) kept: SmallVec<[Py<PyAny>; 4]>,
}

type Pending = SmallVec<[Arc<dyn Wakeable>; 4]>;

/// The most tasks that are stepped in one go: what else is ready in the loop comes after them.
const DIRECT_STEPS: usize = 64;

/// How long a publisher is given to let go of the global interpreter lock, under which it signals:
/// a thread that asks for it sooner is put to sleep, and waking takes much longer than this.
const LETTING_GO: Duration = Duration::from_nanos(600);

/// Wakes the sleepers of one event loop. It is the loop's reader callback.
#[pyclass(frozen, module = "tickbus._core", name = "_LoopBridge")]
pub(crate) struct LoopBridge {
    event_loop: Py<PyWeakref>,
    pending: GilCell<Pending>,
    signal: Arc<Signal>,
    /// The loop's own thread has seen to it that the loop will drain.
    soon: GilFlag,
    /// The thread that ran the loop when somebody last went to sleep or was woken there.
    thread: AtomicUsize,
    turns: GilCell<SmallVec<[Py<Turn>; TURNS]>>,
    poller: GilCell<Option<Py<BusyPoll>>>,
    /// The loop wants to see each step as a callback of its own.
    debug: bool,
}

/// What wakes a loop from any thread, attached or not.
pub(crate) struct Signal {
    eventfd: Option<EventFd>,
    /// Another thread has seen to it that the loop will drain.
    signalled: AtomicBool,
    /// The loop's thread looks for signals itself: see `LoopBridge::spin`.
    spinning: AtomicBool,
    /// What threads that may not be attached have to be served.
    pending: Mutex<Pending>,
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signal").field("signalled", &self.signalled).finish_non_exhaustive()
    }
}

impl Signal {
    /// Wakes the loop, once until it drains. Called once for each event at most, after everything
    /// that it wakes was put on a list: a drain that another thread's signal has brought may serve
    /// that first, and the one for this signal then finds nothing.
    fn give(&self, eventfd: &EventFd) {
        // ORDERING: what was put on a list before is seen by the drain that clears the signal, or
        // the signal was cleared before and is given here.
        if self.signalled.swap(true, Ordering::AcqRel) {
            return;
        }
        // ORDERING: pairs with the fence in `spin`: either the spinning loop sees the signal, or
        // this sees that it has stopped.
        fence(Ordering::SeqCst);
        if !self.spinning.load(Ordering::Relaxed) {
            eventfd.write();
        }
    }
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(eventfd) = &self.eventfd {
            self.give(eventfd);
        }
    }
}

/// Wakes from any thread: the waker of what Rust threads publish to and read from.
#[derive(Debug)]
pub(crate) struct FromAnyThread<W> {
    target: W,
    scheduled: AtomicBool,
    /// That of the loop in which the target is served.
    signal: Mutex<Option<Arc<Signal>>>,
}

impl<W: Wakeable + 'static> FromAnyThread<W> {
    pub(crate) fn new(target: W) -> Arc<Self> {
        let (scheduled, signal) = Default::default();
        Arc::new(Self { target, scheduled, signal })
    }

    /// Has the loop of the bridge serve the target from now on.
    pub(crate) fn bind(&self, bridge: &LoopBridge) {
        *self.signal.lock() = Some(bridge.signal.clone());
        self.scheduled.store(false, Ordering::Release);
    }
}

impl<W: Wakeable + 'static> Wake for FromAnyThread<W> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // ORDERING: pairs with that in `collect`, which looks after it: one of the two comes first,
        // and either the look sees what there is to be woken for, or this schedules again.
        if self.scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(signal) = self.signal.lock().clone() else {
            self.scheduled.store(false, Ordering::Release);
            return;
        };
        match &signal.eventfd {
            Some(_) => {
                signal.pending.lock().push(self.clone());
                // Else the loop could wake up in the middle and be signalled again.
                tickbus::wake_last(Waker::from(signal));
            }
            None => LoopBridge::wake_attached(&signal, self.clone()),
        }
    }
}

impl<W: Wakeable + 'static> Wakeable for FromAnyThread<W> {
    fn collect(&self, py: Python<'_>, woken: &mut Woken) {
        self.scheduled.swap(false, Ordering::AcqRel);
        self.target.collect(py, woken);
    }
}

impl<W: Wakeable> Wakeable for Arc<W> {
    fn collect(&self, py: Python<'_>, woken: &mut Woken) {
        (**self).collect(py, woken);
    }
}

impl std::fmt::Debug for LoopBridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoopBridge").field("signal", &self.signal).finish_non_exhaustive()
    }
}

#[pymethods]
impl LoopBridge {
    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        if let Some(eventfd) = &self.signal.eventfd {
            eventfd.read();
        }
        let poller = self.poller.with(|poller| poller.as_ref().map(|poller| poller.clone_ref(py)));
        if let (Some(poller), Some(event_loop)) = (poller, self.event_loop(py)) {
            BusyPoll::woken(poller.bind(py), &event_loop)?;
        }
        self.drain(py)
    }

    fn __repr__(&self) -> &'static str {
        "<tickbus wake-up of an event loop>"
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        self.turns.with(|turns| turns.iter().try_for_each(|turn| visit.call(turn)))?;
        self.poller.with(|poller| visit.call(&*poller))
    }

    fn __clear__(&self) {
        drop(self.turns.with(std::mem::take));
    }
}

impl LoopBridge {
    /// Has the loop serve `wakeable` soon. Called attached; runs no Python code.
    pub(crate) fn schedule(slf: &Py<Self>, py: Python<'_>, wakeable: Arc<dyn Wakeable>) {
        let this = slf.get();
        this.pending.with(|pending| pending.push(wakeable));
        match &this.signal.eventfd {
            Some(eventfd) if !this.is_here() => this.signal.give(eventfd),
            _ => {
                let bridge = slf.clone_ref(py);
                DUE.with(|due| due.push(bridge));
            }
        }
    }

    /// Has a loop without an eventfd serve `wakeable`. A thread that is not attached becomes it for
    /// that: such a loop knows no other way.
    #[cold]
    fn wake_attached(signal: &Arc<Signal>, wakeable: Arc<dyn Wakeable>) {
        // SAFETY: it may be asked at any time.
        let is_attached = unsafe { ffi::PyGILState_Check() } != 0;
        // Where there is no interpreter any more, nobody sleeps.
        Python::try_attach(|py| {
            let bridge = BRIDGES.with(|bridges| {
                let bridge = bridges.iter().find(|b| Arc::ptr_eq(&b.get().signal, signal))?;
                Some(bridge.clone_ref(py))
            });
            let Some(bridge) = bridge else { return };
            Self::schedule(&bridge, py, wakeable);
            // Who was attached before settles when the core has returned.
            if !is_attached {
                settle(py);
            }
        });
    }

    /// Looks for a signal for a while instead of sleeping, and returns whether there is one. Called
    /// by the loop, detached.
    pub(crate) fn spin(&self, longest: Duration) -> bool {
        let Signal { spinning, signalled, .. } = &*self.signal;
        spinning.store(true, Ordering::Relaxed);
        let start = Instant::now();
        while !signalled.load(Ordering::Relaxed) && start.elapsed() < longest {
            std::hint::spin_loop();
        }
        spinning.store(false, Ordering::Relaxed);
        // ORDERING: pairs with the fence in `Signal::give`.
        fence(Ordering::SeqCst);
        let signalled = signalled.load(Ordering::Acquire);
        if signalled {
            let seen = Instant::now();
            while seen.elapsed() < LETTING_GO {
                std::hint::spin_loop();
            }
        }
        signalled
    }

    pub(crate) fn can_spin(&self) -> bool {
        self.signal.eventfd.is_some()
    }

    /// Has `poller` told of every wake-up from sleep; false if there is one already.
    pub(crate) fn set_poller(&self, poller: &Bound<'_, BusyPoll>) -> bool {
        let poller = poller.clone().unbind();
        let refused = self.poller.with(|kept| match kept {
            None => kept.replace(poller),
            Some(_) => Some(poller),
        });
        refused.is_none()
    }

    pub(crate) fn clear_poller(&self) {
        drop(self.poller.with(Option::take));
    }

    /// Steps every task that is due, in the order in which they began to wait. Called by the loop.
    pub(crate) fn drain(&self, py: Python<'_>) -> PyResult<()> {
        self.runs_here();
        // Cleared before looking: what is scheduled from here on signals again.
        self.signal.signalled.store(false, Ordering::Release);
        self.soon.clear();
        let attached = self.pending.with(std::mem::take);
        let others = std::mem::take(&mut *self.signal.pending.lock());
        let mut woken = Woken::default();
        for wakeable in attached.iter().chain(&others) {
            wakeable.collect(py, &mut woken);
        }
        let direct = if self.debug { 0 } else { DIRECT_STEPS };
        let mut wakeups = woken.wakeups.iter().map(|wakeup| wakeup.bind(py));
        let mut result = Ok(());
        for wakeup in wakeups.by_ref().take(direct) {
            result = Wakeup::step(wakeup);
            if result.is_err() {
                break;
            }
        }
        for wakeup in wakeups {
            let stepped = Wakeup::step_soon(wakeup);
            result = result.and(stepped);
        }
        result
    }

    /// Has the loop drain in its next iteration. Called on the loop's own thread, or on any if the
    /// loop has no eventfd.
    fn drain_soon(slf: &Bound<'_, Self>) -> PyResult<()> {
        let py = slf.py();
        let this = slf.get();
        let Some(event_loop) = this.event_loop(py) else { return Ok(()) };
        let call_soon = match &this.signal.eventfd {
            Some(eventfd) => {
                // Without a running task this may be a signal handler that interrupts the
                // selector, which `call_soon` would not wake.
                if !runs_a_task(&event_loop)? {
                    this.signal.give(eventfd);
                    return Ok(());
                }
                intern!(py, "call_soon")
            }
            None => intern!(py, "call_soon_threadsafe"),
        };
        if this.soon.set() {
            match Self::free_turn(slf)? {
                Some(turn) => Turn::take(&turn, &event_loop, call_soon)?,
                None => _ = calls::call_method(call_soon, [&event_loop, slf.as_any()], None)?,
            }
        }
        Ok(())
    }

    /// Returns a turn that is not under way; `None` if all are.
    fn free_turn<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Bound<'py, Turn>>> {
        let py = slf.py();
        let (known, free) = slf.get().turns.with(|turns| {
            let free = turns.iter().find(|turn| !turn.get().under_way.is_set());
            (turns.len(), free.map(|turn| turn.clone_ref(py)))
        });
        if free.is_some() || known == TURNS {
            return Ok(free.map(|turn| turn.into_bound(py)));
        }
        let turn = Turn::new(slf)?;
        let kept = turn.clone().unbind();
        slf.get().turns.with(|turns| turns.push(kept));
        Ok(Some(turn))
    }

    fn is_here(&self) -> bool {
        self.thread.load(Ordering::Relaxed) == thread_mark()
    }

    /// Remembers that the calling thread runs the loop.
    pub(crate) fn runs_here(&self) {
        self.thread.store(thread_mark(), Ordering::Relaxed);
    }

    /// Returns the loop, unless it is gone.
    pub(crate) fn event_loop<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        self.event_loop.bind(py).upgrade()
    }

    /// Returns whether the loop is alive and the calling thread ran it last.
    pub(crate) fn is_alive_here(&self, py: Python<'_>) -> bool {
        self.is_here() && self.event_loop(py).is_some()
    }

    /// Returns whether a wake-up is for a task of the loop.
    pub(crate) fn is_of(&self, wakeup: &Wakeup) -> bool {
        wakeup.is_for(&self.event_loop)
    }

    /// Returns a new wake-up for a task of the loop.
    pub(crate) fn wakeup(&self, py: Python<'_>) -> PyResult<Py<Wakeup>> {
        Wakeup::new(py, &self.event_loop)
    }

    /// Returns whether the loop is gone or closed.
    pub(crate) fn is_over(&self, py: Python<'_>) -> bool {
        self.event_loop(py).is_none_or(|event_loop| {
            calls::call_method(intern!(py, "is_closed"), [&event_loop], None)
                .and_then(|closed| closed.is_truthy())
                .unwrap_or(true)
        })
    }

    /// Returns the loop's bridge, made on first use.
    pub(crate) fn of(event_loop: &Bound<'_, PyAny>) -> PyResult<Py<Self>> {
        let py = event_loop.py();
        let known: Vec<Py<Self>> =
            BRIDGES.with(|bridges| bridges.iter().map(|bridge| bridge.clone_ref(py)).collect());
        for bridge in &known {
            if bridge.get().event_loop(py).is_some_and(|known| known.is(event_loop)) {
                return Ok(bridge.clone_ref(py));
            }
        }
        let over: Vec<_> = known.iter().filter(|bridge| bridge.get().is_over(py)).collect();
        let forgotten: Vec<Py<Self>> = BRIDGES.with(|bridges| {
            bridges.extract_if(.., |b| over.iter().any(|gone| gone.is(&*b))).collect()
        });
        for gone in forgotten {
            // What nobody will serve may know the bridge itself.
            let attached = gone.get().pending.with(std::mem::take);
            let others = std::mem::take(&mut *gone.get().signal.pending.lock());
            drop((attached, others));
        }
        let bridge = Self::new(event_loop)?;
        let kept = bridge.clone_ref(py);
        BRIDGES.with(|bridges| bridges.push(kept));
        Ok(bridge)
    }

    fn new(event_loop: &Bound<'_, PyAny>) -> PyResult<Py<Self>> {
        let py = event_loop.py();
        let weak = PyWeakrefReference::new(event_loop)?.into_any().cast_into::<PyWeakref>()?;
        let debug = calls::call_method(intern!(py, "get_debug"), [event_loop], None)?;
        let debug = debug.is_truthy()?;
        let bridge = |eventfd: Option<EventFd>| {
            let event_loop = weak.clone().unbind();
            let (signalled, spinning, unattached) = Default::default();
            let signal = Arc::new(Signal { eventfd, signalled, spinning, pending: unattached });
            let (pending, soon, thread, turns, poller) = Default::default();
            let bridge = Self { event_loop, pending, signal, soon, thread, turns, poller, debug };
            Py::new(py, bridge)
        };
        if let Some(eventfd) = EventFd::open() {
            let descriptor = eventfd.descriptor().into_pyobject(py)?.into_any();
            let bridge = bridge(Some(eventfd))?;
            let arguments = [event_loop, &descriptor, bridge.bind(py).as_any()];
            match calls::call_method(intern!(py, "add_reader"), arguments, None) {
                Ok(_) => return Ok(bridge),
                Err(error) if error.is_instance_of::<PyNotImplementedError>(py) => {}
                Err(error) => return Err(error),
            }
        }
        bridge(None)
    }
}

/// Turns of one bridge that can be under way at once: more than one where a task that is stepped
/// runs the loop itself, as nest_asyncio does.
const TURNS: usize = 3;

/// A drain that the loop was asked for by `call_soon`, in an empty context of its own: draining
/// needs no context variables, so the loop is spared a copy of the publisher's. A context is
/// entered only once at a time.
#[pyclass(frozen, module = "tickbus._core", name = "_Turn")]
#[derive(Debug)]
struct Turn {
    bridge: Py<LoopBridge>,
    context: Py<PyAny>,
    under_way: GilFlag,
}

#[pymethods]
impl Turn {
    fn __call__(&self, py: Python<'_>) -> PyResult<()> {
        let result = self.bridge.get().drain(py);
        self.under_way.clear();
        result
    }

    fn __repr__(&self) -> &'static str {
        "<tickbus wake-up of an event loop>"
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.bridge)?;
        visit.call(&self.context)
    }
}

impl Turn {
    fn new<'py>(bridge: &Bound<'py, LoopBridge>) -> PyResult<Bound<'py, Self>> {
        let py = bridge.py();
        // SAFETY: attached; the result is an owned reference or null with an exception set.
        let context = unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyContext_New())? };
        let (bridge, context) = (bridge.clone().unbind(), context.unbind());
        Bound::new(py, Self { bridge, context, under_way: GilFlag::default() })
    }

    /// Calls `loop.call_soon(turn, context=...)`.
    fn take(
        slf: &Bound<'_, Self>,
        event_loop: &Bound<'_, PyAny>,
        call_soon: &Bound<'_, PyString>,
    ) -> PyResult<()> {
        let context = &slf.get().context;
        calls::call_method(call_soon, [event_loop, slf.as_any()], Some(context))?;
        slf.get().under_way.set();
        Ok(())
    }
}

/// Every bridge whose loop is alive.
static BRIDGES: GilCell<Vec<Py<LoopBridge>>> = GilCell::new(Vec::new());

/// Bridges whose pending work is done when the core has returned.
static DUE: GilCell<Vec<Py<LoopBridge>>> = GilCell::new(Vec::new());

/// Does what had to wait for the core to return.
#[inline]
pub(crate) fn settle(py: Python<'_>) {
    if DUE.with(|due| !due.is_empty()) {
        settle_due(py);
    }
}

#[cold]
fn settle_due(py: Python<'_>) {
    while let Some(bridge) = DUE.with(|due| due.pop()) {
        let bridge = bridge.into_bound(py);
        if let Err(error) = LoopBridge::drain_soon(&bridge)
            // The loop is closed: nobody is left to be woken.
            && !error.is_instance_of::<PyRuntimeError>(py)
        {
            error.write_unraisable(py, Some(bridge.as_any()));
        }
    }
}

/// An eventfd of Linux; elsewhere there is none.
#[cfg(target_os = "linux")]
struct EventFd(std::os::fd::OwnedFd);

#[cfg(target_os = "linux")]
impl EventFd {
    /// Returns a new one, unless `TICKBUS_EVENTFD=0` asks for the portable way.
    fn open() -> Option<Self> {
        use std::os::fd::FromRawFd;
        if std::env::var_os("TICKBUS_EVENTFD").is_some_and(|value| value == "0") {
            return None;
        }
        // SAFETY: the call takes no pointers; a descriptor that it returns is open and nobody's
        // yet.
        unsafe {
            let descriptor = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            (descriptor >= 0).then(|| Self(std::os::fd::OwnedFd::from_raw_fd(descriptor)))
        }
    }

    fn descriptor(&self) -> i32 {
        use std::os::fd::AsRawFd;
        self.0.as_raw_fd()
    }

    fn write(&self) {
        let one = 1_u64;
        // SAFETY: the descriptor is open and `one` has the eight bytes that are written. The only
        // failure left, a full counter, means that the loop is signalled already.
        unsafe { libc::write(self.descriptor(), (&raw const one).cast(), 8) };
    }

    fn read(&self) {
        let mut count = 0_u64;
        // SAFETY: the descriptor is open, non-blocking, and `count` has room for the eight bytes
        // that are read.
        unsafe { libc::read(self.descriptor(), (&raw mut count).cast(), 8) };
    }
}

#[cfg(not(target_os = "linux"))]
enum EventFd {}

#[cfg(not(target_os = "linux"))]
impl EventFd {
    fn open() -> Option<Self> {
        None
    }

    fn descriptor(&self) -> i32 {
        match *self {}
    }

    fn write(&self) {
        match *self {}
    }

    fn read(&self) {
        match *self {}
    }
}

/// Returns a number that tells living threads apart. Called attached.
fn thread_mark() -> usize {
    // SAFETY: the calling thread is attached, so it has a state; only its address is used.
    unsafe { ffi::PyThreadState_Get() as usize }
}

/// Makes what would else be made on first use; see `process::prepare`.
pub(crate) fn prepare(py: Python<'_>) -> PyResult<()> {
    py.get_type::<LoopBridge>();
    py.get_type::<Turn>();
    on_a_loop(py)?;
    // There may be no running loop: what counts is that it was asked for.
    let _ = (running_loop(py), runs_a_task(py.None().bind(py)));
    Ok(())
}

/// Returns the running loop.
pub(crate) fn running_loop(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    FUNCTION.import(py, "asyncio", "get_running_loop")?.call0()
}

/// Returns whether the calling thread runs an event loop.
pub(crate) fn on_a_loop(py: Python<'_>) -> PyResult<bool> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    Ok(!FUNCTION.import(py, "asyncio", "_get_running_loop")?.call0()?.is_none())
}

/// Returns whether the loop is inside a step of a task.
fn runs_a_task(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    static TASKS: PyOnceLock<Option<Py<PyDict>>> = PyOnceLock::new();
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = event_loop.py();
    // Until 3.13 the table behind `current_task`, which is Python code on 3.11; afterwards each
    // thread has its own and the function is quick.
    let tasks = TASKS.get_or_try_init(py, || {
        if py.version_info() >= (3, 14) {
            return Ok::<_, PyErr>(None);
        }
        let tasks = py.import("asyncio.tasks")?.getattr("_current_tasks")?;
        Ok(tasks.cast_into::<PyDict>().ok().map(Bound::unbind))
    })?;
    match tasks {
        Some(tasks) => Ok(tasks.bind(py).get_item(event_loop)?.is_some()),
        None => {
            let task = FUNCTION.import(py, "asyncio", "current_task")?.call1((event_loop,))?;
            Ok(!task.is_none())
        }
    }
}
