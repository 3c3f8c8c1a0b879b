//! What `recv()`, `recv_many()` and `publish_async()` return: one awaitable type, written against
//! the C interface because the fast path (`am_send` finishing in the first step, without an
//! exception and without a coroutine) has no PyO3 form.
//!
//! ```text
//!  New ─► ready: Done            the await never suspends
//!   └───► Waiting (wake-up) ─► New ...       woken: look again, the event is still queued
//!   └───► Yielded ─► New         after 256 ready completions in a row, once
//! ```
//!
//! An awaitable never holds an event, so throwing into it, closing it or dropping it loses none.

use crate::bus::PublishTask;
use crate::error;
use crate::line::ReadByTasks;
use crate::queue::LockFreeEventQueue;
use crate::spare::Spare;
use crate::stop;
use crate::store::StoreTask;
use crate::subscription::AsyncEventSubscription;
use crate::system::{AsyncSystemSubscription, CompactTask, Form};
use crate::wakeup::{Wakeup, track};
use pyo3::exceptions::{PyRuntimeError, PyStopAsyncIteration};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use std::ffi::{c_int, c_void};
use std::ptr;

/// Ready completions in a row after which the loop gets a turn.
pub(crate) const READY_IN_A_ROW: u32 = 256;

/// What an awaitable is for.
pub(crate) enum Job {
    /// One event; `Closed` at the end.
    Recv(Py<AsyncEventSubscription>),
    /// One event; `StopAsyncIteration` at the end.
    Next(Py<AsyncEventSubscription>),
    /// A list of up to so many events.
    RecvMany(Py<AsyncEventSubscription>, usize),
    Publish(Box<PublishTask>),
    Enqueue(Py<LockFreeEventQueue>, Box<PublishTask>),
    Dequeue(Py<LockFreeEventQueue>),
    /// Compact events, in one form or another.
    Take(Py<AsyncSystemSubscription>, Form),
    PublishCompact(Box<CompactTask>),
    /// Something of a store.
    Store(Box<StoreTask>),
    /// Nothing to wait for.
    Ready(Py<PyAny>),
}

impl Job {
    /// Drops it. A slot is attached without PyO3 knowing it, so that a plain drop would put the
    /// references on a list behind a lock instead.
    #[inline]
    fn release(self, py: Python<'_>) {
        match self {
            Self::Recv(subscription)
            | Self::Next(subscription)
            | Self::RecvMany(subscription, _) => {
                subscription.drop_ref(py);
            }
            Self::Ready(value) => value.drop_ref(py),
            Self::Publish(task) => drop(task),
            Self::Enqueue(queue, task) => {
                drop(task);
                queue.drop_ref(py);
            }
            Self::Dequeue(queue) => queue.drop_ref(py),
            Self::Take(subscription, form) => {
                subscription.drop_ref(py);
                if let Form::Into(array) = form {
                    array.drop_ref(py);
                }
            }
            Self::PublishCompact(task) => drop(task),
            Self::Store(task) => drop(task),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Recv(_) => "recv",
            Self::Next(_) => "__anext__",
            Self::RecvMany(..) => "recv_many",
            Self::Publish(_) => "publish_async",
            Self::Enqueue(..) => "enqueue_async",
            Self::Dequeue(_) => "dequeue_async",
            Self::Take(_, form) => form.name(),
            Self::PublishCompact(_) => "publish_async",
            Self::Store(_) => "wait",
            Self::Ready(_) => "ready",
        }
    }
}

/// What a job's step gave.
pub(crate) enum Progress {
    Done(Py<PyAny>),
    /// Suspend until this comes.
    Wait(Py<Wakeup>),
    /// Let the loop have a turn.
    Yield,
}

enum State {
    New,
    Waiting(Py<Wakeup>),
    Done,
}

#[repr(C)]
struct Awaitable {
    base: ffi::PyObject,
    job: Job,
    state: State,
}

/// Awaitables that are gone: most live for one call only.
static SPARE: Spare = Spare::new();

