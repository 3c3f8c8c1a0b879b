//! The compact event as a Python object, and what its fields are made of.

use crate::error;
use crate::names::{self, source_text, symbol_text};
use crate::spare::Spare;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyFloat, PyString, PyTuple};
use std::ptr;
use tickbus::{EVENT_BYTES, EventType, Priority, SourceId, Symbol};

/// The fields, in the order of the constructor.
pub(crate) const FIELDS: [&str; 7] =
    ["timestamp", "event_type", "priority", "source_id", "symbol", "value", "metadata"];

/// An event in 32 bytes. Events are equal if all of them are, and so are their hashes: one that a
/// replay has published is not equal to the live one. Its text shows `| 128` behind its priority, as
/// its bytes have it; `priority` and `lane` are without.
// `direct` makes its objects and reads its fields.
#[pyclass(frozen, module = "tickbus", name = "Event")]
#[derive(Debug)]
pub(crate) struct PyEvent(pub(crate) tickbus::Event);

/// The objects for each byte of an event type and of a priority.
struct Codes {
    event_types: [Py<PyAny>; 256],
    priorities: [Py<PyAny>; 256],
}

static CODES: PyOnceLock<Codes> = PyOnceLock::new();

/// Takes the objects that stand for event types and priorities, one for each byte.
#[pyfunction]
pub(crate) fn _use_codes(
    py: Python<'_>,
    event_types: [Py<PyAny>; 256],
    priorities: [Py<PyAny>; 256],
) {
    // The package is imported once in a process; a second import changes nothing.
    let _ = CODES.set(py, Codes { event_types, priorities });
}

fn codes(py: Python<'_>) -> &Codes {
    match CODES.get(py) {
        Some(codes) => codes,
        None => unreachable!("the package hands the codes over when it is imported"),
    }
}

/// Returns names and codes of the event types that are always there; the names are those of their
/// constants.
#[pyfunction]
pub(crate) fn _built_in_event_types() -> Vec<(&'static str, u8)> {
    EventType::BUILT_IN.iter().map(|&(event_type, name)| (name, event_type.0)).collect()
}

/// Returns the name of a code, or `None` if it was never registered.
#[pyfunction]
pub(crate) fn _event_type_name(code: u8) -> Option<&'static str> {
    EventType(code).name()
}

/// Returns the code of a name.
#[pyfunction]
pub(crate) fn _event_type_code(name: &str) -> PyResult<u8> {
    EventType::from_name(name).map(|event_type| event_type.0).ok_or_else(|| {
        error::ConfigError::new_err(format!(
            "event type was {name:?}; it must be one of EventType.known(), or be registered first \
             by EventType.register(name, code)"
        ))
    })
}

/// Gives a code a name.
#[pyfunction]
pub(crate) fn _register_event_type(name: &str, code: u8) -> PyResult<()> {
    match EventType::register(name, code) {
        Ok(_) => Ok(()),
        Err(error) => Err(error::ConfigError::new_err(error.to_string())),
    }
}

/// Returns an integer that has to fit into an unsigned field.
#[inline]
fn unsigned(value: &Bound<'_, PyAny>, field: &str, limit: u64) -> PyResult<u64> {
    // SAFETY: attached, and an object; an error is fetched below.
    let number = unsafe { ffi::PyLong_AsUnsignedLongLong(value.as_ptr()) };
    if number <= limit && (number != u64::MAX || !PyErr::occurred(value.py())) {
        return Ok(number);
    }
    unsigned_slowly(value, field, limit)
}

/// Takes what is like an integer too, and says what is wrong.
#[cold]
fn unsigned_slowly(value: &Bound<'_, PyAny>, field: &str, limit: u64) -> PyResult<u64> {
    drop(PyErr::take(value.py()));
    // SAFETY: attached; an owned reference or null with an exception set.
    let index =
        unsafe { Bound::from_owned_ptr_or_err(value.py(), ffi::PyNumber_Index(value.as_ptr())) };
    let Ok(index) = index else {
        let wanted = match field {
            "event_type" | "source_id" | "symbol" => "a name or an integer",
            _ => "an integer",
        };
        return Err(PyTypeError::new_err(format!(
            "{field} was {}; it must be {wanted}",
            value.repr()?
        )));
    };
    match index.extract::<u64>() {
        Ok(number) if number <= limit => Ok(number),
        _ => Err(PyOverflowError::new_err(format!(
            "{field} was {}; it must be from 0 to {limit}",
            value.repr()?
        ))),
    }
}

