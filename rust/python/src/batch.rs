//! Many compact events in one object: a sequence for Python, a buffer for NumPy, columns for Arrow.

use crate::error::ConfigError;
use crate::event::{PyEvent, nameless, outside_name, type_name};
use crate::gil::GilCell;
use crate::names::{self, source_text, symbol_text};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyCapsule, PyDict, PyList, PySlice, PyTuple};
use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::ptr;
use tickbus::arrow::{ArrowArray, ArrowSchema};
use tickbus::{EVENT_BYTES, Event, EventType, SourceId, Symbol};

/// Compact events in a row, unchangeable.
#[pyclass(frozen, sequence, module = "tickbus")]
#[derive(Debug)]
pub(crate) struct EventBatch {
    events: Vec<Event>,
    /// How many, where buffers can point to it.
    length: isize,
}

/// What buffers say of their items: the layout of an event, as NumPy reads it.
const FORMAT: &CStr =
    c"T{Q:timestamp:B:event_type:B:priority:H:source_id:I:symbol:d:value:Q:metadata:}";
const ITEM: isize = EVENT_BYTES as isize;
static STRIDE: isize = ITEM;

/// What is needed of NumPy, imported on first use.
struct NumPy {
    dtype: Py<PyAny>,
    frombuffer: Py<PyAny>,
}

fn numpy(py: Python<'_>) -> PyResult<&NumPy> {
    static NUMPY: PyOnceLock<NumPy> = PyOnceLock::new();
    if let Some(numpy) = NUMPY.get(py) {
        return Ok(numpy);
    }
    // Imported before the cell is touched, so that a `fork` meanwhile does not leave it half made.
    // It says what to install if NumPy is not there.
    let dtype = py.import("tickbus.arrays")?.getattr("EVENT_DTYPE")?.unbind();
    let frombuffer = py.import("numpy")?.getattr("frombuffer")?.unbind();
    NUMPY.get_or_try_init(py, || Ok(NumPy { dtype, frombuffer }))
}

impl EventBatch {
    pub(crate) fn of(events: Vec<Event>) -> Self {
        // A vector's length always fits.
        let length = events.len() as isize;
        Self { events, length }
    }

    pub(crate) fn events(&self) -> &[Event] {
        &self.events
    }
}

/// Returns copies of events: of a batch, an array, or anything that can be iterated over.
pub(crate) fn collect(events: &Bound<'_, PyAny>) -> PyResult<Vec<Event>> {
    if let Ok(batch) = events.cast_exact::<EventBatch>() {
        return Ok(batch.get().events.clone());
    }
    if let Ok(list) = events.cast_exact::<PyList>() {
        return list.iter().map(|item| event(&item)).collect();
    }
    // SAFETY: attached, and an object.
    if unsafe { ffi::PyObject_CheckBuffer(events.as_ptr()) } != 0 {
        return from_array(events);
    }
    let mut collected = Vec::with_capacity(events.len().unwrap_or(0));
    for item in events.try_iter()? {
        collected.push(event(&item?)?);
    }
    Ok(collected)
}

#[inline]
pub(crate) fn event(item: &Bound<'_, PyAny>) -> PyResult<Event> {
    match item.cast_exact::<PyEvent>() {
        Ok(event) => Ok(event.get().0),
        Err(_) => {
            Err(PyTypeError::new_err(format!("an item was {}; it must be an Event", item.repr()?)))
        }
    }
}

/// Returns events whose memory can be looked at: a batch or an array as it is, or copies.
pub(crate) fn in_memory<'py>(events: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: attached, and an object.
    match unsafe { ffi::PyObject_CheckBuffer(events.as_ptr()) } {
        0 => Ok(Bound::new(events.py(), EventBatch::of(collect(events)?))?.into_any()),
        _ => Ok(events.clone()),
    }
}

/// Runs `f` on the events of a batch or an array, where they lie if they lie as those of a slice do.
/// `f` runs no Python code, which could change the array.
pub(crate) fn with_events<O>(
    events: &Bound<'_, PyAny>,
    f: impl FnOnce(&[Event]) -> O,
) -> PyResult<O> {
    if let Ok(batch) = events.cast_exact::<EventBatch>() {
        return Ok(f(&batch.get().events));
    }
    let array = Array::of(events, ffi::PyBUF_STRIDES)?;
    match array.is_slice() {
        // SAFETY: the view has `length` events in a row, and nobody runs who could change them.
        true => Ok(f(unsafe { std::slice::from_raw_parts(array.first.cast(), array.length) })),
        false => Ok(f(&array.copy())),
    }
}