/// Returns an awaitable that does `job`.
#[inline]
pub(crate) fn awaitable(py: Python<'_>, job: Job) -> PyResult<Py<PyAny>> {
    // SAFETY: the type is a GC type of `Awaitable`'s size; the fields are written before anybody
    // can see the object, which is untracked until it suspends.
    unsafe {
        let object = match SPARE.pop() {
            Some(spare) => spare.cast(),
            None => ffi::PyObject_GC_New::<Awaitable>(class(py)?.as_type_ptr()),
        };
        if object.is_null() {
            return Err(PyErr::fetch(py));
        }
        ptr::write(&raw mut (*object).job, job);
        ptr::write(&raw mut (*object).state, State::New);
        Ok(Bound::from_owned_ptr(py, object.cast()).unbind())
    }
}

impl Awaitable {
    #[inline]
    fn step(&mut self, py: Python<'_>) -> PyResult<Progress> {
        match std::mem::replace(&mut self.state, State::Done) {
            State::New => {}
            State::Waiting(wakeup) => {
                self.leave(py, &wakeup);
                wakeup.drop_ref(py);
            }
            State::Done => {
                let name = self.job.name();
                return Err(PyRuntimeError::new_err(format!("cannot await {name}() twice")));
            }
        }
        let progress = match &mut self.job {
            Job::Recv(subscription) => subscription.get().poll_one(py, || error::closed(py)),
            Job::Next(subscription) => {
                subscription.get().poll_one(py, || PyStopAsyncIteration::new_err(()))
            }
            Job::RecvMany(subscription, limit) => subscription.get().poll_many(py, *limit),
            Job::Publish(task) => task.poll(py),
            Job::Enqueue(queue, task) => queue.get().poll_enqueue(py, task),
            Job::Dequeue(queue) => queue.get().poll_dequeue(py),
            Job::Take(subscription, form) => subscription.get().poll_form(py, form),
            Job::PublishCompact(task) => task.poll(py),
            Job::Store(task) => task.poll(py),
            Job::Ready(value) => Ok(Progress::Done(value.clone_ref(py))),
        }?;
        match &progress {
            Progress::Done(_) => {}
            Progress::Wait(wakeup) => self.state = State::Waiting(wakeup.clone_ref(py)),
            Progress::Yield => self.state = State::New,
        }
        Ok(progress)
    }

    /// Leaves the line in which the wake-up stood.
    fn leave(&mut self, py: Python<'_>, wakeup: &Py<Wakeup>) {
        match &mut self.job {
            Job::Recv(subscription) | Job::Next(subscription) | Job::RecvMany(subscription, _) => {
                subscription.get().leave_line(py, wakeup);
            }
            Job::Publish(task) | Job::Enqueue(_, task) => task.stop_waiting(py),
            Job::Dequeue(queue) => queue.get().leave_line(wakeup),
            Job::Take(subscription, _) => subscription.get().leave_line(py, wakeup),
            Job::PublishCompact(task) => task.stop_waiting(py),
            Job::Store(_) | Job::Ready(_) => {}
        }
    }

    /// Waits in the running loop if its task has refused, with `error`, to wait for a wake-up of
    /// another loop. Returns whether it did.
    fn rebind(&mut self, py: Python<'_>, error: &PyErr) -> PyResult<bool> {
        let (State::Waiting(wakeup), true) =
            (&self.state, error.is_instance_of::<PyRuntimeError>(py))
        else {
            return Ok(false);
        };
        if wakeup.get().has_waiter() {
            return Ok(false);
        }
        match &self.job {
            Job::Recv(subscription) | Job::Next(subscription) | Job::RecvMany(subscription, _) => {
                subscription.get().rebind(py)
            }
            Job::Dequeue(queue) => queue.get().rebind(py, wakeup),
            Job::Take(subscription, _) => subscription.get().rebind(py),
            Job::Publish(_)
            | Job::Enqueue(..)
            | Job::PublishCompact(_)
            | Job::Store(_)
            | Job::Ready(_) => Ok(false),
        }
    }

