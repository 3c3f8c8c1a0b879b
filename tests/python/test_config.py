"""Settings: what is accepted, what is rounded, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

import tickbus
from support import BACKENDS, MakeBus, run_child


def test_the_defaults_are_as_documented() -> None:
    config = tickbus.BackpressureConfig()
    assert (config.drop_oldest, config.warn_threshold, config.max_block_duration) == (
        False,
        None,
        1.0,
    )
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.drop_oldest = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drop_oldest", 1),
        ("drop_oldest", "yes"),
        ("warn_threshold", 0),
        ("warn_threshold", -1),
        ("warn_threshold", True),
        ("warn_threshold", 1.5),
        ("max_block_duration", -0.1),
        ("max_block_duration", float("nan")),
        ("max_block_duration", float("inf")),
        ("max_block_duration", None),
        ("max_block_duration", "1"),
        ("max_block_duration", True),
    ],
)
def test_a_backpressure_setting_out_of_range_is_named(name: str, value: object) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(tickbus.ConfigError) as caught:
        tickbus.BackpressureConfig(**arguments)
    assert str(caught.value).startswith(f"{name} was {value!r}; it must be ")


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (2, 2), (3, 4), (5, 8), (1_000, 1_024)])
def test_capacity_is_rounded_up_to_a_power_of_two_and_shown(
    make_bus: MakeBus, asked: int, given: int
) -> None:
    bus = make_bus(asked)
    assert bus.capacity == given
    assert bus.subscribe().capacity == given


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(make_bus: MakeBus, capacity: int) -> None:
    with pytest.raises(tickbus.ConfigError, match="capacity"):
        make_bus(capacity)
    with pytest.raises(tickbus.ConfigError, match="capacity"):
        make_bus().subscribe(capacity=capacity)


def test_a_capacity_of_a_subscription_is_its_own_on_lock_free() -> None:
    with tickbus.LockFreeEventBus[int](16) as bus, bus.subscribe(capacity=3) as small:
        assert small.capacity == 4
        large = bus.subscribe_async(capacity=100)
        assert large.capacity == 128
        large.close()


def test_a_shared_backend_gives_its_own_capacity_and_refuses_a_larger_one() -> None:
    with tickbus.BroadcastEventBus[int](16) as bus, bus.subscribe(capacity=3) as subscription:
        assert subscription.capacity == 16
        with pytest.raises(tickbus.ConfigError, match="lock_free"):
            bus.subscribe(capacity=17)


def test_the_argument_picks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKBUS_BACKEND", "broadcast")
    with tickbus.EventBus[int]("lock_free") as bus:
        assert type(bus) is tickbus.LockFreeEventBus
        assert bus.backend == "lock_free"
    monkeypatch.setenv("TICKBUS_BACKEND", "lock_free")
    with tickbus.EventBus[int](backend="broadcast") as bus:
        assert type(bus) is tickbus.BroadcastEventBus
        assert bus.backend == "broadcast"


@pytest.mark.parametrize(
    ("value", "backend"),
    [("broadcast", "broadcast"), ("lock_free", "lock_free"), ("", "lock_free")],
)
def test_the_environment_picks_the_backend_where_no_argument_does(
    monkeypatch: pytest.MonkeyPatch, value: str, backend: str
) -> None:
    monkeypatch.setenv("TICKBUS_BACKEND", value)
    with tickbus.EventBus[int]() as bus:
        assert bus.backend == backend
    monkeypatch.delenv("TICKBUS_BACKEND")
    with tickbus.EventBus[int]() as bus:
        assert bus.backend == "lock_free"


def test_an_unknown_backend_is_refused_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tickbus.ConfigError) as caught:
        tickbus.EventBus("kafka")
    for word in ("backend was 'kafka'", *BACKENDS):
        assert word in str(caught.value)
    monkeypatch.setenv("TICKBUS_BACKEND", "kafka")
    with pytest.raises(tickbus.ConfigError, match="TICKBUS_BACKEND was 'kafka'"):
        tickbus.EventBus()


def test_only_a_ring_has_strict_producers(backend: str) -> None:
    if backend == "ring":
        with tickbus.EventBus[int](backend, producers="strict") as bus:
            assert bus.publish(1) == 0
        return
    with pytest.raises(tickbus.ConfigError, match=f"producers was strict on backend {backend}"):
        tickbus.EventBus(backend, producers="strict")


def test_an_unknown_way_of_producers_is_refused_with_the_choices() -> None:
    with pytest.raises(
        tickbus.ConfigError, match='producers was "many"; it must be shared or strict'
    ):
        tickbus.RingEventBus(producers="many")


def test_the_environment_does_not_change_a_bus_named_by_its_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TICKBUS_BACKEND", "broadcast")
    with tickbus.LockFreeEventBus[int]() as bus:
        assert bus.backend == "lock_free"


def test_the_shim_gives_an_instance_of_itself_and_can_be_subclassed() -> None:
    class Named(tickbus.EventBus[int]):
        name = "mine"

    with tickbus.EventBus[int]() as bus:
        assert isinstance(bus, tickbus.EventBus)
    with Named("broadcast") as named:
        assert type(named) is Named
        assert (named.name, named.backend) == ("mine", "broadcast")


@pytest.mark.parametrize(("name", "value"), [("policy", "drop"), ("on_lag", "ignore")])
def test_an_unknown_choice_of_a_subscription_is_refused(
    make_bus: MakeBus, name: str, value: str
) -> None:
    bus = make_bus()
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(tickbus.ConfigError, match=value):
        bus.subscribe(**arguments)
    assert bus.metrics().subscriber_count == 0


@pytest.mark.parametrize("max_topics", [0, -1])
def test_a_vocabulary_without_room_is_refused(make_bus: MakeBus, max_topics: int) -> None:
    with pytest.raises(tickbus.ConfigError, match="max_topics"):
        make_bus(max_topics=max_topics)


def test_importing_starts_no_thread_and_prints_nothing() -> None:
    child = run_child(
        """
        import threading
        import tickbus

        with tickbus.EventBus() as bus, bus.subscribe() as subscription:
            bus.publish("event")
            assert subscription.recv() == "event"
        assert threading.active_count() == 1
        """
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
