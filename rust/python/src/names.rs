//! `tickbus.symbols` and `tickbus.sources`, and the texts of names as Python has them.

use crate::error;
use crate::gil::GilCell;
use pyo3::prelude::*;
use pyo3::types::PyString;
use tickbus::{NameError, SourceId, Symbol};

/// A table of names: symbols or sources of this process.
#[pyclass(frozen, module = "tickbus._core")]
#[derive(Debug)]
pub(crate) struct Names {
    table: &'static tickbus::Names,
    /// What errors call a name of the table.
    what: &'static str,
}

/// The texts that were asked for, by number: each is made once.
static SYMBOL_TEXTS: Texts = Texts(GilCell::new(Vec::new()));
static SOURCE_TEXTS: Texts = Texts(GilCell::new(Vec::new()));

struct Texts(GilCell<Vec<Option<Py<PyString>>>>);

impl Texts {
    #[inline]
    fn get(
        &self,
        py: Python<'_>,
        id: u32,
        name: impl FnOnce() -> Option<&'static str>,
    ) -> Option<Py<PyString>> {
        let place = id as usize;
        let known = self.0.with(|texts| Some(texts.get(place)?.as_ref()?.clone_ref(py)));
        known.or_else(|| self.make(py, place, name()?))
    }

    #[cold]
    fn make(&self, py: Python<'_>, place: usize, name: &str) -> Option<Py<PyString>> {
        let text = PyString::new(py, name).unbind();
        self.0.with(|texts| {
            if texts.len() <= place {
                texts.resize_with(place + 1, || None);
            }
            texts[place] = Some(text.clone_ref(py));
        });
        Some(text)
    }
}

/// Returns a symbol's name; `None` if there is none or this process does not know it.
#[inline]
pub(crate) fn symbol_text(py: Python<'_>, symbol: Symbol) -> Option<Py<PyString>> {
    SYMBOL_TEXTS.get(py, symbol.0, || symbol.name())
}

/// Returns a source's name; `None` if there is none or this process does not know it.
#[inline]
pub(crate) fn source_text(py: Python<'_>, source: SourceId) -> Option<Py<PyString>> {
    SOURCE_TEXTS.get(py, source.0.into(), || source.name())
}

#[cold]
pub(crate) fn refused(error: &NameError) -> PyErr {
    error::ConfigError::new_err(error.to_string())
}

impl Names {
    pub(crate) fn symbols() -> Self {
        Self { table: Symbol::table(), what: "symbol" }
    }

    pub(crate) fn sources() -> Self {
        Self { table: SourceId::table(), what: "source" }
    }
}

#[pymethods]
impl Names {
    /// Returns the number of a name, which is added if it is new.
    #[pyo3(signature = (name, /))]
    fn intern(&self, name: &str) -> PyResult<u32> {
        self.table.intern(name).map_err(|error| refused(&error))
    }

    /// Returns the number of a name, or `None` if it is not known.
    #[pyo3(signature = (name, /))]
    fn find(&self, name: &str) -> Option<u32> {
        self.table.find(name)
    }

    /// Returns the name of a number.
    #[pyo3(signature = (id, /))]
    fn name(&self, id: &Bound<'_, PyAny>) -> PyResult<&'static str> {
        let id = error::whole("id", id, 0..=u32::MAX)?;
        self.table.name(id).ok_or_else(|| {
            let (what, known) = (self.what, self.table.len());
            error::ConfigError::new_err(format!(
                "id was {id}; it must be that of a known {what}, from 1 to {known}: 0 means no \
                 {what}, and ids mean something in the process that interned them only"
            ))
        })
    }

    fn __len__(&self) -> usize {
        self.table.len()
    }

    fn __contains__(&self, name: &Bound<'_, PyAny>) -> PyResult<bool> {
        match name.cast::<PyString>() {
            Ok(name) => Ok(self.table.find(name.to_str()?).is_some()),
            Err(_) => Ok(false),
        }
    }

    fn __repr__(&self) -> String {
        format!("<{} {}s of this process>", self.table.len(), self.what)
    }
}