#[inline]
fn number(value: &Bound<'_, PyAny>) -> PyResult<f64> {
    // SAFETY: attached, and an object; an error is fetched below.
    let number = unsafe { ffi::PyFloat_AsDouble(value.as_ptr()) };
    if number == -1.0
        && let Some(error) = PyErr::take(value.py())
    {
        if !error.is_instance_of::<PyTypeError>(value.py()) {
            return Err(error);
        }
        return Err(PyTypeError::new_err(format!(
            "value was {}; it must be a number",
            value.repr()?
        )));
    }
    Ok(number)
}

pub(crate) fn event_type(value: &Bound<'_, PyAny>) -> PyResult<EventType> {
    match value.cast::<PyString>() {
        Ok(name) => _event_type_code(name.to_str()?).map(EventType),
        Err(_) => unsigned(value, "event_type", u8::MAX.into()).map(|code| EventType(code as u8)),
    }
}

/// Returns the symbol of a name or number; `None` means no symbol.
pub(crate) fn symbol(value: &Bound<'_, PyAny>) -> PyResult<Symbol> {
    if let Ok(name) = value.cast::<PyString>() {
        return Symbol::new(name.to_str()?).map_err(|error| names::refused(&error));
    }
    if value.is_none() {
        return Ok(Symbol::NONE);
    }
    unsigned(value, "symbol", u32::MAX.into()).map(|id| Symbol(id as u32))
}

fn source(value: &Bound<'_, PyAny>) -> PyResult<SourceId> {
    if let Ok(name) = value.cast::<PyString>() {
        return SourceId::new(name.to_str()?).map_err(|error| names::refused(&error));
    }
    if value.is_none() {
        return Ok(SourceId::NONE);
    }
    unsigned(value, "source_id", u16::MAX.into()).map(|id| SourceId(id as u16))
}

/// Sets the field with this number, in the order of the constructor.
#[inline]
pub(crate) fn set_field(
    event: &mut tickbus::Event,
    field: usize,
    value: &Bound<'_, PyAny>,
) -> PyResult<()> {
    match field {
        0 => event.timestamp = unsigned(value, "timestamp", u64::MAX)?,
        1 => event.event_type = event_type(value)?,
        2 => event.priority = Priority(unsigned(value, "priority", u8::MAX.into())? as u8),
        3 => event.source_id = source(value)?,
        4 => event.symbol = symbol(value)?,
        5 => event.value = number(value)?,
        _ => event.metadata = unsigned(value, "metadata", u64::MAX)?,
    }
    Ok(())
}

/// Returns the number of a field, in the order of the constructor.
#[inline]
fn field_named(name: &Bound<'_, PyAny>) -> PyResult<usize> {
    // What stands in code is interned, so one of them is nearly always the very object.
    let interned = INTERNED.get(name.py()).into_iter().flatten();
    if let Some((field, _)) = interned.enumerate().find(|(_, field)| field.is(name)) {
        return Ok(field);
    }
    let name = name.cast::<PyString>()?.to_str()?;
    FIELDS.iter().position(|field| *field == name).ok_or_else(|| {
        let fields = FIELDS.join(", ");
        PyTypeError::new_err(format!("an event has no field {name:?}; its fields are {fields}"))
    })
}

static INTERNED: PyOnceLock<[Py<PyString>; 7]> = PyOnceLock::new();

/// Makes what would else be made on first use; see `process::prepare`.
pub(crate) fn prepare(py: Python<'_>) {
    let _ = INTERNED.set(py, FIELDS.map(|field| PyString::intern(py, field).unbind()));
}

/// Returns the event of a constructor's arguments.
#[inline]
pub(crate) fn assemble<'a, 'py: 'a>(
    positional: impl ExactSizeIterator<Item = Borrowed<'a, 'py, PyAny>>,
    named: impl Iterator<Item = (Borrowed<'a, 'py, PyAny>, Borrowed<'a, 'py, PyAny>)>,
) -> PyResult<PyEvent> {
    let count = positional.len();
    if count > FIELDS.len() {
        return Err(PyTypeError::new_err(format!("an event has 7 fields; {count} were given")));
    }
    let mut event = EMPTY;
    let mut given = (1_u32 << count) - 1;
    for (field, value) in positional.enumerate() {
        set_field(&mut event, field, &value)?;
    }
    for (name, value) in named {
        let field = field_named(&name)?;
        if given & (1 << field) != 0 {
            return Err(PyTypeError::new_err(format!("{} was given twice", FIELDS[field])));
        }
        given |= 1 << field;
        set_field(&mut event, field, &value)?;
    }
    if given & 0b11 != 0b11 {
        return Err(PyTypeError::new_err("an event needs at least timestamp and event_type"));
    }
    Ok(PyEvent(event))
}

