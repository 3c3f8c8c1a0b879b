"""Processes and interpreters: fork, spawn, and a second interpreter in the process."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import tickbus
from support import MakeBus, run_child

_FORK = """
import asyncio, gc, os, sys, threading, warnings
import tickbus

def fork():
    with warnings.catch_warnings():
        # Newer interpreters warn about threads: what happens then is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()

def wait_for(process):
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0

def assert_sums_closed(bus):
    for row in bus.metrics().subscriptions:
        assert row.offered == row.delivered + sum(row.dropped.values()) + row.pending, row
"""


def _run_forking(script: str, **values: Any) -> subprocess.CompletedProcess[str]:
    return run_child(_FORK + textwrap.dedent(script).format(**values))


def test_after_fork_every_public_call_raises_forked_error_and_the_parent_goes_on(
    backend: str,
) -> None:
    child = _run_forking(
        """
        bus = tickbus.EventBus({backend!r})
        topic = bus.topic("trades.BTCUSDT")
        subscription, also = bus.subscribe(), bus.subscribe_async()
        shutdown = tickbus.Shutdown()
        made_before = also.recv(), bus.publish_async("made before the fork")
        bus.publish("before")

        async def enter(thing):
            async with thing:
                pass

        async def first_of(thing):
            async for _ in thing:
                break

        async def wait(call, *arguments):
            return await call(*arguments)

        def run(function, *arguments):
            return lambda: asyncio.run(function(*arguments))

        calls = dict(
            publish=lambda: bus.publish("event"),
            publish_on_a_name=lambda: bus.publish("event", "trades.BTCUSDT"),
            publish_on_a_topic=lambda: bus.publish("event", topic=topic),
            publish_many=lambda: bus.publish_many(["event"]),
            publish_timeout=lambda: bus.publish_timeout("event", 1.0),
            publish_async=run(wait, bus.publish_async, "event"),
            publish_made_before=run(wait, lambda: made_before[1]),
            topic=lambda: bus.topic("trades.ETHUSDT"),
            subscribe=lambda: bus.subscribe(),
            subscribe_async=lambda: bus.subscribe_async(),
            metrics=lambda: bus.metrics(),
            explain=lambda: bus.explain(),
            close=lambda: bus.close(),
            aclose=run(bus.aclose),
            with_bus=lambda: bus.__enter__(),
            async_with_bus=run(enter, bus),
            recv=lambda: subscription.recv(),
            recv_timeout=lambda: subscription.recv_timeout(1.0),
            recv_many=lambda: subscription.recv_many(1),
            try_recv=lambda: subscription.try_recv(),
            iterate=lambda: next(iter(subscription)),
            close_subscription=lambda: subscription.close(),
            with_subscription=lambda: subscription.__enter__(),
            async_recv=run(wait, also.recv),
            async_recv_made_before=run(wait, lambda: made_before[0]),
            async_recv_many=run(wait, also.recv_many, 1),
            async_try_recv=lambda: also.try_recv(),
            async_iterate=run(first_of, also),
            async_close=lambda: also.close(),
            async_aclose=run(wait, also.aclose),
            async_with_subscription=run(enter, also),
            select=lambda: tickbus.select([subscription]),
            select_shutdown=lambda: tickbus.select([subscription], shutdown),
            shutdown=lambda: shutdown.set(),
        )

        def accepted(call):
            try:
                call()
            except tickbus.ForkedError:
                return False
            return True

        process = fork()
        if process == 0:
            names = [name for name, call in calls.items() if accepted(call)]
            print(*names, file=sys.stderr)
            os._exit(bool(names))
        wait_for(process)
        assert not bus.closed and not shutdown.is_set()
        assert bus.publish("after") == 2
        assert subscription.recv_many(10) == ["before", "after"]
        assert asyncio.run(wait(lambda: made_before[0])) == "before"
        assert asyncio.run(wait(also.recv)) == "after"
        assert asyncio.run(wait(lambda: made_before[1])) == 2
        shutdown.set()
        assert_sums_closed(bus)
        bus.close()
        print("end")
        """,
        backend=backend,
    )
    assert (child.returncode, child.stdout, child.stderr.strip()) == (0, "end\n", "")


def test_forking_beside_blocked_threads_and_a_sleeping_loop_harms_neither_side() -> None:
    child = _run_forking(
        """
        backpressure = tickbus.BackpressureConfig(warn_threshold=1, max_block_duration=3600.0)
        bus = tickbus.LockFreeEventBus(1, backpressure)
        empty, full, later = map(bus.subscribe, ("empty", "full", "later"))
        selected = bus.subscribe("selected")
        # No thread of the parent refers to this bus: the child really drops it.
        dropped = tickbus.EventBus()
        sleeping = dropped.subscribe_async()
        shutdown = tickbus.Shutdown()
        bus.publish(0, "full")
        results, started = {{}}, threading.Barrier(6)
        loop_may_go_on = threading.Event()

        async def sleep():
            waiter = asyncio.create_task(sleeping.recv())
            await asyncio.sleep(0)
            started.wait()
            # The loop does not look at its wake-ups until the children have ended.
            loop_may_go_on.wait()
            return await waiter

        def start(name, call):
            def target():
                if name != "sleep":
                    started.wait()
                results[name] = call()
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            return thread

        def eventfd_counts():
            counts = []
            for fd in os.listdir("/proc/self/fd"):
                try:
                    if "eventfd" in os.readlink(f"/proc/self/fd/{{fd}}"):
                        with open(f"/proc/self/fdinfo/{{fd}}") as info:
                            counts += [line.split()[1] for line in info if "count" in line]
                except FileNotFoundError:
                    pass
            return counts

        threads = [
            start("recv", empty.recv),
            start("publish", lambda: bus.publish(1, "full")),
            start("select", lambda: tickbus.select([selected], shutdown)),
            start("recv_timeout", lambda: later.recv_timeout(3600.0)),
            start("sleep", lambda: asyncio.run(sleep())),
        ]
        started.wait()
        for way in ("sys.exit", "os._exit", "end of script") * 4:
            process = fork()
            if process == 0:
                try:
                    bus.publish("event")
                except tickbus.ForkedError:
                    pass
                del bus, dropped, empty, full, later, selected, sleeping, shutdown, threads
                gc.collect()
                with tickbus.LockFreeEventBus(1, backpressure) as own, own.subscribe() as mine:
                    assert own.publish("mine") == 1
                    assert mine.recv() == "mine"
                    async def read():
                        async with own.subscribe_async() as tasks:
                            waiter = asyncio.create_task(tasks.recv())
                            await asyncio.sleep(0)
                            thread = threading.Thread(target=own.publish, args=("woken",))
                            thread.start()
                            assert await waiter == "woken"
                            thread.join()
                    asyncio.run(read())
                if way == "sys.exit":
                    sys.exit(0)
                if way == "os._exit":
                    os._exit(0)
                break
            wait_for(process)
        else:
            assert eventfd_counts() == ["0"], eventfd_counts()
            loop_may_go_on.set()
            assert bus.publish("received", "empty") == 1
            assert full.recv() == 0
            assert bus.publish("seen", "selected") == 1
            assert bus.publish("in time", "later") == 1
            assert dropped.publish("woken") == 1
            for thread in threads:
                thread.join()
            assert results["select"] is selected
            del results["select"]
            assert results == {{
                "recv": "received", "publish": 1, "recv_timeout": "in time", "sleep": "woken",
            }}
            assert full.recv() == 1
            assert_sums_closed(bus)
            assert_sums_closed(dropped)
            bus.close()
            dropped.close()
            print("end")
        """
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


def test_first_use_makes_nothing_that_a_fork_beside_it_could_leave_half_made() -> None:
    """What runs Python code to be made, such as an import, is made when the module is."""
    child = run_child(
        """
        import asyncio, builtins, contextlib
        import tickbus

        imported, original = [], builtins.__import__

        def spy(name, *arguments, **keywords):
            imported.append(name)
            return original(name, *arguments, **keywords)

        builtins.__import__ = spy
        bus = tickbus.LockFreeEventBus(1, tickbus.BackpressureConfig(max_block_duration=0.0))
        subscription, tasks = bus.subscribe(policy="reject"), bus.subscribe_async(policy="reject")

        async def wait():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(tasks.recv(), 0.01)
            waiter = asyncio.ensure_future(tasks.recv())
            await asyncio.sleep(0)
            bus.publish("event")
            await waiter
            assert subscription.try_recv() == "event"
            await bus.publish_async("event")

        with contextlib.suppress(tickbus.ReceiveTimeout):
            subscription.recv_timeout(0.0)
        asyncio.run(wait())
        for call in (
            lambda: bus.publish("event"),
            lambda: bus.publish_timeout("event", 0.0),
            lambda: bus.subscribe(capacity=0),
            bus.close,
            lambda: list(subscription),
            lambda: bus.publish("event"),
        ):
            with contextlib.suppress(tickbus.BusError):
                call()
        builtins.__import__ = original
        print(sorted({name for name in imported if name.startswith(("asyncio", "tickbus"))}))
        """
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "[]\n", "")


def test_forking_beside_a_publisher_that_never_rests_harms_neither_side(backend: str) -> None:
    child = _run_forking(
        """
        bus = tickbus.EventBus({backend!r}, 4, tickbus.BackpressureConfig(drop_oldest=True))
        sleeping, read = bus.subscribe_async(on_lag="count"), bus.subscribe(on_lag="count")
        stop = threading.Event()

        def publish():
            while not stop.is_set():
                bus.publish("event")

        async def consume():
            return [event async for event in sleeping]

        threads = [
            threading.Thread(target=publish),
            threading.Thread(target=lambda: list(read)),
            threading.Thread(target=lambda: asyncio.run(consume())),
        ]
        for thread in threads:
            thread.start()
        for _ in range(30):
            process = fork()
            if process == 0:
                del bus, sleeping, read, threads
                gc.collect()
                sys.exit(0)
            wait_for(process)
        stop.set()
        threads[0].join()
        bus.close()
        for thread in threads:
            thread.join()
        assert_sums_closed(bus)
        print("end")
        """,
        backend=backend,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


def test_a_task_may_fork_while_another_waits_and_its_child_leaves_quietly(backend: str) -> None:
    child = _run_forking(
        """
        async def main():
            async with tickbus.EventBus({backend!r}) as bus, bus.subscribe_async() as waited:
                waiter = asyncio.create_task(waited.recv())
                await asyncio.sleep(0)
                process = fork()
                if process == 0:
                    asyncio._set_running_loop(None)
                    waiter = None
                    gc.collect()
                    try:
                        waited.try_recv()
                    except tickbus.ForkedError:
                        os._exit(0)
                    os._exit(1)
                wait_for(process)
                bus.publish("event")
                assert await waiter == "event"
                assert_sums_closed(bus)

        asyncio.run(main())
        print("end")
        """,
        backend=backend,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


def test_a_child_forked_inside_a_with_block_leaves_it_quietly(backend: str) -> None:
    child = _run_forking(
        """
        with tickbus.EventBus({backend!r}) as bus, bus.subscribe() as subscription:
            process = fork()
            if process == 0:
                sys.exit(0)
            wait_for(process)
            assert bus.publish("event") == 1
            assert subscription.recv() == "event"
        print("end")
        """,
        backend=backend,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


@pytest.mark.parametrize(
    "wait",
    [
        "subscription.recv()",
        "subscription.recv_timeout(3600.0)",
        "bus.publish('event', 'full')",
        "bus.publish_timeout('event', 3600.0, 'full')",
        "tickbus.select([subscription])",
    ],
)
def test_a_signal_handler_may_fork_during_a_wait(wait: str) -> None:
    child = _run_forking(
        """
        import signal

        bus = tickbus.LockFreeEventBus(1, tickbus.BackpressureConfig(max_block_duration=3600.0))
        full, subscription = bus.subscribe("full"), bus.subscribe("other")
        bus.publish("first", "full")
        processes = []

        def handler(*_):
            processes.append(fork())
            if processes[0]:
                wait_for(processes[0])
                assert bus.publish("from the handler", "other") == 1
                assert full.recv() == "first"

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            {wait}
        except tickbus.ForkedError:
            assert processes == [0]
            sys.exit(0)
        assert processes[0]
        assert_sums_closed(bus)
        bus.close()
        print("end")
        """,
        wait=wait,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "end\n", "")


def test_what_belongs_to_a_bus_refuses_to_be_pickled_and_copied(make_bus: MakeBus) -> None:
    bus = make_bus()
    things = [bus, bus.subscribe(), bus.subscribe_async(), bus.topic("name"), tickbus.Shutdown()]
    for thing in things:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match=f"cannot pickle {type(thing).__name__}: .*process"):
                pickle.dumps(thing, protocol)
        with pytest.raises(TypeError, match="one process"):
            copy.copy(thing)


_SPAWNING = """
import multiprocessing
import tickbus

