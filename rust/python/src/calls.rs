//! Calls into Python code from threads that may not live to see it return.
//!
//! Until CPython 3.13 a thread that asks for the global interpreter lock while the interpreter ends
//! is ended by `pthread_exit`, which unwinds its stack. Unwinding through a call that is declared
//! not to unwind, as those of `pyo3::ffi` are, crashes the process. Here such a call hangs instead,
//! as it does since 3.14 and as PyO3 does where it takes the lock itself.

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyString, PyTuple, PyType};
use smallvec::SmallVec;

/// Stops the thread for good when it is unwound.
struct HangWhenUnwound;

impl Drop for HangWhenUnwound {
    fn drop(&mut self) {
        loop {
            std::thread::park();
        }
    }
}

type Call<A, B, C, D> = unsafe extern "C" fn(A, B, C, D) -> *mut ffi::PyObject;
type UnwindingCall<A, B, C, D> = unsafe extern "C-unwind" fn(A, B, C, D) -> *mut ffi::PyObject;

/// Calls a function of the C interface that may run Python code.
///
/// # Safety
///
/// As for the function.
unsafe fn guarded<A, B, C, D>(
    call: Call<A, B, C, D>,
    a: A,
    b: B,
    c: C,
    d: D,
) -> *mut ffi::PyObject {
    // SAFETY: the two kinds of function pointers differ only in what unwinding does.
    let call = unsafe { std::mem::transmute::<Call<A, B, C, D>, UnwindingCall<A, B, C, D>>(call) };
    // The compiler must not see which function it is: that one is known not to unwind.
    let call = std::hint::black_box(call);
    let guard = HangWhenUnwound;
    // SAFETY: the caller's promise.
    let result = unsafe { call(a, b, c, d) };
    std::mem::forget(guard);
    result
}

/// Calls a function.
pub(crate) fn call<'py, const N: usize>(
    py: Python<'py>,
    function: &Py<PyAny>,
    arguments: [&Bound<'py, PyAny>; N],
) -> PyResult<Bound<'py, PyAny>> {
    let all = arguments.map(Bound::as_ptr);
    let (function, names) = (function.as_ptr(), std::ptr::null_mut());
    // SAFETY: attached; N positional arguments; the result is an owned reference or null with an
    // exception set.
    unsafe {
        let result = guarded(ffi::PyObject_Vectorcall, function, all.as_ptr(), N, names);
        Bound::from_owned_ptr_or_err(py, result)
    }
}

/// Makes an instance of a class.
pub(crate) fn make<'py, const N: usize>(
    class: &Bound<'py, PyType>,
    arguments: [Bound<'py, PyAny>; N],
) -> PyResult<Bound<'py, PyAny>> {
    let all = arguments.each_ref().map(Bound::as_ptr);
    let (class_ptr, names) = (class.as_ptr(), std::ptr::null_mut());
    // SAFETY: attached; N positional arguments; the result is an owned reference or null with an
    // exception set.
    unsafe {
        let result = guarded(ffi::PyObject_Vectorcall, class_ptr, all.as_ptr(), N, names);
        Bound::from_owned_ptr_or_err(class.py(), result)
    }
}

/// Lets go of an object, whose destructor may be Python code.
pub(crate) fn release(_py: Python<'_>, object: Py<PyAny>) {
    type Drop = unsafe extern "C" fn(*mut ffi::PyObject);
    type UnwindingDrop = unsafe extern "C-unwind" fn(*mut ffi::PyObject);
    // SAFETY: the two kinds of function pointers differ only in what unwinding does.
    let drop = unsafe { std::mem::transmute::<Drop, UnwindingDrop>(ffi::Py_DecRef) };
    let drop = std::hint::black_box(drop);
    let guard = HangWhenUnwound;
    // SAFETY: attached; the reference was owned.
    unsafe { drop(object.into_ptr()) };
    std::mem::forget(guard);
}

/// Calls a method of the first argument with the others, and with `context=` by name if there is
/// one.
pub(crate) fn call_method<'py, const N: usize>(
    method: &Bound<'py, PyString>,
    arguments: [&Bound<'py, PyAny>; N],
    context: Option<&Py<PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    static KEYWORDS: PyOnceLock<Py<PyTuple>> = PyOnceLock::new();
    let py = method.py();
    let names = KEYWORDS
        .get_or_try_init(py, || PyTuple::new(py, [intern!(py, "context")]).map(Bound::unbind))?;
    let names = context.map_or(std::ptr::null_mut(), |_| names.as_ptr());
    let mut all: SmallVec<[_; 4]> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    all.extend(context.map(Py::as_ptr));
    // SAFETY: attached; N positional arguments, the first of which is the object, and one for each
    // name; the result is an owned reference or null with an exception set.
    unsafe {
        let (method, all) = (method.as_ptr(), all.as_ptr());
        let result = guarded(ffi::PyObject_VectorcallMethod, method, all, N, names);
        Bound::from_owned_ptr_or_err(py, result)
    }
}
