"""`tickbus record MODULE:ATTRIBUTE`: a live bus into a log, by a real process."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from tickbus import EventBus, EventStore, Gap, Poisoned, cli
from tickbus.cli import app
from tickbus.cli.record_live import find

# Says on a pipe what the recording has reached, so that nobody has to guess.
MARKET = """
    import asyncio
    import os
    import signal
    import threading
    import time
    from contextlib import asynccontextmanager, contextmanager

    import tickbus

    bus = tickbus.EventBus(capacity=1_000)
    system = tickbus.EventSystem()
    number = 7

    def say(what):
        os.write(int(os.environ["SAY"]), what.encode() + b"\\n")

    def publish(bus, count):
        # Whoever is not there yet gets nothing.
        while not bus.metrics().subscriber_count:
            time.sleep(0.001)
        for number in range(count):
            bus.publish({"n": number}, topic="orders.new")
        say("published")

    def running():
        threading.Thread(target=publish, args=(bus, 100), daemon=True).start()
        return bus

    def ending():
        threading.Thread(target=lambda: (publish(bus, 100), bus.close()), daemon=True).start()
        return bus

    def systems():
        def run():
            while not system.metrics().normal.subscriber_count:
                time.sleep(0.001)
            system.publish(tickbus.Event(1, 0, value=1.5))
            say("published")
        threading.Thread(target=run, daemon=True).start()
        return system

    async def task(bus):
        while not bus.metrics().subscriber_count:
            await asyncio.sleep(0.001)
        for number in range(100):
            await bus.publish_async({"n": number}, topic="orders.new")
        say("published")

    async def in_a_loop():
        global keep
        keep = asyncio.create_task(task(bus))
        return bus

    @asynccontextmanager
    async def in_a_group():
        try:
            async with asyncio.TaskGroup() as group, tickbus.EventBus(capacity=1_000) as bus:
                group.create_task(task(bus))
                yield bus
        finally:
            say("left")

    @contextmanager
    def managed():
        with tickbus.EventBus(capacity=1_000) as bus:
            threading.Thread(target=publish, args=(bus, 100), daemon=True).start()
            yield bus
        say("left")

    def failing():
        raise RuntimeError("no market today")

    async def failing_later():
        await asyncio.sleep(0)
        failing()

    @contextmanager
    def failing_manager():
        failing()
        yield bus

    async def dying(bus):
        while not bus.metrics().subscriber_count:
            await asyncio.sleep(0.001)
        raise RuntimeError("no feed")

    async def in_a_loop_with_a_dying_task():
        global keep
        keep = [asyncio.create_task(dying(bus)), asyncio.create_task(task(bus))]
        return bus

    async def waiting():
        try:
            await asyncio.create_task(dying(bus))
        except RuntimeError:
            await task(bus)

    async def in_a_loop_that_waits_for_a_dying_task():
        global keep
        keep = asyncio.create_task(waiting())
        return bus

    @asynccontextmanager
    async def in_a_dying_group():
        async with asyncio.TaskGroup() as group:
            async def run():
                while not bus.metrics().subscriber_count:
                    await asyncio.sleep(0.001)
                bus.publish("before")
                await dying(bus)
            group.create_task(run())
            yield bus

    async def hang(bus):
        while not bus.metrics().subscriber_count:
            await asyncio.sleep(0.001)
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.getsignal(number) for number in numbers}

        def told(number, frame):
            for each, handler in handlers.items():
                signal.signal(each, handler)
            handlers[number](number, frame)
            say("told")

        for number in handlers:
            signal.signal(number, told)
        publish(bus, 100)
        while True:
            time.sleep(0.01)

    async def hanging():
        global keep
        keep = asyncio.create_task(hang(bus))
        return bus

    async def never():
        await asyncio.Event().wait()

    class names:
        bus = bus
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "market.py").write_text(textwrap.dedent(MARKET), encoding="utf-8")
    (tmp_path / "broken.py").write_text("import market\n1 / 0\n", encoding="utf-8")
    (tmp_path / "lacking.py").write_text("import no_such_module_here\n", encoding="utf-8")
    return tmp_path


