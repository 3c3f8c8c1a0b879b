"""Readers of captures: what becomes an event, what is ignored, what is malformed and where."""

from __future__ import annotations

import dataclasses
import gzip
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pytest

from tickbus import ParseError, captures
from tickbus.captures import (
    CaptureReport,
    MarketEvent,
    Quote,
    Trade,
    read_capture,
    recognize_format,
    topic_name,
)

SPOT_TRADE = (
    '1723161254087896568 {"stream":"btcusdt@trade","data":{"e":"trade","E":1723161255343,'
    '"s":"BTCUSDT","t":1,"p":"61837.63000000","q":"0.02000000","T":1723161255342,"m":true,'
    '"M":true}}'
)
SPOT_QUOTE = (
    '1723161254087891268 {"stream":"btcusdt@bookTicker","data":{"u":1,"s":"BTCUSDT",'
    '"b":"61837.63000000","B":"3.78826000","a":"61837.64000000","A":"1.54698000"}}'
)
FUTURES_TRADE = (
    '1723161255088176367 {"stream":"btcusdt@trade","data":{"e":"trade","E":1,"T":1,'
    '"s":"BTCUSDT","t":1,"p":"61800.30","q":"0.006","X":"MARKET","m":false}}'
)
FUTURES_QUOTE = (
    '1723161255088169167 {"stream":"btcusdt@bookTicker","data":{"e":"bookTicker","u":1,'
    '"s":"BTCUSDT","b":"61800.20","B":"2.507","a":"61800.30","A":"2.510","T":1,"E":1}}'
)
DEPTH = '1723161253937085768 {"stream":"btcusdt@depth@100ms","data":{"e":"depthUpdate"}}'
SNAPSHOT = '1723161254206652067 {"lastUpdateId":50093239218,"bids":[],"asks":[]}'

WriteText = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteText:
    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def write_zip(path: Path, member: str, text: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, text)
    return path


def read(path: Path, format: str | None = None) -> tuple[list[MarketEvent], CaptureReport]:
    report = CaptureReport()
    return list(read_capture(path, format, report=report)), report


def malformed_in(path: Path) -> list[ParseError]:
    errors: list[ParseError] = []
    report = CaptureReport()
    events = list(read_capture(path, report=report, on_malformed=errors.append))
    assert report.malformed == len(errors)
    assert report.messages == len(events) + report.ignored.total() + report.malformed
    return errors


def test_binance_trades_and_quotes_keep_their_decimals_and_their_venue(write: WriteText) -> None:
    path = write("capture", "\n".join([SPOT_TRADE, SPOT_QUOTE, FUTURES_TRADE, FUTURES_QUOTE]))
    events, _ = read(path)
    assert events == [
        Trade(
            1723161254087896568,
            "binance_spot",
            "BTCUSDT",
            Decimal("61837.63000000"),
            Decimal("0.02000000"),
        ),
        Quote(
            1723161254087891268,
            "binance_spot",
            "BTCUSDT",
            Decimal("61837.63"),
            Decimal("61837.64"),
            Decimal("3.78826"),
            Decimal("1.54698"),
        ),
        Trade(
            1723161255088176367, "binance_usdm", "BTCUSDT", Decimal("61800.30"), Decimal("0.006")
        ),
        Quote(
            1723161255088169167,
            "binance_usdm",
            "BTCUSDT",
            Decimal("61800.2"),
            Decimal("61800.3"),
            Decimal("2.507"),
            Decimal("2.51"),
        ),
    ]


def test_every_message_is_counted_as_published_ignored_or_malformed(write: WriteText) -> None:
    path = write("capture", "\n".join([SPOT_TRADE, DEPTH, "", SNAPSHOT, DEPTH, "1 broken"]))
    report = CaptureReport()
    list(read_capture(path, report=report, on_malformed=lambda error: None))
    assert report == CaptureReport(messages=5, trades=1, ignored=report.ignored, malformed=1)
    assert report.ignored == {"depth": 2, "snapshot": 1}


@pytest.mark.parametrize("answer", ['{"result":null,"id":1}', '{"error":{"code":2},"id":1}'])
def test_answers_to_requests_are_ignored_and_counted(write: WriteText, answer: str) -> None:
    events, report = read(write("capture", f"1 {answer}\n{SPOT_TRADE}\n"))
    assert (len(events), report.ignored) == (1, {"response": 1})


