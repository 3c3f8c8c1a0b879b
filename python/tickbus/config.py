"""How a bus treats subscriptions that have no room."""

from __future__ import annotations

from dataclasses import dataclass

from tickbus.errors import ConfigError

__all__ = ["BackpressureConfig"]


@dataclass(frozen=True, slots=True)
class BackpressureConfig:
    """The defaults of a bus for subscriptions that have no room.

    Args:
        drop_oldest: Whether a subscription without a policy of its own loses its oldest event
            (`drop_oldest`) instead of making the publisher wait (`block`). The `broadcast`
            backend can only overwrite and always takes `drop_oldest`.
        warn_threshold: Pending events of one subscription, at least 1, at which one warning is
            logged; it re-arms when the subscription is back at half of them. `None` is off.
        max_block_duration: Seconds that one call waits for room, finite and at least 0.

    Raises:
        ConfigError: An argument has another type or lies outside its range.
    """

    drop_oldest: bool = False
    warn_threshold: int | None = None
    max_block_duration: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.drop_oldest, bool):
            raise ConfigError(f"drop_oldest was {self.drop_oldest!r}; it must be True or False")
        threshold = self.warn_threshold
        if threshold is not None and not _is_count(threshold):
            raise ConfigError(
                f"warn_threshold was {threshold!r}; it must be a number of pending events of at "
                "least 1, or None for no warning"
            )
        patience = self.max_block_duration
        if not _is_seconds(patience):
            raise ConfigError(
                f"max_block_duration was {patience!r}; it must be a finite number of seconds of "
                "at least 0: 0 never waits"
            )


def check_seconds(name: str, seconds: float | None) -> None:
    """Refuses what is no time to wait, nor `None`."""
    if seconds is not None and not _is_seconds(seconds):
        raise ConfigError(
            f"{name} was {seconds!r}; it must be a finite number of seconds of at least 0, or None"
        )


def check_callable(name: str, given: object, wanted: str = "something that can be called") -> None:
    """Refuses what cannot be called."""
    if not callable(given):
        raise TypeError(f"{name} was {given!r}; it must be {wanted}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_LONGEST = 1 << 32
"""Seconds, as those of the core; this is a century and more."""


def _is_seconds(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value < _LONGEST
