"""A subscription as an anyio stream, on asyncio and on trio."""

from __future__ import annotations

import gc
import threading
from typing import Any

import anyio
import pytest

import tickbus
from support import PATIENCE_WITHOUT_END, MakeBus, assert_sums_closed, native_feed, run_child
from tickbus import Event, EventSystem, Priority
from tickbus.anyio import EventReceiveStream

pytestmark = pytest.mark.parametrize("library", ["asyncio", "trio"])


async def _settle() -> None:
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


def test_events_come_in_order_and_end_with_the_bus(make_bus: MakeBus, library: str) -> None:
    bus = make_bus()

    async def main() -> list[Any]:
        async with EventReceiveStream(bus.subscribe_async()) as stream:
            for event in range(5):
                bus.publish(event)
            bus.close()
            received = [event async for event in stream]
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
            return received

    assert anyio.run(main, backend=library) == [0, 1, 2, 3, 4]
    assert_sums_closed(bus)


def test_a_publish_from_a_thread_wakes_a_sleeping_stream(make_bus: MakeBus, library: str) -> None:
    bus = make_bus()
    number = 200

    async def main() -> list[Any]:
        turn = threading.Semaphore(0)

        def produce() -> None:
            for event in range(number):
                turn.acquire()
                bus.publish(event)

        thread = threading.Thread(target=produce)
        thread.start()
        received = []
        async with EventReceiveStream(bus.subscribe_async()) as stream:
            for _ in range(number):
                turn.release()
                received.append(await stream.receive())
        thread.join()
        return received

    assert anyio.run(main, backend=library) == list(range(number))


def test_closing_the_stream_closes_its_subscription(make_bus: MakeBus, library: str) -> None:
    bus = make_bus()

    async def main() -> None:
        stream = EventReceiveStream(bus.subscribe_async())
        assert not stream.subscription.closed
        bus.publish("pending")
        await stream.aclose()
        await stream.aclose()
        assert stream.subscription.closed
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()

    anyio.run(main, backend=library)
    assert bus.metrics().total_dropped == 1


def test_closing_the_stream_ends_who_waits_in_it(make_bus: MakeBus, library: str) -> None:
    bus = make_bus()

    async def main() -> None:
        stream = EventReceiveStream(bus.subscribe_async())

        async def read() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await _settle()
            await stream.aclose()

    anyio.run(main, backend=library)


def test_a_hole_is_told_in_the_stream(make_bus: MakeBus, library: str) -> None:
    bus = make_bus(4)

    async def main() -> list[Any]:
        async with EventReceiveStream(bus.subscribe_async(policy="drop_oldest")) as stream:
            for event in range(6):
                bus.publish(event)
            with pytest.raises(tickbus.Lagged) as told:
                await stream.receive()
            assert told.value.missed == 2
            return [await stream.receive() for _ in range(4)]

    assert anyio.run(main, backend=library) == [2, 3, 4, 5]


def test_cancelling_a_receive_loses_nothing(make_bus: MakeBus, library: str) -> None:
    bus = make_bus(1_024)
    number = 300

    async def main() -> list[Any]:
        received: list[Any] = []

        async def read(stream: EventReceiveStream[Any], patience: int) -> None:
            while len(received) < number:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as group:

                        async def receive() -> None:
                            received.append(await stream.receive())
                            group.cancel_scope.cancel()

                        group.start_soon(receive)
                        for _ in range(patience):
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()

        async with (
            EventReceiveStream(bus.subscribe_async()) as stream,
            anyio.create_task_group() as group,
        ):
            for patience in range(1, 6):
                group.start_soon(read, stream, patience)
            for event in range(number):
                bus.publish(event)
                if event % 3 == 0:
                    await anyio.lowlevel.checkpoint()
        return received

    assert sorted(anyio.run(main, backend=library)) == list(range(number))
    assert_sums_closed(bus)


def test_a_wake_up_and_a_cancellation_at_once_lose_nothing(make_bus: MakeBus, library: str) -> None:
    bus = make_bus()
    number = 64  # trio runs in random order what is ready at once
    received: list[Any] = []

    async def main() -> None:
        async with EventReceiveStream(bus.subscribe_async()) as stream:

            async def receive() -> None:
                received.append(await stream.receive())

            for event in range(number):
                async with anyio.create_task_group() as group:
                    group.start_soon(receive)
                    await _settle()
                    bus.publish(event)
                    group.cancel_scope.cancel()
                if len(received) == event:
                    await receive()

    anyio.run(main, backend=library)
    assert received == list(range(number))


def test_a_stream_is_read_in_one_run_after_the_other(make_bus: MakeBus, library: str) -> None:
    bus = make_bus()
    stream = EventReceiveStream(bus.subscribe_async())

    async def main() -> Any:
        async with anyio.create_task_group() as group:

            async def publish() -> None:
                await _settle()
                bus.publish("event")

            group.start_soon(publish)
            return await stream.receive()

    for _ in range(3):
        assert anyio.run(main, backend=library) == "event"
        gc.collect()


def test_a_busy_stream_lets_other_tasks_run(make_bus: MakeBus, library: str) -> None:
    bus = make_bus(4_096)
    turns = 0

    async def main() -> None:
        nonlocal turns
        async with EventReceiveStream(bus.subscribe_async()) as stream:
            for event in range(4_096):
                bus.publish(event)

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as group:
                group.start_soon(count)
                for _ in range(4_096):
                    await stream.receive()
                group.cancel_scope.cancel()

    anyio.run(main, backend=library)
    # Once in 256 events, and trio may take some turns to begin.
    assert turns >= 4_096 // 512