/// Events that are gone: many live for one step of a loop only.
static SPARE: Spare = Spare::new();

impl PyEvent {
    /// Returns a new object.
    #[inline]
    pub(crate) fn object(self, py: Python<'_>) -> PyResult<Bound<'_, Self>> {
        match SPARE.pop() {
            // SAFETY: it was an event, and its one reference is passed on. An event has nothing to
            // drop, so it is only written over.
            Some(spare) => unsafe {
                let event = Bound::from_owned_ptr(py, spare).cast_into_unchecked::<Self>();
                ptr::from_ref(event.get()).cast_mut().write(self);
                Ok(event)
            },
            None => Bound::new(py, self),
        }
    }

    #[inline]
    pub(crate) fn event_type_object<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        codes(py).event_types[usize::from(self.0.event_type.0)].bind(py)
    }

    #[inline]
    pub(crate) fn priority_object<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        codes(py).priorities[usize::from(self.0.priority.level().0)].bind(py)
    }

    /// As `priority_object`, with the bit that says that the event was replayed.
    fn priority_byte<'py>(&self, py: Python<'py>) -> &Bound<'py, PyAny> {
        codes(py).priorities[usize::from(self.0.priority.0)].bind(py)
    }
}

/// Makes the class one of plain memory, and has calls of it reach `construct`. PyO3 makes every
/// class a part of the garbage collection; events hold no references, and many of them would only
/// make the collector run.
///
/// # Safety
///
/// It is the class of events, and there is none yet.
pub(crate) unsafe fn make_plain(class: *mut ffi::PyTypeObject, construct: ffi::vectorcallfunc) {
    // SAFETY: the caller's promise; nobody else looks at the class meanwhile.
    unsafe {
        (*class).tp_flags &= !ffi::Py_TPFLAGS_HAVE_GC;
        (*class).tp_traverse = None;
        (*class).tp_clear = None;
        (*class).tp_free = Some(ffi::PyObject_Free);
        (*class).tp_dealloc = Some(dealloc);
        (*class).tp_vectorcall = Some(construct);
    }
}

unsafe extern "C" fn dealloc(event: *mut ffi::PyObject) {
    // SAFETY: the last reference is gone; an event has nothing to drop, and its class came with it.
    unsafe {
        if !SPARE.push(event) {
            let class = ffi::Py_TYPE(event);
            ffi::PyObject_Free(event.cast());
            ffi::Py_DECREF(class.cast());
        }
    }
}

/// Returns the code of an event type by its name outside of the process.
pub(crate) fn type_name(event_type: EventType) -> PyResult<&'static str> {
    event_type.name().ok_or_else(|| nameless("event_type", event_type.0.into()))
}

#[cold]
pub(crate) fn nameless(field: &str, id: u32) -> PyErr {
    error::ConfigError::new_err(format!(
        "{field} was {id}, which has no name in this process; name it before the event leaves: \
         numbers mean nothing elsewhere"
    ))
}

/// Returns the name that stands for a number outside of the process; none for 0.
pub(crate) fn outside_name(
    field: &str,
    id: u32,
    name: Option<Py<PyString>>,
) -> PyResult<Option<Py<PyString>>> {
    if id != 0 && name.is_none() { Err(nameless(field, id)) } else { Ok(name) }
}