def work(number, results):
    with tickbus.EventBus() as bus, bus.subscribe() as subscription:
        bus.publish(number * number)
        results.put(subscription.recv())

def never(*_):
    raise AssertionError("a bus has come through a pickle")

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with tickbus.EventBus() as bus, bus.subscribe() as subscription:
        results = context.Queue()
        workers = [context.Process(target=work, args=(n, results)) for n in range(3)]
        for worker in workers:
            worker.start()
        bus.publish("here")
        assert sorted(results.get() for _ in workers) == [0, 1, 4]
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        for unsendable in (bus, subscription):
            try:
                context.Process(target=never, args=(unsendable,)).start()
            except TypeError as error:
                assert "belongs to one process" in str(error), error
            else:
                raise AssertionError("it was sent")
        assert subscription.recv() == "here"
    print("end")
"""


def test_a_spawned_worker_makes_its_own_bus_and_is_sent_none(tmp_path: Path) -> None:
    script = tmp_path / "spawning.py"
    script.write_text(_SPAWNING)
    child = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # What is left on stderr is how the interpreter of a worker that got no arguments ends.
    assert (child.returncode, child.stdout) == (0, "end\n"), child.stderr


@pytest.mark.parametrize("main_imports", ["first", "last"])
@pytest.mark.parametrize("kind", ["legacy", "isolated"])
def test_a_subinterpreter_is_refused_at_import_and_the_main_one_is_unharmed(
    kind: str, main_imports: str
) -> None:
    child = run_child(
        f"""
        import os, sys, textwrap
        # What measures coverage cannot be loaded by a subinterpreter either, and complains.
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        if {main_imports == "first"}:
            import tickbus

        code = textwrap.dedent('''
            import sys
            sys.path[:] = {{path!r}}
            for _ in range(2):
                try:
                    import tickbus
                except ImportError as error:
                    print("refused:", error, flush=True)
        ''').format(path=sys.path)
        if sys.version_info >= (3, 14) and {kind == "isolated"}:
            from concurrent import interpreters
            interpreter = interpreters.create()
            interpreter.exec(code)
            interpreter.close()
        elif sys.version_info >= (3, 13):
            import _interpreters
            interpreter = _interpreters.create({kind!r})
            assert _interpreters.exec(interpreter, code) is None
            _interpreters.destroy(interpreter)
        else:
            import _xxsubinterpreters
            interpreter = _xxsubinterpreters.create(isolated={kind == "isolated"})
            _xxsubinterpreters.run_string(interpreter, code)
            _xxsubinterpreters.destroy(interpreter)

        import asyncio, tickbus
        async def main():
            async with tickbus.EventBus() as bus, bus.subscribe_async() as subscription:
                waiter = asyncio.create_task(subscription.recv())
                await asyncio.sleep(0)
                bus.publish("event")
                assert await waiter == "event"
        asyncio.run(main())
        print("end")
        """
    )
    assert child.returncode == 0, child.stderr
    *refusals, end = child.stdout.splitlines()
    assert end == "end"
    assert len(refusals) == 2
    assert all("refused:" in line and "subinterpreter" in line for line in refusals)
    if sys.version_info < (3, 12) or kind == "legacy":
        assert all("main interpreter only" in line for line in refusals)
    assert child.stderr == ""
