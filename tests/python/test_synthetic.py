"""The synthetic market: the same for one seed, exact, and like a market."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tickbus import ConfigError
from tickbus.captures import Quote, Trade
from tickbus.cli.oracle import tally_synthetic
from tickbus.cli.totals import Totals
from tickbus.synthetic import INSTRUMENTS, Instrument, QuoteRow, SyntheticMarket, TradeRow


def test_one_seed_gives_one_market() -> None:
    market = SyntheticMarket(seed=7, length=2_000)
    assert list(market.rows()) == list(SyntheticMarket(seed=7, length=2_000).rows())
    assert list(market.events()) == list(market.events())


def test_another_seed_gives_another_market() -> None:
    first, second = (list(SyntheticMarket(seed, 100).rows()) for seed in (1, 2))
    assert first != second


def test_a_seed_gives_the_same_market_on_every_machine() -> None:
    first = next(SyntheticMarket(seed=1, length=1).rows())
    instrument = Instrument("sim_west", "SOL-USD", price_decimals=3, size_decimals=4)
    assert first == QuoteRow(1704153600000268729, instrument, 154_001, 154_005, 9_082, 27_665)


def test_two_venues_trade_and_quote_several_symbols() -> None:
    events = list(SyntheticMarket(seed=1, length=5_000).events())
    assert {event.venue for event in events} == {"sim_east", "sim_west"}
    for instrument in INSTRUMENTS:
        kinds = {
            type(event)
            for event in events
            if (event.venue, event.symbol) == (instrument.venue, instrument.symbol)
        }
        assert kinds == {Trade, Quote}


def test_time_rises_and_no_quote_is_crossed() -> None:
    events = list(SyntheticMarket(seed=3, length=5_000).events())
    times = [event.ts_recv for event in events]
    assert times == sorted(set(times))
    assert all(event.bid < event.ask for event in events if isinstance(event, Quote))
    assert all(event.size > 0 and event.price > 0 for event in events if isinstance(event, Trade))


def test_events_are_the_rows_in_decimals() -> None:
    market = SyntheticMarket(seed=5, length=500)
    for row, event in zip(market.rows(), market.events(), strict=True):
        tick = Decimal(1).scaleb(-row.instrument.price_decimals)
        if isinstance(row, TradeRow):
            assert isinstance(event, Trade)
            assert event.price == row.price * tick
        else:
            assert isinstance(event, Quote)
            assert (event.bid, event.ask) == (row.bid * tick, row.ask * tick)


def test_integer_totals_equal_decimal_totals() -> None:
    market = SyntheticMarket(seed=11, length=3_000)
    totals: dict[tuple[str, str], Totals] = {}
    for event in market.events():
        total = totals.setdefault((event.venue, event.symbol), Totals())
        if isinstance(event, Trade):
            part = Totals(1, event.size, event.price * event.size)
        else:
            part = Totals(quotes=1, bid_sum=event.bid, ask_sum=event.ask)
        total.add(part)
    assert tally_synthetic(market.rows()) == totals


def test_a_market_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="length was 0"):
        SyntheticMarket(length=0)