    /// Ends it from outside; whoever stands next in line is woken if there is something for it.
    fn abandon(&mut self, py: Python<'_>) {
        if let State::Waiting(wakeup) = std::mem::replace(&mut self.state, State::Done) {
            self.leave(py, &wakeup);
            match &self.job {
                Job::Recv(subscription)
                | Job::Next(subscription)
                | Job::RecvMany(subscription, _) => subscription.get().wake_next(py),
                Job::Dequeue(queue) => queue.get().wake_next(py),
                Job::Take(subscription, _) => subscription.get().wake_next(py),
                Job::Publish(_)
                | Job::Enqueue(..)
                | Job::PublishCompact(_)
                | Job::Store(_)
                | Job::Ready(_) => {}
            }
        }
        match &mut self.job {
            Job::Publish(task) | Job::Enqueue(_, task) => task.abandon(py),
            Job::PublishCompact(task) => task.abandon(py),
            _ => {}
        }
    }
}

/// Returns the object behind a slot's or method's `self`.
///
/// # Safety
///
/// `object` is an `Awaitable` and no other reference to its fields is alive.
#[inline]
unsafe fn this<'a>(object: *mut ffi::PyObject) -> &'a mut Awaitable {
    // SAFETY: the caller's promise. Steps of one awaitable are never nested: a step that is
    // running has state `Done`, so a nested one returns at once.
    unsafe { &mut *object.cast() }
}

unsafe extern "C" fn am_send(
    object: *mut ffi::PyObject,
    _value: *mut ffi::PyObject,
    result: *mut *mut ffi::PyObject,
) -> ffi::PySendResult {
    // SAFETY: the interpreter calls slots attached, with an object of the slot's type.
    let py = unsafe { Python::assume_attached() };
    // SAFETY: as above.
    let awaitable = unsafe { this(object) };
    let ready = match (&awaitable.state, &awaitable.job) {
        (State::New, Job::Recv(subscription) | Job::Next(subscription)) => {
            subscription.get().take_quickly(py)
        }
        (State::New, Job::Dequeue(queue)) => queue.get().take_quickly(py),
        _ => None,
    };
    if let Some(event) = ready.and_then(|event| event.into_object(py)) {
        awaitable.state = State::Done;
        // SAFETY: `result` is where the interpreter wants the value.
        unsafe { *result = event.into_ptr() };
        return ffi::PySendResult::PYGEN_RETURN;
    }
    let progress = awaitable.step(py);
    let (sent, value) = match progress {
        Ok(Progress::Done(value)) => (ffi::PySendResult::PYGEN_RETURN, value.into_ptr()),
        Ok(Progress::Wait(wakeup)) => {
            // A ready one never lives long enough to be part of a cycle.
            track(object);
            (ffi::PySendResult::PYGEN_NEXT, wakeup.into_ptr())
        }
        Ok(Progress::Yield) => (ffi::PySendResult::PYGEN_NEXT, py.None().into_ptr()),
        Err(error) => {
            error.restore(py);
            (ffi::PySendResult::PYGEN_ERROR, ptr::null_mut())
        }
    };
    // SAFETY: `result` is where the interpreter wants the value.
    unsafe { *result = value };
    sent
}

unsafe extern "C" fn iternext(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    let mut value = ptr::null_mut();
    // SAFETY: the arguments are those of the slot.
    match unsafe { am_send(object, ptr::null_mut(), &raw mut value) } {
        ffi::PySendResult::PYGEN_RETURN => {
            // SAFETY: slots are called attached, and `am_send` returned an owned reference.
            unsafe {
                let py = Python::assume_attached();
                stop::raise(py, Bound::from_owned_ptr(py, value).unbind());
            }
            ptr::null_mut()
        }
        _ => value,
    }
}

unsafe extern "C" fn send(
    object: *mut ffi::PyObject,
    _value: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: methods are called like slots.
    unsafe { iternext(object) }
}

