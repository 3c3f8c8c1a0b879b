"""Compact events in NumPy arrays.

Example:
    >>> import numpy as np
    >>> from tickbus import EVENT_DTYPE, EventBatch, EventType, symbols
    >>> prices = np.zeros(3, EVENT_DTYPE)
    >>> prices["event_type"] = EventType.PriceUpdate
    >>> prices["symbol"] = symbols.intern("BTCUSDT")
    >>> prices["value"] = 61_000.0, 61_001.0, 61_002.0
    >>> batch = EventBatch(prices)
    >>> batch[0].symbol, batch[2].value
    ('BTCUSDT', 61002.0)
    >>> float(batch.to_numpy()["value"].mean())
    61001.0
"""

from __future__ import annotations

try:
    import numpy as np
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        "arrays of events need NumPy; install it with: pip install 'tickbus[numpy]'",
        name=_missing.name,
    ) from _missing

__all__ = ["EVENT_DTYPE"]

EVENT_DTYPE = np.dtype(
    [
        ("timestamp", np.uint64),
        ("event_type", np.uint8),
        ("priority", np.uint8),
        ("source_id", np.uint16),
        ("symbol", np.uint32),
        ("value", np.float64),
        ("metadata", np.uint64),
    ]
)
"""The layout of a compact event, 32 bytes. `symbol` and `source_id` are numbers of this process:
`tickbus.symbols` and `tickbus.sources` have their names."""