#[pymethods]
impl PyEvent {
    /// Behind `direct::construct`, which calls of the class reach.
    #[new]
    #[pyo3(signature = (*arguments, **named))]
    #[pyo3(text_signature = "(timestamp, event_type, priority=0, source_id=0, symbol=None, \
                             value=0.0, metadata=0)")]
    fn new(arguments: &Bound<'_, PyTuple>, named: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let named: Vec<_> = named.into_iter().flatten().collect();
        let named = named.iter().map(|(name, value)| (name.as_borrowed(), value.as_borrowed()));
        assemble(arguments.iter_borrowed(), named)
    }

    #[classattr]
    fn __match_args__(py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
        PyTuple::new(py, FIELDS)
    }

    /// The topic, such as `price_update.BTCUSDT`; `None` if type or symbol has no name here.
    #[getter]
    fn topic(&self) -> Option<String> {
        self.0.topic()
    }

    /// The lane in which it travels: `critical`, `high` or `normal`.
    #[getter]
    fn lane(&self) -> &'static str {
        self.0.lane().name()
    }

    /// Whether a replay published it; its `priority` is what it was.
    #[getter]
    fn replayed(&self) -> bool {
        self.0.is_replayed()
    }

    /// Returns the 32 bytes, little-endian.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.to_bytes(py)
    }

    /// Returns the event with these 32 bytes, little-endian.
    #[staticmethod]
    #[pyo3(signature = (data, /))]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        let bytes: [u8; EVENT_BYTES] = data.try_into().map_err(|_| {
            PyValueError::new_err(format!(
                "data had {} bytes; an event has {EVENT_BYTES}",
                data.len()
            ))
        })?;
        Ok(Self(tickbus::Event::from_bytes(bytes)))
    }

    /// Returns an event that differs in the fields that are given.
    #[pyo3(signature = (**changes))]
    fn replace(&self, changes: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut event = self.0;
        for (name, value) in changes.into_iter().flatten() {
            set_field(&mut event, field_named(&name)?, &value)?;
        }
        Ok(Self(event))
    }

    #[pyo3(signature = (**changes))]
    fn __replace__(&self, changes: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        self.replace(changes)
    }

    fn __copy__(this: Py<Self>) -> Py<Self> {
        this
    }

    fn __deepcopy__(this: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        this
    }

    /// Takes the names along: numbers mean nothing elsewhere.
    fn __reduce__<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, event) = (this.py(), this.get());
        let (source_id, symbol) = (event.0.source_id, event.0.symbol);
        let arguments = (
            event.0.timestamp,
            event.event_type_object(py),
            event.priority_byte(py),
            outside_name("source_id", source_id.0.into(), source_text(py, source_id))?,
            outside_name("symbol", symbol.0, symbol_text(py, symbol))?,
            event.0.value,
            event.0.metadata,
        );
        (this.get_type(), arguments).into_pyobject(py)
    }

    fn __hash__(&self) -> isize {
        hash(&self.0)
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let text = |id: u32, name: Option<Py<PyString>>| match name {
            Some(name) => name.bind(py).repr().map(|name| name.to_string()),
            None => Ok(id.to_string()),
        };
        let tickbus::Event { timestamp, source_id, symbol, value, metadata, .. } = self.0;
        let symbol = match symbol {
            Symbol::NONE => "None".to_owned(),
            symbol => text(symbol.0, symbol_text(py, symbol))?,
        };
        let number = PyFloat::new(py, value).repr()?.to_string();
        let priority = self.priority_object(py).repr()?.to_string();
        Ok(format!(
            "Event(timestamp={timestamp}, event_type={}, priority={}, source_id={}, \
             symbol={symbol}, value={}, metadata={metadata})",
            self.event_type_object(py).repr()?,
            if self.0.is_replayed() { format!("{priority} | 128") } else { priority },
            text(source_id.0.into(), source_text(py, source_id))?,
            if value.is_finite() { number } else { format!("float('{number}')") },
        ))
    }
}

/// An event of which nothing is known.
pub(crate) const EMPTY: tickbus::Event = tickbus::Event {
    timestamp: 0,
    event_type: EventType(0),
    priority: Priority::Normal,
    source_id: SourceId::NONE,
    symbol: Symbol::NONE,
    value: 0.0,
    metadata: 0,
};

/// Mixes the four words by two folded multiplications (as wyhash does).
#[inline]
pub(crate) fn hash(event: &tickbus::Event) -> isize {
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    };
    let [a, b, c, d] = event.words();
    let first = fold(a ^ 0xa076_1d64_78bd_642f, b ^ 0xe703_7ed1_a0b4_28db);
    let second = fold(c ^ 0x8ebc_6af0_9c88_c6e3, d ^ 0x5899_65cc_7537_4cc3);
    match fold(first ^ 0x1d8e_4e27_c47d_124f, second ^ 0xeb44_acca_b455_d165) as isize {
        // It would tell the interpreter of an error.
        -1 => -2,
        hash => hash,
    }
}