unsafe extern "C" fn throw(
    object: *mut ffi::PyObject,
    arguments: *mut *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
) -> *mut ffi::PyObject {
    // SAFETY: methods are called attached; `arguments` has `count` borrowed references.
    unsafe {
        let py = Python::assume_attached();
        let argument = |index: isize| {
            (index < count).then(|| Bound::from_borrowed_ptr(py, *arguments.offset(index)))
        };
        let error = match (argument(0), argument(1)) {
            (Some(class), value) if class.is_instance_of::<PyType>() => {
                let value = value.filter(|value| !value.is_none());
                let made = match value {
                    Some(value) if value.is_instance(&class).unwrap_or(false) => Ok(value),
                    Some(value) => class.call1((value,)),
                    None => class.call0(),
                };
                made.map_or_else(|error| error, PyErr::from_value)
            }
            (Some(value), _) => PyErr::from_value(value),
            (None, _) => pyo3::exceptions::PyTypeError::new_err("throw() needs an exception"),
        };
        let error = match this(object).rebind(py, &error) {
            Ok(true) => return iternext(object),
            Ok(false) => error,
            Err(error) => error,
        };
        this(object).abandon(py);
        error.restore(py);
        ptr::null_mut()
    }
}

unsafe extern "C" fn close(
    object: *mut ffi::PyObject,
    _nothing: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: methods are called attached, with an object of the type.
    unsafe {
        let py = Python::assume_attached();
        this(object).abandon(py);
        py.None().into_ptr()
    }
}

unsafe extern "C" fn itself(object: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: the object is alive.
    unsafe { ffi::Py_NewRef(object) }
}

unsafe extern "C" fn name(object: *mut ffi::PyObject, _: *mut c_void) -> *mut ffi::PyObject {
    // SAFETY: getters are called attached, with an object of the type.
    unsafe {
        let py = Python::assume_attached();
        pyo3::types::PyString::new(py, this(object).job.name()).into_ptr()
    }
}

unsafe extern "C" fn traverse(
    object: *mut ffi::PyObject,
    visit: ffi::visitproc,
    arg: *mut c_void,
) -> c_int {
    // SAFETY: the collector passes a live object and its own `visit`; nothing is changed here.
    unsafe {
        let awaitable = &*object.cast::<Awaitable>();
        let mut seen = [ptr::null_mut(); 5];
        seen[0] = ffi::Py_TYPE(object).cast();
        if let State::Waiting(wakeup) = &awaitable.state {
            seen[1] = wakeup.as_ptr();
        }
        match &awaitable.job {
            Job::Recv(subscription) | Job::Next(subscription) | Job::RecvMany(subscription, _) => {
                seen[2] = subscription.as_ptr();
            }
            Job::Publish(task) => [seen[2], seen[3]] = task.references(),
            Job::Enqueue(queue, task) => {
                [seen[2], seen[3]] = task.references();
                seen[4] = queue.as_ptr();
            }
            Job::Dequeue(queue) => seen[2] = queue.as_ptr(),
            Job::Take(subscription, form) => {
                seen[2] = subscription.as_ptr();
                if let Form::Into(array) = form {
                    seen[3] = array.as_ptr();
                }
            }
            Job::PublishCompact(task) => [seen[2], seen[3]] = task.references(),
            Job::Store(task) => seen[2] = task.reference(),
            Job::Ready(value) => seen[2] = value.as_ptr(),
        }
        for reference in seen.into_iter().filter(|reference| !reference.is_null()) {
            let stop = visit(reference, arg);
            if stop != 0 {
                return stop;
            }
        }
        0
    }
}