def test_one_report_adds_up_several_captures(write: WriteText) -> None:
    report = CaptureReport()
    for name in ("first", "second"):
        list(read_capture(write(name, SPOT_TRADE), report=report))
    assert (report.messages, report.trades) == (2, 2)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (SPOT_TRADE[:-20], "wanted JSON"),
        ("17x " + SPOT_TRADE.partition(" ")[2], "wanted a receive time"),
        ("99999999999999999999 {}", "wanted a receive time"),
        (SPOT_TRADE.replace('"61837.63000000"', "61837.63"), "in text, found 61837.63"),
        (SPOT_TRADE.replace("61837.63000000", "NaN"), "wanted a finite price p"),
        (SPOT_TRADE.replace("61837.63000000", "6_1"), "decimal number"),
        (SPOT_TRADE.replace("61837.63000000", "1e30"), "at most 18 digits"),
        (SPOT_TRADE.replace("0.02000000", "-0.02"), "at least 0"),
        (SPOT_TRADE.replace('"BTCUSDT"', '""'), "printable"),
        (SPOT_TRADE.replace('"BTCUSDT"', '"' + "B" * 101 + '"'), "at most 100 bytes"),
        ('1 {"stream":"btcusdt@trade","data":[]}', "wanted an object"),
        ('1 {"stream":7}', "wanted a stream name"),
        ("1 []", "wanted a JSON object"),
        ('1 {"other":1}', 'wanted a "stream"'),
    ],
)
def test_a_malformed_binance_line_says_what_was_wanted(
    write: WriteText, line: str, wanted: str
) -> None:
    path = write("capture", f"{SPOT_TRADE}\n{line}\n{SPOT_QUOTE}\n")
    (error,) = malformed_in(path)
    assert wanted in error.message
    assert (error.file, error.line) == (str(path), 2)


def test_malformed_json_is_told_with_its_position(write: WriteText) -> None:
    (error,) = malformed_in(write("capture", '1 {"stream":}\n'))
    assert error.position == len('1 {"stream":}')


def test_without_a_callback_a_malformed_line_is_raised(write: WriteText) -> None:
    events = read_capture(write("capture", f"{SPOT_TRADE}\n1 {{\n{SPOT_TRADE}\n"))
    assert isinstance(next(events), Trade)
    with pytest.raises(ParseError, match="capture:2:"):
        next(events)


def test_bytes_that_are_not_utf8_are_malformed(tmp_path: Path) -> None:
    path = tmp_path / "capture"
    path.write_bytes(SPOT_TRADE.encode() + b'\n1 {"stream":"\xff"}\n')
    (error,) = malformed_in(path)
    assert "UTF-8" in error.message


@pytest.mark.parametrize(
    ("venue", "midnight_utc"), [("oanda", 1399507200), ("fxcm", 1399507200 + 5 * 3600)]
)
def test_lean_quotes_are_in_the_time_zone_of_their_venue(
    tmp_path: Path, venue: str, midnight_utc: int
) -> None:
    path = write_zip(
        tmp_path / f"{venue}_eurusd_20140508_quote.zip",
        "20140508_eurusd_tick_quote.csv",
        "17007,1.39147,1.39148\n",
    )
    assert recognize_format(path) == "lean-forex"
    events, _ = read(path)
    time = (midnight_utc * 1_000 + 17_007) * 1_000_000
    assert events == [Quote(time, venue, "EURUSD", Decimal("1.39147"), Decimal("1.39148"))]


def test_a_lean_zip_in_its_original_folders_takes_the_venue_from_them(tmp_path: Path) -> None:
    folder = tmp_path / "forex" / "oanda" / "tick" / "eurusd"
    folder.mkdir(parents=True)
    path = write_zip(folder / "20140508_quote.zip", "20140508_eurusd_tick_quote.csv", "1,1,2\n")
    assert read(path)[0][0].venue == "oanda"


def test_lean_trades_are_in_new_york_time_and_scaled_prices(tmp_path: Path) -> None:
    path = write_zip(
        tmp_path / "spy_20131008_trade.zip",
        "20131008_spy_Trade_Tick.csv",
        "14417034,1674200,210,Q,2000,0\n14417035,1674200,210,Q,2000,1\n",
    )
    assert recognize_format(path) == "lean-equity"
    events, report = read(path)
    # 2013-10-08 00:00 in New York, with summer time, is 04:00 UTC.
    time = (1381204800 * 1_000 + 14_417_034) * 1_000_000
    assert events == [Trade(time, "us_q", "SPY", Decimal("167.42"), Decimal(210))]
    assert report.ignored == {"suspicious_trade": 1}


