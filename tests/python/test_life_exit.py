"""The end of the interpreter, with threads, loops and a native producer in the middle of things.

Every child interpreter ends with exit code 0, in time, and says nothing.
`make soak` runs ten times as many.
"""

from __future__ import annotations

import pytest

from exits import SCENARIOS, end_all
from support import BACKENDS, run_child

CHILDREN = 100


def test_this_build_has_the_native_producer() -> None:
    from tickbus import _core

    assert hasattr(_core, "_NativeProducer"), (
        "the tests need a build with the feature native-producer: run make test, or maturin "
        "develop --features native-producer"
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_interpreter_ends_quietly_in_the_middle_of(scenario: str) -> None:
    each = CHILDREN // len(SCENARIOS) // len(BACKENDS)
    assert end_all((scenario, backend) for backend in BACKENDS for _ in range(each)) == []


def test_closing_everything_at_exit_comes_before_the_users_own_exit_handlers_of_earlier() -> None:
    """What was registered after the import runs first and still has its buses."""
    child = run_child(
        """
        import atexit
        atexit.register(lambda: print("before the import:", bus.closed))
        import tickbus
        bus = tickbus.EventBus()
        subscription = bus.subscribe()
        atexit.register(lambda: print("after the import:", bus.publish("event"), bus.closed))
        """
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "after the import: 1 False\nbefore the import: True\n"