class Recording:
    """The command, which is told to end once what it records says so."""

    def __init__(self, here: Path, *arguments: str, stderr: int = subprocess.PIPE) -> None:
        heard, say = os.pipe()
        self.words = os.fdopen(heard)
        command = [sys.executable, "-W", "error", "-m", "tickbus", "record", *arguments]
        environment = os.environ | {"SAY": str(say)}
        self.process = subprocess.Popen(
            command,
            cwd=here,
            env=environment,
            pass_fds=[say],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        os.close(say)

    def hears(self, word: str) -> None:
        """Waits until the module says a word."""
        assert self.words.readline() == f"{word}\n", self.process.communicate(timeout=60)

    def end(self, number: int | None = None) -> tuple[str, str, int]:
        """Sends a signal, and returns what was printed, and the exit code."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        self.words.close()
        return out, err or "", self.process.returncode


def recorded(log: Path) -> list[Any]:
    with EventStore.open(log, read_only=True) as store:
        return [record.event for record in store.read()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("source", "leaves"),
    [
        ("market:running", False),
        ("market:in_a_loop", False),
        ("market:in_a_group", True),
        ("market:managed", True),
    ],
)
def test_a_live_bus_is_recorded_until_a_signal_comes(
    here: Path, source: str, leaves: bool, number: int
) -> None:
    recording = Recording(here, source, "--to", "log", "--json")
    recording.hears("published")
    recording.process.send_signal(number)
    if leaves:
        recording.hears("left")
    out, err, code = recording.end()
    assert (err, code) == ("", 0)
    report = json.loads(out)
    assert report.pop("elapsed_seconds") >= 0
    assert report == {
        "source": source,
        "log": "log",
        "records": 100,
        "missed": 0,
        "first_sequence": 0,
        "last_sequence": 99,
        "durable": True,
    }
    assert recorded(here / "log") == [{"n": number} for number in range(100)]


def test_it_ends_when_the_bus_is_closed_and_goes_on_behind_what_the_log_has(here: Path) -> None:
    for times in (1, 2):
        out, err, code = Recording(here, "market:ending", "--to", "log").end()
        assert (err, code) == ("", 0)
        assert f"{100 * times - 1}" in out
    assert recorded(here / "log") == [{"n": number} for number in range(100)] * 2


def test_a_system_is_recorded_with_any_durability(here: Path) -> None:
    arguments = ("market:systems", "--to", "log", "--durability", "interval(5)", "--json")
    recording = Recording(here, *arguments)
    recording.hears("published")
    out, err, code = recording.end(signal.SIGINT)
    assert (err, code, json.loads(out)["records"]) == ("", 0, 1)
    (event,) = recorded(here / "log")
    assert event.value == 1.5


def test_a_terminal_is_shown_how_it_goes(here: Path) -> None:
    shown, terminal = pty.openpty()
    recording = Recording(here, "market:running", "--to", "log", stderr=terminal)
    os.close(terminal)
    text, has_ended = bytearray(), threading.Event()

    def look() -> None:
        try:
            while content := os.read(shown, 4_096):
                text.extend(content)
                if b"100 records" in text and b"100 durable" in text:
                    has_ended.set()
        except OSError:
            pass  # The other end is closed.

    looking = threading.Thread(target=look)
    looking.start()
    assert has_ended.wait(60), text
    out, _, code = recording.end(signal.SIGINT)
    looking.join()
    os.close(shown)
    assert code == 0
    assert "Recorded into log" in out


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("market.py:bus", "market.py is a file; write the module: market:bus"),
        ("nowhere:bus", "there is no module 'nowhere' in"),
        ("market.nowhere:bus", "there is no module 'market.nowhere' in"),
        ("lacking:bus", "lacking imports 'no_such_module_here', which is not installed"),
        ("broken:bus", "broken could not be imported: ZeroDivisionError: division by zero"),
        ("market:nothing", "market has no 'nothing'; give MODULE:ATTRIBUTE"),
        ("market:number", "market:number gave 7; it must be an EventSystem, an EventBus"),
        ("market:names.bus.id", "it must be an EventSystem, an EventBus"),
    ],
)
def test_what_is_no_bus_is_refused_with_a_reason(here: Path, source: str, wanted: str) -> None:
    out, err, code = Recording(here, source, "--to", "log").end()
    assert (out, code) == ("", 3)
    assert wanted in err
    assert err.count("\n") == 1, "it is one line"


def test_what_only_captures_have_is_refused(here: Path) -> None:
    for more in (["other.gz"], ["--strict"], ["--format", "csv"]):
        _, err, code = Recording(here, "market:bus", *more, "--to", "log").end()
        assert (code, "which is recorded alone" in err) == (2, True)
    _, err, code = Recording(here, "market:bus", "--to", "log", "--durability", "often").end()
    assert (code, "durability was 'often'" in err) == (2, True)


@pytest.mark.parametrize("source", ["failing", "failing_later", "failing_manager"])
def test_a_module_that_makes_no_bus_is_told_in_one_line_and_the_log_is_closed(
    here: Path, source: str
) -> None:
    _, err, code = Recording(here, f"market:{source}", "--to", "log").end()
    assert code == 3
    place = re.escape(str(here / "market.py"))
    wanted = rf"market:{source} failed: RuntimeError: no market today \({place}:\d+\)\n"
    assert re.fullmatch(f"tickbus: the input cannot be read; {wanted}", err)
    with EventStore.open(here / "log") as store:
        assert store.stats().next_sequence == 0


def test_a_task_that_dies_is_told_at_once_and_the_rest_is_recorded(here: Path) -> None:
    recording = Recording(here, "market:in_a_loop_with_a_dying_task", "--to", "log", "--json")
    # It is told before the recording is told to end.
    told = recording.process.stderr
    assert told is not None
    line = told.readline()
    assert "goes on without what failed: RuntimeError: no feed" in line
    assert f"{here / 'market.py'}:" in line
    recording.hears("published")
    out, err, code = recording.end(signal.SIGINT)
    assert (err, code, json.loads(out)["records"]) == ("", 1, 100)


def test_an_error_that_somebody_waits_for_is_his(here: Path) -> None:
    recording = Recording(here, "market:in_a_loop_that_waits_for_a_dying_task", "--to", "log")
    recording.hears("published")
    _, err, code = recording.end(signal.SIGINT)
    assert (err, code) == ("", 0)


def test_a_context_manager_that_fails_ends_the_recording_with_its_error(here: Path) -> None:
    out, err, code = Recording(here, "market:in_a_dying_group", "--to", "log", "--json").end()
    assert code == 1
    assert "market:in_a_dying_group failed: RuntimeError: no feed" in err
    assert err.count("\n") == 1, "it is one line"
    assert json.loads(out)["records"] == 1
    assert recorded(here / "log") == ["before"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_recording_whose_loop_is_kept_from_running(
    here: Path, number: int
) -> None:
    recording = Recording(here, "market:hanging", "--to", "log")
    recording.hears("published")
    recording.process.send_signal(number)
    recording.hears("told")
    _, err, code = recording.end(number)
    assert code == 130
    assert err == "tickbus: interrupted; everything is closed\n"
    assert recorded(here / "log") == [{"n": number} for number in range(100)]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("market:hanging", "100 records"),
        ("market:never", "waiting for market:never to return a bus"),
    ],
)
def test_a_terminal_is_shown_what_goes_on_while_the_loop_is_kept_from_running(
    here: Path, source: str, wanted: str
) -> None:
    shown, terminal = pty.openpty()
    recording = Recording(here, source, "--to", "log", stderr=terminal)
    os.close(terminal)
    text = bytearray()
    while wanted.encode() not in text:
        text.extend(os.read(shown, 4_096))
    recording.process.kill()
    recording.end()
    os.close(shown)


def test_a_log_that_another_one_writes_is_not_recorded_into(here: Path) -> None:
    with EventStore.open(here / "log"):
        _, err, code = Recording(here, "market:running", "--to", "log").end()
    assert code == 1
    assert f"is being written by process {os.getpid()}" in err


def test_a_log_that_takes_nothing_is_no_fault_of_the_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bus, log = EventBus[Any](), tmp_path / "log"
    monkeypatch.setattr(app, "find", lambda reference: bus)
    arguments = ["record", "market:bus", "--to", str(log)]
    EventStore.open(log).close()
    with monkeypatch.context() as patch:
        patch.setattr(app, "_opened", lambda to, _: EventStore.open(to, read_only=True))
        assert cli.main(arguments) == app.FAILED
    assert "read_only=True" in capsys.readouterr().err
    bus.close()
    assert cli.main(arguments) == app.UNREADABLE
    assert "market:bus cannot be recorded" in capsys.readouterr().err


def test_a_log_that_fails_in_the_end_fails_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def make() -> EventBus[Any]:
        bus = EventBus[Any]()
        asyncio.get_running_loop().call_soon(bus.close)
        return bus

    def fail(store: EventStore) -> None:
        raise Poisoned("the disk is gone")

    monkeypatch.setattr(app, "find", lambda reference: make)
    monkeypatch.setattr(EventStore, "sync", fail)
    assert cli.main(["record", "market:make", "--to", str(tmp_path / "log")]) == app.FAILED
    assert "the log took no more; the disk is gone" in capsys.readouterr().err


def test_modules_in_the_working_directory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("bus = 'found'\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert find("only_here:bus") == "found"
    del sys.modules["only_here"]


def test_what_the_log_missed_is_counted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "odd.py").write_text(
        textwrap.dedent(
            """
            import threading, time
            import tickbus

            bus = tickbus.EventBus()

            def run():
                while not bus.metrics().subscriber_count:
                    time.sleep(0.001)
                bus.publish_many([1, object(), 2, object()])
                bus.close()

            def odd():
                threading.Thread(target=run, daemon=True).start()
                return bus
            """
        ),
        encoding="utf-8",
    )
    out, err, code = Recording(here, "odd:odd", "--to", "log", "--json").end()
    report = json.loads(out)
    assert (code, report["records"], report["missed"]) == (0, 4, 2), err
    assert recorded(here / "log") == [1, Gap(1, True), 2, Gap(1, True)]
    assert err.count("\n") == 1, "the first one is told, and no other"
    assert "the first one: an event was of type object, which msgspec cannot encode" in err