/// Returns the events of an array whose dtype is `EVENT_DTYPE`.
fn from_array(array: &Bound<'_, PyAny>) -> PyResult<Vec<Event>> {
    Array::of(array, ffi::PyBUF_STRIDES).map(|array| array.copy())
}

/// An array of one dimension whose dtype is `EVENT_DTYPE`.
pub(crate) struct Array {
    _buffer: Buffer,
    first: *mut u8,
    pub(crate) length: usize,
    /// Bytes from one event to the next.
    stride: isize,
}

impl Array {
    /// Returns a view of the array, with the flags of the buffer protocol, strides among them.
    pub(crate) fn of(array: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        let py = array.py();
        let Some(dtype) = array.getattr_opt(intern!(py, "dtype"))? else {
            return Err(PyTypeError::new_err(format!(
                "events was {}; it must be events or an array with the dtype EVENT_DTYPE: bytes \
                 are read by EventBatch.from_bytes()",
                array.get_type().name()?
            )));
        };
        let wanted = numpy(py)?.dtype.bind(py);
        if !dtype.is(wanted) && !dtype.eq(wanted)? {
            return Err(PyTypeError::new_err(format!(
                "the array's dtype was {dtype}; it must be EVENT_DTYPE"
            )));
        }
        let buffer = Buffer::get(array, flags)?;
        let view = &buffer.0;
        if view.ndim != 1 {
            return Err(PyValueError::new_err(format!(
                "the array had {} dimensions; it must have 1",
                view.ndim
            )));
        }
        // SAFETY: with one dimension and strides asked for, both point to one number.
        let (length, stride) = unsafe { (*view.shape as usize, *view.strides) };
        let first = view.buf.cast();
        Ok(Self { _buffer: buffer, first, length, stride })
    }

    /// Returns whether the events lie as those of a slice.
    fn is_slice(&self) -> bool {
        self.stride == ITEM && self.first.cast::<Event>().is_aligned() && !self.first.is_null()
    }

    fn copy(&self) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::with_capacity(self.length);
        // SAFETY: the view has `length` items of 32 bytes, `stride` bytes from one to the next, of
        // which any are an event; they may lie anywhere, so they are copied as bytes.
        unsafe {
            let to = events.as_mut_ptr();
            if self.stride == ITEM {
                ptr::copy_nonoverlapping(self.first, to.cast(), self.length * EVENT_BYTES);
            } else {
                for place in 0..self.length as isize {
                    let item = self.first.offset(place * self.stride);
                    ptr::copy_nonoverlapping(item, to.offset(place).cast(), EVENT_BYTES);
                }
            }
            events.set_len(self.length);
        }
        events
    }

    /// Writes an event into a place of an array that was got writable.
    #[inline]
    pub(crate) fn write(&self, place: usize, event: Event) {
        assert!(place < self.length, "the array has {} places", self.length);
        // SAFETY: the place is in the view, which was got writable; it may lie anywhere.
        unsafe {
            let to = self.first.offset(place as isize * self.stride);
            to.cast::<Event>().write_unaligned(event);
        }
    }
}

/// A view of an object's memory, given back when it is dropped.
struct Buffer(ffi::Py_buffer);

impl Buffer {
    fn get(object: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        let mut view = MaybeUninit::uninit();
        // SAFETY: attached; the view is initialized if the call succeeds.
        unsafe {
            if ffi::PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), flags) == 0 {
                Ok(Self(view.assume_init()))
            } else {
                Err(PyErr::fetch(object.py()))
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: made by `get`, in a function that stays attached.
        unsafe { ffi::PyBuffer_Release(&raw mut self.0) };
    }
}

#[pymethods]
impl EventBatch {
    #[new]
    #[pyo3(signature = (events, /))]
    fn new(events: &Bound<'_, PyAny>) -> PyResult<Self> {
        collect(events).map(Self::of)
    }