@pytest.mark.parametrize(
    "row",
    [
        "14417034,1674200,210,Q,2000",
        "86400000,1674200,210,Q,2000,0",
        "x,1674200,210,Q,2000,0",
        "1,167.42,210,Q,2000,0",
        "1,1674200,-1,Q,2000,0",
        "1,1674200,210,,2000,0",
        "1,1674200,210,Q,2000,2",
    ],
)
def test_a_malformed_lean_trade_is_told_with_its_line(tmp_path: Path, row: str) -> None:
    path = write_zip(
        tmp_path / "spy.zip", "20131008_spy_Trade_Tick.csv", f"1,1674200,1,Q,0,0\n{row}\n"
    )
    (error,) = malformed_in(path)
    assert error.line == 2


@pytest.mark.parametrize("row", ["1,1.3", "1,1.3,1.4,1.5", "x,1.3,1.4", "1,,1.4"])
def test_a_malformed_lean_quote_is_told_with_its_line(tmp_path: Path, row: str) -> None:
    path = write_zip(tmp_path / "a.zip", "20140508_eurusd_tick_quote.csv", f"1,1.3,1.4\n{row}\n")
    (error,) = malformed_in(path)
    assert error.line == 2


def test_a_lean_zip_of_a_day_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", "20140231_eurusd_tick_quote.csv", "1,1.3,1.4\n")
    with pytest.raises(ParseError, match=r"wanted a date yyyymmdd .* found 20140231"):
        read(path)


def test_without_time_zones_lean_trades_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def know_none(key: str) -> ZoneInfo:
        raise ZoneInfoNotFoundError(key)

    monkeypatch.setattr(captures, "ZoneInfo", know_none)
    path = write_zip(tmp_path / "spy.zip", "20131008_spy_Trade_Tick.csv", "1,1674200,1,Q,0,0\n")
    with pytest.raises(OSError, match="pip install tzdata") as caught:
        read(path)
    assert caught.value.filename == str(path)


def test_csv_columns_are_found_by_name_in_any_order_and_case(write: WriteText) -> None:
    path = write(
        "trades.csv",
        "\ufeffQty,Venue,Symbol,Price,Timestamp\n"
        '0.5,coin,"BTC-USD",61000.10,1700000000123\n'
        "1,coin,ETH-USD,2000,2023-11-14T22:13:20.123456Z\n",
    )
    assert recognize_format(path) == "csv"
    events, report = read(path)
    assert events == [
        Trade(1700000000123000000, "coin", "BTC-USD", Decimal("61000.10"), Decimal("0.5")),
        Trade(1700000000123456000, "coin", "ETH-USD", Decimal(2000), Decimal(1)),
    ]
    assert report.messages == 2


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1700000000", 1700000000_000000000),
        ("1700000000.123456789", 1700000000_123456789),
        ("1700000000123", 1700000000_123000000),
        ("1700000000123456", 1700000000_123456000),
        ("1700000000123456789", 1700000000_123456789),
        ("2023-11-14 22:13:20", 1700000000_000000000),
        ("2023-11-14T23:13:20+01:00", 1700000000_000000000),
    ],
)
def test_csv_times_tell_their_unit_by_their_size(
    write: WriteText, text: str, nanoseconds: int
) -> None:
    path = write("trades.csv", f"time,symbol,price,size\n{text},X,1,1\n")
    assert [event.ts_recv for event in read(path)[0]] == [nanoseconds]


def test_a_csv_without_a_needed_column_names_it(write: WriteText) -> None:
    path = write("trades.csv", "time,price,size\n1,1,1\n")
    with pytest.raises(ParseError, match="symbol: one of symbol, instrument"):
        read(path)


def test_a_csv_whose_header_has_no_fields_is_refused(write: WriteText) -> None:
    path = write("trades.csv", '\ntime,"symbol,price,size\n1,X,1,1\n')
    with pytest.raises(ParseError, match=r"trades\.csv:2: wanted comma-separated fields"):
        read(path)


@pytest.mark.parametrize(
    "row",
    ["1,X,1", "1,X,1,1,1", "then,X,1,1", "1,,1,1", '1,"X,1,1', "17000000000000000000,X,1,1"],
)
def test_a_malformed_csv_row_is_told_with_its_line(write: WriteText, row: str) -> None:
    path = write("trades.csv", f"time,symbol,price,size\n{row}\n1,X,1,1\n")
    (error,) = malformed_in(path)
    assert error.line == 2


def test_compression_is_recognized_by_content(tmp_path: Path) -> None:
    path = tmp_path / "capture"
    path.write_bytes(gzip.compress(f"{SPOT_TRADE}\n".encode()))
    assert len(read(path)[0]) == 1