unsafe extern "C" fn dealloc(object: *mut ffi::PyObject) {
    // SAFETY: the last reference is gone, so the fields are dropped here and only here.
    unsafe {
        let py = Python::assume_attached();
        ffi::PyObject_GC_UnTrack(object.cast());
        // Leaving the line may run Python code, which must not see the caller's exception.
        if !matches!((*object.cast::<Awaitable>()).state, State::Done | State::New)
            || matches!(
                (*object.cast::<Awaitable>()).job,
                Job::Publish(_) | Job::Enqueue(..) | Job::PublishCompact(_)
            )
        {
            let pending = PyErr::take(py);
            this(object).abandon(py);
            if let Some(pending) = pending {
                pending.restore(py);
            }
        }
        stop::forget(py);
        ptr::read(&raw const (*object.cast::<Awaitable>()).job).release(py);
        if let State::Waiting(wakeup) = ptr::read(&raw const (*object.cast::<Awaitable>()).state) {
            wakeup.drop_ref(py);
        }
        if !SPARE.push(object) {
            let class = ffi::Py_TYPE(object);
            ffi::PyObject_GC_Del(object.cast());
            ffi::Py_DECREF(class.cast());
        }
    }
}

/// Returns the type, made on first use.
#[inline]
pub(crate) fn class(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.get_or_try_init(py, || make_class(py)).map(|class| class.bind(py))
}

fn make_class(py: Python<'_>) -> PyResult<Py<PyType>> {
    fn slot(slot: c_int, function: *mut c_void) -> ffi::PyType_Slot {
        ffi::PyType_Slot { slot, pfunc: function }
    }
    let methods = Box::leak(Box::new([
        ffi::PyMethodDef {
            ml_name: c"send".as_ptr(),
            ml_meth: ffi::PyMethodDefPointer { PyCFunction: send },
            ml_flags: ffi::METH_O,
            ml_doc: c"Resumes the awaitable.".as_ptr(),
        },
        ffi::PyMethodDef {
            ml_name: c"throw".as_ptr(),
            ml_meth: ffi::PyMethodDefPointer { PyCFunctionFast: throw },
            ml_flags: ffi::METH_FASTCALL,
            ml_doc: c"Ends the awaitable with an exception; no event is lost.".as_ptr(),
        },
        ffi::PyMethodDef {
            ml_name: c"close".as_ptr(),
            ml_meth: ffi::PyMethodDefPointer { PyCFunction: close },
            ml_flags: ffi::METH_NOARGS,
            ml_doc: c"Ends the awaitable; no event is lost.".as_ptr(),
        },
        ffi::PyMethodDef::zeroed(),
    ]));
    let getter = |field: &'static std::ffi::CStr| ffi::PyGetSetDef {
        name: field.as_ptr(),
        get: Some(name),
        set: None,
        doc: ptr::null(),
        closure: ptr::null_mut(),
    };
    let getters = Box::leak(Box::new([
        getter(c"__name__"),
        getter(c"__qualname__"),
        ffi::PyGetSetDef {
            name: ptr::null(),
            get: None,
            set: None,
            doc: ptr::null(),
            closure: ptr::null_mut(),
        },
    ]));
    let mut slots = [
        slot(ffi::Py_am_await, itself as *mut c_void),
        slot(ffi::Py_am_send, am_send as *mut c_void),
        slot(ffi::Py_tp_iter, itself as *mut c_void),
        slot(ffi::Py_tp_iternext, iternext as *mut c_void),
        slot(ffi::Py_tp_methods, methods.as_mut_ptr().cast()),
        slot(ffi::Py_tp_getset, getters.as_mut_ptr().cast()),
        slot(ffi::Py_tp_traverse, traverse as *mut c_void),
        slot(ffi::Py_tp_dealloc, dealloc as *mut c_void),
        slot(0, ptr::null_mut()),
    ];
    let mut spec = ffi::PyType_Spec {
        name: c"tickbus._core._Awaitable".as_ptr(),
        basicsize: size_of::<Awaitable>() as c_int,
        itemsize: 0,
        flags: (ffi::Py_TPFLAGS_DEFAULT
            | ffi::Py_TPFLAGS_HAVE_GC
            | ffi::Py_TPFLAGS_DISALLOW_INSTANTIATION) as _,
        slots: slots.as_mut_ptr(),
    };
    // SAFETY: the specification describes `Awaitable`; methods and getters live for ever.
    unsafe {
        let class = ffi::PyType_FromSpec(&raw mut spec);
        Ok(Bound::from_owned_ptr_or_err(py, class)?.cast_into::<PyType>()?.unbind())
    }
}