class _Awaited:
    """A subscription that gets an event just before somebody begins to wait for it."""

    def __init__(self, bus: tickbus.EventBus[Any]) -> None:
        self._bus = bus
        self._subscription = bus.subscribe_async()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subscription, name)

    def recv(self) -> Any:
        awaitable = self._subscription.recv()
        self._bus.publish("event")
        return awaitable

    def _join(self, loop: Any) -> Any:
        self._bus.publish("event")
        return self._subscription._join(loop)


def test_an_event_that_comes_between_looking_and_waiting_is_not_missed(
    make_bus: MakeBus, library: str
) -> None:
    awaited: Any = _Awaited(make_bus())

    async def main() -> Any:
        with anyio.fail_after(60):
            return await EventReceiveStream(awaited).receive()

    assert anyio.run(main, backend=library) == "event"


def test_a_second_loop_is_refused_while_the_first_one_waits(
    make_bus: MakeBus, library: str
) -> None:
    bus = make_bus()
    stream = EventReceiveStream(bus.subscribe_async())

    async def read_elsewhere() -> None:
        with anyio.fail_after(20), pytest.raises(tickbus.WrongLoop):
            await stream.receive()

    async def main() -> Any:
        received: list[Any] = []

        async def read() -> None:
            received.append(await stream.receive())

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await _settle()
            await anyio.to_thread.run_sync(lambda: anyio.run(read_elsewhere, backend="asyncio"))
            bus.publish("event")
        return received

    assert anyio.run(main, backend=library) == ["event"]


def test_a_forked_child_is_told_so_and_sees_no_end_of_the_stream(library: str) -> None:
    result = run_child(f"""
        import os
        import anyio
        import tickbus
        from tickbus.anyio import EventReceiveStream

        stream = EventReceiveStream(tickbus.EventBus().subscribe_async())

        async def main():
            try:
                await stream.receive()
            except tickbus.ForkedError:
                return 0
            return 1

        child = os.fork()
        if child == 0:
            os._exit(anyio.run(main, backend={library!r}))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert (result.stdout, result.stderr) == ("0\n", "")


def normal(number: int) -> Event:
    return Event(0, "price_update", metadata=number)


def stop(number: int) -> Event:
    return Event(0, "emergency_stop", metadata=number)


def test_compact_events_come_in_the_order_of_the_lanes_and_end_with_the_system(
    library: str,
) -> None:
    async def main() -> list[int]:
        with EventSystem() as system:
            async with EventReceiveStream(system.subscribe_async()) as stream:
                system.publish(normal(0))
                system.publish(Event(0, "price_update", Priority.High, metadata=1))
                system.publish(stop(2))
                system.close()
                received = [event.metadata async for event in stream]
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
                return received

    assert anyio.run(main, backend=library) == [2, 1, 0]


def test_a_rust_thread_wakes_a_sleeping_stream_of_compact_events(library: str) -> None:
    async def main() -> list[int]:
        received = []
        with EventSystem() as system:
            async with EventReceiveStream(system.subscribe_async()) as stream:
                for number in range(50):
                    async with anyio.create_task_group() as group:

                        async def receive() -> None:
                            received.append((await stream.receive()).metadata)

                        group.start_soon(receive)
                        await _settle()
                        native_feed(system, [(normal, stop)[number % 2](number)])
        return received

    assert anyio.run(main, backend=library) == list(range(50))


def test_tasks_that_stop_waiting_for_compact_events_leave_them_to_the_next(library: str) -> None:
    number = 64  # trio runs in random order what is ready at once
    received: list[int] = []

    async def main() -> None:
        with EventSystem(1, max_block_duration=PATIENCE_WITHOUT_END) as system:
            async with EventReceiveStream(system.subscribe_async()) as stream:

                async def receive() -> None:
                    received.append((await stream.receive()).metadata)

                for event in range(number):
                    async with anyio.create_task_group() as group:
                        first = anyio.CancelScope()

                        async def stop_waiting(scope: anyio.CancelScope = first) -> None:
                            with scope:
                                await receive()

                        for waiter in (stop_waiting, receive):
                            group.start_soon(waiter)
                            await _settle()
                        system.publish((normal, stop)[event % 2](event))
                        first.cancel()
                        with anyio.fail_after(60):
                            while len(received) == event:
                                await anyio.lowlevel.checkpoint()
                        group.cancel_scope.cancel()

    anyio.run(main, backend=library)
    assert received == list(range(number))


def test_a_hole_of_a_lane_is_told_in_the_stream(library: str) -> None:
    async def main() -> None:
        with EventSystem(1, max_block_duration=0.0) as system:
            async with EventReceiveStream(system.subscribe_async()) as stream:
                system.publish(stop(0))
                with pytest.raises(tickbus.CriticalOverflow):
                    system.publish(stop(1))
                assert await stream.receive() == stop(0)
                with pytest.raises(tickbus.Lagged) as told:
                    await stream.receive()
                assert (told.value.missed, told.value.lane) == (1, "critical")
            assert stream.subscription.closed
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

    anyio.run(main, backend=library)


def test_without_anyio_the_import_says_what_to_install(library: str) -> None:
    result = run_child(f"""
        import sys
        import {library}
        sys.modules["anyio"] = None
        try:
            import tickbus.anyio
        except ModuleNotFoundError as error:
            print(error)
    """)
    wanted = "tickbus.anyio needs anyio; install it with: pip install 'tickbus[anyio]'\n"
    assert (result.stdout, result.stderr) == (wanted, "")