@pytest.mark.parametrize("text", ["", "\n\n", "wss://venue <-> 1\n", "time,open,close\n1,2,3\n"])
def test_an_unknown_format_is_refused_with_the_known_ones(write: WriteText, text: str) -> None:
    with pytest.raises(ParseError, match="binance, lean-forex, lean-equity, csv"):
        recognize_format(write("capture", text))


def test_a_format_name_that_does_not_exist_is_refused(write: WriteText) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        read(write("capture", SPOT_TRADE), "parquet")


def test_a_truncated_gzip_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "capture.gz"
    lines = "\n".join([SPOT_TRADE] * 1_000).encode()
    path.write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(OSError, match="damaged") as caught:
        read(path)
    assert caught.value.filename == str(path)


def test_a_broken_zip_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(OSError, match="damaged"):
        recognize_format(path)


def test_a_zip_of_several_files_or_of_another_resolution_is_refused(tmp_path: Path) -> None:
    minutes = write_zip(tmp_path / "a.zip", "20131008_spy_minute_trade.csv", "1\n")
    with pytest.raises(ParseError, match="zip of ticks"):
        recognize_format(minutes)
    several = write_zip(tmp_path / "b.zip", "one.csv", "")
    with zipfile.ZipFile(several, "a") as archive:
        archive.writestr("two.csv", "")
    with pytest.raises(ParseError, match="wanted one file in the zip, found 2"):
        recognize_format(several)


def test_a_lean_format_for_a_plain_file_is_refused(write: WriteText) -> None:
    with pytest.raises(ParseError, match="zip"):
        read(write("capture", SPOT_TRADE), "lean-forex")


def test_events_are_frozen() -> None:
    trade = Trade(1, "venue", "X", Decimal(1), Decimal(1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        trade.price = Decimal(2)  # type: ignore[misc]


def test_topics_have_three_levels_whatever_the_symbol() -> None:
    assert topic_name(Trade(1, "us_n", "BRK.B", Decimal(1), Decimal(1))) == "trades.us_n.BRK_B"
    assert topic_name(Quote(1, "v", "A *>", Decimal(1), Decimal(1))) == "quotes.v.A___"


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("file", "messages", "trades", "quotes", "ignored"),
    [
        ("spot_btcusdt", 41_249, 9_757, 28_040, {"depth": 3_451, "snapshot": 1}),
        ("spot_ethusdt", 33_618, 6_106, 24_077, {"depth": 3_434, "snapshot": 1}),
        ("usdm_btcusdt", 93_954, 21_313, 66_089, {"depth": 6_551, "snapshot": 1}),
    ],
)
def test_real_binance_captures_give_exactly_their_trades_and_quotes(
    data: Path, file: str, messages: int, trades: int, quotes: int, ignored: dict[str, int]
) -> None:
    path = data / "binance-raw" / f"{file}_20240808.gz"
    events, report = read(path)
    assert recognize_format(path) == "binance"
    assert (report.messages, report.trades, report.quotes) == (messages, trades, quotes)
    assert report.ignored == ignored
    assert {event.venue for event in events} == {f"binance_{file.partition('_')[0]}"}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("file", "trades", "quotes"),
    [
        ("lean-eurusd/fxcm_eurusd_20140508_quote.zip", 0, 167_466),
        ("lean-eurusd/oanda_eurusd_20140508_quote.zip", 0, 87_833),
        ("lean-us-equity/spy_20131008_trade.zip", 451_545, 0),
    ],
)
def test_real_lean_captures_give_exactly_their_rows(
    data: Path, file: str, trades: int, quotes: int
) -> None:
    report = CaptureReport()
    for _ in read_capture(data / file, report=report):
        pass
    assert report == CaptureReport(messages=trades + quotes, trades=trades, quotes=quotes)


@pytest.mark.real_data
def test_the_two_real_forex_venues_see_the_same_peak_at_the_same_time(data: Path) -> None:
    peaks = []
    for venue in ("fxcm", "oanda"):
        path = data / "lean-eurusd" / f"{venue}_eurusd_20140508_quote.zip"
        quotes = (event for event in read_capture(path) if isinstance(event, Quote))
        peaks.append(max(quotes, key=lambda quote: quote.bid).ts_recv)
    assert abs(peaks[0] - peaks[1]) < 60 * 1_000_000_000


@pytest.mark.real_data
def test_a_capture_of_an_unsupported_kind_is_refused(data: Path) -> None:
    with pytest.raises(ParseError, match="the format is none of"):
        recognize_format(data / "cryptofeed-raw" / "KRAKEN.ws.50.0.gz")