    /// Returns the events with these bytes, little-endian, 32 for each.
    #[staticmethod]
    #[pyo3(signature = (data, /))]
    fn from_bytes(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = Buffer::get(data, ffi::PyBUF_SIMPLE)?;
        let length = buffer.0.len as usize;
        if !length.is_multiple_of(EVENT_BYTES) {
            return Err(PyValueError::new_err(format!(
                "data had {length} bytes; it must be a multiple of {EVENT_BYTES}"
            )));
        }
        // SAFETY: a simple view is `length` bytes in a row; null only if there are none.
        let events = (0..length / EVENT_BYTES).map(|place| unsafe {
            let bytes = buffer.0.buf.cast::<[u8; EVENT_BYTES]>().add(place);
            Event::from_bytes(bytes.read_unaligned())
        });
        Ok(Self::of(events.collect()))
    }

    /// Returns the bytes of all events, little-endian, 32 for each.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, self.events.len() * EVENT_BYTES, |bytes| {
            for (place, event) in bytes.chunks_exact_mut(EVENT_BYTES).zip(&self.events) {
                place.copy_from_slice(&event.to_bytes());
            }
            Ok(())
        })
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.to_bytes(py)
    }

    /// Returns a read-only array with the dtype `EVENT_DTYPE` over the very memory of the batch.
    pub(crate) fn to_numpy<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = this.py();
        let numpy = numpy(py)?;
        numpy.frombuffer.bind(py).call1((this, &numpy.dtype))
    }

    fn __len__(&self) -> usize {
        self.events.len()
    }

    fn __getitem__<'py>(
        &self,
        py: Python<'py>,
        place: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if let Ok(slice) = place.cast::<PySlice>() {
            let indices = slice.indices(self.length)?;
            let places =
                (0..indices.slicelength as isize).map(|n| indices.start + n * indices.step);
            let events = places.map(|place| self.events[place as usize]).collect();
            return Ok(Bound::new(py, Self::of(events))?.into_any());
        }
        let index = match place.extract::<isize>() {
            // No batch is so long.
            Err(error) if error.is_instance_of::<PyOverflowError>(py) => None,
            index => Some(index?),
        };
        let from_start = index.map(|index| if index < 0 { index + self.length } else { index });
        let index = from_start.and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| self.events.get(index)) {
            Some(event) => Ok(PyEvent(*event).object(py)?.into_any()),
            None => Err(PyIndexError::new_err(format!(
                "index was {place}; the batch has {} events",
                self.length
            ))),
        }
    }

    fn __iter__(this: Py<Self>) -> BatchIterator {
        BatchIterator { batch: this, next: GilCell::new(0) }
    }

    fn __contains__(&self, event: &Bound<'_, PyAny>) -> bool {
        event.cast_exact::<PyEvent>().is_ok_and(|event| self.events.contains(&event.get().0))
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.events == other.events
    }

    fn __repr__(&self) -> String {
        format!("<EventBatch of {} events>", self.length)
    }

    /// Takes the names along: numbers mean nothing elsewhere.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let [types, sources, symbols] = [PyDict::new(py), PyDict::new(py), PyDict::new(py)];
        // Most events are like the one before them.
        let mut last = (None, None, None);
        for event in &self.events {
            let Event { event_type, source_id, symbol, .. } = *event;
            if last.0.replace(event_type) != Some(event_type) {
                types.set_item(event_type.0, type_name(event_type)?)?;
            }
            if last.1.replace(source_id) != Some(source_id) && source_id != SourceId::NONE {
                let (id, text) = (source_id.0.into(), source_text(py, source_id));
                sources.set_item(id, outside_name("source_id", id, text)?)?;
            }
            if last.2.replace(symbol) != Some(symbol) && symbol != Symbol::NONE {
                let text = symbol_text(py, symbol);
                symbols.set_item(symbol.0, outside_name("symbol", symbol.0, text)?)?;
            }
        }
        let restore = py.import("tickbus._core")?.getattr("_restore_batch")?;
        (restore, (self.to_bytes(py)?, types, sources, symbols)).into_pyobject(py)
    }

    unsafe fn __getbuffer__(
        this: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let batch = this.get();
        if flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
            return Err(PyBufferError::new_err("a batch is unchangeable; copy it to write"));
        }
        let asked = |flag: c_int| flags & flag == flag;
        let is_shaped = asked(ffi::PyBUF_ND);
        // SAFETY: the interpreter passes a view to be filled in. What it points to belongs to the
        // batch, which the view keeps, or to the process; nobody writes through it.
        unsafe {
            (*view).buf = batch.events.as_ptr().cast_mut().cast();
            (*view).len = batch.length * ITEM;
            (*view).itemsize = if is_shaped { ITEM } else { 1 };
            (*view).readonly = 1;
            (*view).ndim = 1;
            (*view).format = match asked(ffi::PyBUF_FORMAT) {
                true => FORMAT.as_ptr().cast_mut(),
                false => ptr::null_mut(),
            };
            (*view).shape = match is_shaped {
                true => (&raw const batch.length).cast_mut(),
                false => ptr::null_mut(),
            };
            (*view).strides = match asked(ffi::PyBUF_STRIDES) {
                true => (&raw const STRIDE).cast_mut(),
                false => ptr::null_mut(),
            };
            (*view).suboffsets = ptr::null_mut();
            (*view).internal = ptr::null_mut();
            (*view).obj = this.into_ptr();
        }
        Ok(())
    }

    /// Returns the types of the columns.
    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        PyCapsule::new_with_value(py, ArrowSchema::of_events(), c"arrow_schema")
    }

    /// Returns the types of the columns, and the columns.
    #[pyo3(signature = (requested_schema=None))]
    fn __arrow_c_array__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyCapsule>, Bound<'py, PyCapsule>)> {
        // The specification allows to answer with another schema than the requested one.
        let _ = requested_schema;
        let array = ArrowArray::of_events(&self.events)
            .map_err(|error| PyOverflowError::new_err(error.to_string()))?;
        let array = PyCapsule::new_with_value(py, array, c"arrow_array")?;
        Ok((self.__arrow_c_schema__(py)?, array))
    }
}

/// Makes a batch of what another process has pickled; its numbers become those of this one.
#[pyfunction]
#[pyo3(signature = (data, types, sources, symbols, /))]
pub(crate) fn _restore_batch(
    data: &Bound<'_, PyAny>,
    types: HashMap<u8, String>,
    sources: HashMap<u16, String>,
    symbols: HashMap<u32, String>,
) -> PyResult<EventBatch> {
    let refused = |error: &tickbus::NameError| names::refused(error);
    for (&code, name) in &types {
        EventType::register(name, code).map_err(|error| ConfigError::new_err(error.to_string()))?;
    }
    let mut own_sources = HashMap::from([(0, SourceId::NONE)]);
    for (&id, name) in &sources {
        own_sources.insert(id, SourceId::new(name).map_err(|error| refused(&error))?);
    }
    let mut own_symbols = HashMap::from([(0, Symbol::NONE)]);
    for (&id, name) in &symbols {
        own_symbols.insert(id, Symbol::new(name).map_err(|error| refused(&error))?);
    }
    let mut batch = EventBatch::from_bytes(data)?;
    for event in &mut batch.events {
        let Event { event_type, source_id, symbol, .. } = *event;
        if !types.contains_key(&event_type.0) {
            return Err(nameless("event_type", event_type.0.into()));
        }
        let source = own_sources.get(&source_id.0);
        event.source_id = *source.ok_or_else(|| nameless("source_id", source_id.0.into()))?;
        event.symbol = *own_symbols.get(&symbol.0).ok_or_else(|| nameless("symbol", symbol.0))?;
    }
    Ok(batch)
}

/// Goes through a batch.
#[pyclass(frozen, module = "tickbus._core", name = "_BatchIterator")]
#[derive(Debug)]
pub(crate) struct BatchIterator {
    batch: Py<EventBatch>,
    next: GilCell<usize>,
}

#[pymethods]
impl BatchIterator {
    fn __iter__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyEvent>>> {
        let event = self.next.with(|next| {
            let event = self.batch.get().events.get(*next)?;
            *next += 1;
            Some(*event)
        });
        event.map(|event| PyEvent(event).object(py)).transpose()
    }

    fn __length_hint__(&self) -> usize {
        self.batch.get().events.len() - self.next.with(|next| *next)
    }
}
