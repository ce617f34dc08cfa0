"""What every signal and every rebalance strategy keeps. The test of a new kind is a subclass that supplies data, and its own numbers.

No expected value comes from the code under test: the contracts compare one road with another (whole and split, spelled one way and
another), or with facts that the subclass states.
"""

import json
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import Any, ClassVar, get_args
from uuid import UUID

import numpy as np
import pytest
from pydantic import ValidationError

from msm_core import execution
from msm_core.alignment import align
from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import Construction, Window, executed, finished, prepared
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import InvalidInput, InvalidPrice, MissingPrices, UnknownKind
from msm_core.frames import Floats, Series, Times, iso
from msm_core.identity import Kinds, Spec
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES, RebalanceStrategy
from msm_core.sessions import Sessions
from msm_core.signals import SIGNALS, Signal, Vectors, computed
from msm_core.signals.base import Inputs, Request
from msm_core.signals.computed import ComputedSignal, EmitOn
from msm_core.valuation import Trades
from tests.runs import Inputs as Run
from tests.runs import all_rows, random_inputs, trade_bits, value_rows, weight_rows, with_parts

Payload = Mapping[str, Any]

A_SIGNAL: Payload = {"kind": "equal_weights", "asset_list": ["AAPL"]}
A_STRATEGY: Payload = {"kind": "immediate_signal", "calendar_key": "XNYS"}
PRICES = APIDataNode(time_index_meta_table_uid=UUID(int=1))


def nest(
    signal: Spec | Payload = A_SIGNAL, strategy: Spec | Payload = A_STRATEGY, prices: Spec | Payload = PRICES, frequency: str = "1d"
) -> PortfolioConfiguration:
    """The documented nesting around a signal, a strategy and a price source, each an instance or plain data."""
    return PortfolioConfiguration.model_validate(
        {
            "portfolio_build_configuration": {
                "price_source_instance": prices,
                "portfolio_prices_frequency": frequency,
                "backtesting_weights_configuration": {"signal_weights_instance": signal, "rebalance_strategy_instance": strategy},
            },
            "portfolio_markets_configuration": {"portfolio_identifier": "nest"},
        }
    )


def random_split(first: np.datetime64, last: np.datetime64, rng: random.Random) -> list[np.datetime64]:
    """Up to eight instants between first and last, in order, then last; some of them a microsecond apart, some equal."""
    span = int((last - first) // np.timedelta64(1, "us"))
    cuts = sorted(rng.randrange(span) for _ in range(rng.randint(0, 6)))
    cuts += [cut + 1 for cut in cuts[:1]] + cuts[-1:]
    return [*(first + np.timedelta64(cut, "us") for cut in sorted(cuts)), last]


class SpecContract:
    """A frozen specification: what is in the fields is what is in the uid.

    payload      a valid one, as a configuration file spells it, `kind` included
    respellings  the same meaning, spelled otherwise: the same uid
    others       other meanings: a uid of their own each, alone and nested
    refused      what is not valid, each with a pattern of the complaint
    """

    family: ClassVar[Kinds[Any]]
    payload: ClassVar[Payload]
    respellings: ClassVar[Sequence[Payload]]
    others: ClassVar[Sequence[Payload]]
    refused: ClassVar[Sequence[tuple[Payload, str]]]

    @property
    def spec(self) -> Any:
        return self.family.parse(self.payload)

    def nested(self, spec: Spec | Payload) -> PortfolioConfiguration:
        raise NotImplementedError

    def unnested(self, configuration: PortfolioConfiguration) -> Spec:
        raise NotImplementedError

    def test_kind_chooses_the_class_and_is_a_field(self):
        assert type(self.spec).model_fields["kind"].default == self.payload["kind"] == self.spec.model_dump()["kind"]
        assert self.family.parse(self.spec) is self.spec or self.family.parse(self.spec) == self.spec
        with pytest.raises(UnknownKind, match="os:system"):
            self.family.parse({**self.payload, "kind": "os:system"})

    def test_uid_is_independent_of_spelling(self):  # R5
        backwards = dict(reversed(self.payload.items()))
        for spelling in (backwards, *self.respellings):
            assert self.family.parse(spelling).uid == self.spec.uid, spelling
            assert self.nested(spelling).uid == self.nested(self.spec).uid, spelling

    def test_uid_survives_json(self):  # R5
        text = self.spec.model_dump_json()
        assert type(self.spec).model_validate_json(text) == self.spec
        assert type(self.spec).model_validate_json(text).uid == self.spec.uid
        again = self.nested(self.spec).model_dump_json()
        assert self.unnested(PortfolioConfiguration.model_validate_json(again)) == self.spec
        assert PortfolioConfiguration.model_validate_json(again).uid == self.nested(self.spec).uid
        assert json.loads(again) == json.loads(self.nested(json.loads(text)).model_dump_json())

    def test_other_meaning_other_uid_also_nested(self):  # R5; a field annotated with the base class would drop the subclass's fields
        specs = [self.spec, *(self.family.parse(other) for other in self.others)]
        assert len({spec.uid for spec in specs}) == len(specs)
        assert len({self.nested(spec).uid for spec in specs}) == len(specs)
        assert len({self.nested(spec).model_dump_json() for spec in specs}) == len(specs)

    def test_uid_is_independent_of_the_namespace(self, monkeypatch):  # R7, design.md section 4
        bare = self.spec.uid, self.nested(self.spec).uid
        monkeypatch.setenv("MSM_AUTO_REGISTER_NAMESPACE", "elsewhere")
        assert (self.spec.uid, self.nested(self.spec).uid) == bare

    def test_frozen(self):
        with pytest.raises(ValidationError, match="frozen"):
            self.spec.kind = self.spec.kind

    def test_pickle(self):
        copy = pickle.loads(pickle.dumps(self.spec))
        assert (type(copy), copy, copy.uid) == (type(self.spec), self.spec, self.spec.uid)
        configuration = self.nested(self.spec)
        assert pickle.loads(pickle.dumps(configuration)).uid == configuration.uid

    def test_refused(self):
        for bad, complaint in (*self.refused, ({**self.payload, "colour": "red"}, "Extra inputs are not permitted")):
            with pytest.raises(ValidationError, match=complaint):
                self.family.parse(bad)
            with pytest.raises(ValidationError, match=complaint):
                self.nested(bad)


class SignalContract(SpecContract):
    """A signal emits complete, finite vectors within its universe; the same ones however the range is split.

    first, last  a range of time, outside which it emits nothing; override `emit` where a signal needs inputs
    """

    family = SIGNALS
    first: ClassVar[np.datetime64]
    last: ClassVar[np.datetime64]
    splits: ClassVar[int] = 25

    def nested(self, spec: Spec | Payload) -> PortfolioConfiguration:
        return nest(signal=spec)

    def unnested(self, configuration: PortfolioConfiguration) -> Spec:
        return configuration.signal

    def emit(self, spec: Signal, since: np.datetime64 | None, through: np.datetime64) -> Vectors:
        return spec.emit(since, through)

    def test_universe_is_in_bytewise_order(self):
        universe = self.spec.universe
        assert universe
        assert list(universe) == sorted(set(universe), key=str.encode)

    def test_vectors_are_complete_finite_and_within_the_universe(self):
        vectors = self.emit(self.spec, None, self.last)
        assert len(vectors.times) > 0
        assert vectors.times.dtype == np.dtype("datetime64[us]")
        assert vectors.weights.dtype == np.float64
        assert vectors.weights.shape == (len(vectors.times), len(vectors.assets))
        assert set(vectors.assets) <= set(self.spec.universe)
        assert list(vectors.assets) == sorted(set(vectors.assets), key=str.encode)
        assert np.isfinite(vectors.weights).all()
        assert (np.diff(vectors.times) > np.timedelta64(0, "us")).all()
        assert ((vectors.times >= self.first) & (vectors.times <= self.last)).all()

    def test_emission_is_split_invariant(self):  # R75, design.md section 8
        whole = self.emit(self.spec, None, self.last)
        for seed in range(self.splits):
            since, parts = None, []
            for through in random_split(self.first - np.timedelta64(1, "us"), self.last, random.Random(seed)):
                part = self.emit(self.spec, since, through)
                assert ((part.times <= through) & (since is None or part.times > since)).all()
                assert part.assets == whole.assets
                parts.append(part)
                since = through
            assert np.array_equal(np.concatenate([part.times for part in parts]), whole.times)
            assert np.concatenate([part.weights for part in parts]).tobytes() == whole.weights.tobytes()

    def test_nothing_outside_the_range(self):
        before = self.first - np.timedelta64(1, "us")
        assert len(self.emit(self.spec, None, before).times) == 0
        assert len(self.emit(self.spec, self.last, self.last).times) == 0
        assert len(self.emit(self.spec, self.last, self.last + np.timedelta64(3650, "D")).times) == 0

    def test_forward_fill_is_a_length_of_time_or_for_ever(self):  # R8
        fill = self.spec.maximum_forward_fill
        assert fill is None or (isinstance(fill, np.timedelta64) and fill > np.timedelta64(0, "us"))

    def test_explanation_is_one_sentence(self):
        assert self.spec.explanation().endswith(".")
        assert "\n" not in self.spec.explanation()


def weekday_sessions(first: str, last: str) -> Sessions:
    """Monday to Friday, 14:30 to 21:00 UTC; `last` is a Friday that ends a quarter, so that every period is told."""
    days = np.arange(np.datetime64(first), np.datetime64(last) + 1)
    days = days[np.is_busday(days)]
    midnights = days.astype("datetime64[us]")
    opens, closes = midnights + np.timedelta64(870, "m"), midnights + np.timedelta64(1260, "m")
    return Sessions("WEEKDAYS", days, opens, closes, np.datetime64(first), np.datetime64(last) + 2)


API_PRICES = {"kind": "api_data_node", "time_index_meta_table_uid": str(UUID(int=1))}
ASSETS = ("AAPL", "BRK.B", "ETH", "MSFT", "NVDA", "TSLA", "XOM", "a", "b", "É", "鉄")  # bytewise order
LATE, GONE, GAPPY = "ETH", "NVDA", "TSLA"
WEEKDAYS = weekday_sessions("2022-01-03", "2023-06-30")  # 390 sessions

Bars = Mapping[str, Mapping[str, Series]]  # by request, by identifier


class ComputedSignalContract(SignalContract):
    """A computed signal keeps these in a random market: `ASSETS` on WEEKDAYS, a bar at every close.

    One asset is listed late, one is delisted (its bars go on, and must not count), one has gaps.

    payload      `asset_list` is ASSETS, `calendar_key` "WEEKDAYS"; windows well below the 150 sessions before the late listing
    numbers      override it where a request is not a price of ASSETS: (n, T) numbers of its identifiers over `times`
    warm_up      sessions of its own that an asset needs before it may be weighted; None: a full window
    periods      values of `emit_on` beside every_session
    """

    splits = 200
    sessions: ClassVar[Sessions] = WEEKDAYS
    first = WEEKDAYS.closes[0]
    last = WEEKDAYS.closes[-1]
    periods: ClassVar[Sequence[str]] = get_args(EmitOn)[1:]
    warm_up: ClassVar[int | None] = None

    @property
    def times(self) -> Times:
        return self.sessions.valuation_times(self.spec.frequency)

    @property
    def listed_from(self) -> int:
        """Session of LATE's first bar."""
        return len(self.sessions.dates) * 2 // 5

    @property
    def delisted(self) -> dict[str, np.datetime64]:
        return {GONE: self.sessions.dates[len(self.sessions.dates) * 3 // 4]}

    def numbers(self, request: Request) -> Floats:
        """Random walks of 2 % a bar around 100."""
        rng = np.random.default_rng([len(request.name), *request.name.encode()])
        steps = 1 + 0.02 * rng.standard_normal((len(request.identifiers), len(self.times)))
        return 100 * np.cumprod(steps, axis=1)

    def bars(self) -> dict[str, dict[str, Series]]:
        """Bars of every request of `spec`, thinned out for LATE and GAPPY."""
        times, unknown = self.times, np.full(len(self.times), np.nan)
        begun = times > self.sessions.closes[self.listed_from - 1]
        half = len(times) // 2
        gaps = ~np.isin(np.arange(len(times)), [half, half + 1, half + 2, half + 9])
        thin = {LATE: begun, GAPPY: gaps}
        return {
            r.name: {
                a: Series(times, row, unknown).kept(thin.get(a, np.full(len(times), True)))
                for a, row in zip(r.identifiers, self.numbers(r), strict=True)
            }
            for r in self.spec.requests
        }

    def inputs(
        self, spec: ComputedSignal, bars: Bars, since: np.datetime64 | None, through: np.datetime64, delisted: Mapping[str, np.datetime64]
    ) -> Inputs:
        """What a nightly run reads: nothing later than `through`, nothing before the last `history_sessions` closes up to `since`."""
        sessions = self.sessions
        start = 0 if since is None else int(np.searchsorted(sessions.closes, since, "right")) - spec.history_sessions
        begin = sessions.closes[start] if start > 0 else sessions.opens[0]
        times = sessions.valuation_times(spec.frequency)
        grid = times[(times >= begin) & (times <= through)]
        earliest = begin - np.timedelta64(spec.price_alignment_policy.maximum_staleness)
        panels = {}
        for request in spec.requests:
            read = {a: s.kept((s.times >= earliest) & (s.times <= through)) for a, s in bars[request.name].items()}
            panels[request.name] = align(
                read, request.identifiers, sessions, grid, spec.price_alignment_policy, "Bars", request.column, "close", delisted
            )
        return Inputs(sessions, panels)

    def emit_from(
        self,
        bars: Bars,
        since: np.datetime64 | None,
        through: np.datetime64,
        spec: ComputedSignal | None = None,
        delisted: Mapping[str, np.datetime64] | None = None,
    ) -> Vectors:
        chosen: ComputedSignal = spec or self.spec
        return chosen.emit(since, through, self.inputs(chosen, bars, since, through, self.delisted if delisted is None else delisted))

    def emit(self, spec: Signal, since: np.datetime64 | None, through: np.datetime64) -> Vectors:
        assert isinstance(spec, ComputedSignal)
        return self.emit_from(self.market, since, through, spec)

    @cached_property
    def market(self) -> Bars:
        return self.bars()

    def changed(self, bars: Bars, change: Callable[[Series], Series]) -> Bars:
        return {name: {a: change(s) for a, s in series.items()} for name, series in bars.items()}

    def test_no_look_ahead(self):  # P7
        bars, whole, felt = self.bars(), self.emit(self.spec, None, self.last), 0
        for seed in range(10):
            rng = np.random.default_rng(seed)
            t = self.times[rng.integers(len(self.times) // 5, len(self.times) - 1)]

            def scaled(s: Series, t=t, rng=rng) -> Series:
                return Series(s.times, np.where(s.times > t, s.values * rng.uniform(0.2, 5, len(s.times)), s.values), s.volumes)

            def shuffled(s: Series, t=t, rng=rng) -> Series:
                n = int((s.times <= t).sum())
                return Series(s.times, np.append(s.values[:n], rng.permutation(s.values[n:])), s.volumes)

            def dropped(s: Series, t=t, rng=rng) -> Series:
                return s.kept((s.times <= t) | (rng.random(len(s.times)) < 0.5))

            n = int((whole.times <= t).sum())
            for change in (scaled, shuffled, dropped, lambda s, t=t: s.kept(s.times <= t)):
                other = self.emit_from(self.changed(bars, change), None, self.last)
                assert np.array_equal(other.times[:n], whole.times[:n])
                assert not (other.times[n:] <= t).any()
                assert other.weights[:n].tobytes() == whole.weights[:n].tobytes()
                felt += other.weights.tobytes() != whole.weights.tobytes()
        assert felt > 20

    def test_vectors_are_the_same_however_much_is_computed_together(self, monkeypatch):
        whole = self.emit(self.spec, None, self.last)
        for cells in (1, 20_000, 10**9):
            monkeypatch.setattr(computed, "WINDOW_CELLS_MAX", cells)
            other = self.emit(self.spec, None, self.last)
            assert (other.times.tobytes(), other.weights.tobytes()) == (whole.times.tobytes(), whole.weights.tobytes())

    def test_order_of_the_asset_list_is_no_meaning(self):
        whole = self.emit(self.spec, None, self.last)
        for seed in range(5):
            spec = self.family.parse({**self.payload, "asset_list": random.Random(seed).sample(ASSETS, len(ASSETS))})
            assert spec.uid == self.spec.uid
            assert self.emit(spec, None, self.last).weights.tobytes() == whole.weights.tobytes()

    def test_renamed_assets_are_weighted_as_before(self):  # the order of summing changes, so the last bits may
        whole, bars = self.emit(self.spec, None, self.last), self.bars()
        for seed in range(5):
            order = random.Random(seed).sample(range(len(ASSETS)), len(ASSETS))
            names = {asset: f"{place:02d}" for asset, place in zip(ASSETS, order, strict=True)}
            spec = self.family.parse({**self.payload, "asset_list": sorted(names.values())})
            renamed = {name: {names.get(a, a): s for a, s in series.items()} for name, series in bars.items()}
            delisted = {names[a]: date for a, date in self.delisted.items()}
            other = self.emit_from(renamed, None, self.last, spec, delisted)
            assert np.array_equal(other.times, whole.times)
            columns = [other.assets.index(names[a]) for a in whole.assets]
            np.testing.assert_allclose(other.weights[:, columns], whole.weights, rtol=0, atol=1e-12)

    def test_a_late_asset_has_no_weight_before_its_window_is_full_and_changes_nothing_before(self):
        bars, whole = self.bars(), self.emit(self.spec, None, self.last)
        weights = whole.weights[:, whole.assets.index(LATE)]
        needed = self.spec.history_sessions if self.warm_up is None else self.warm_up
        begins = self.sessions.closes[self.listed_from + needed - 2]  # the close before the first one with a full window
        assert (weights[whole.times <= begins] == 0).all()
        assert (weights[whole.times > begins] != 0).any()
        never = {name: {a: s for a, s in series.items() if a != LATE} for name, series in bars.items()}
        without = self.emit_from(never, None, self.last)
        n = int((whole.times <= begins).sum())
        assert n > 0
        assert np.array_equal(without.times[:n], whole.times[:n])
        assert without.weights[:n].tobytes() == whole.weights[:n].tobytes()
        assert (without.weights[:, whole.assets.index(LATE)] == 0).all()

    def test_an_asset_that_is_gone_has_no_weight(self):
        row = int(np.searchsorted(self.sessions.dates, self.delisted[GONE], "right"))
        gone_from = self.sessions.opens[row]
        whole, listed = self.emit(self.spec, None, self.last), self.emit_from(self.bars(), None, self.last, delisted={})
        place = whole.assets.index(GONE)
        assert (whole.weights[whole.times > gone_from, place] == 0).all()
        assert (listed.weights[listed.times > gone_from, place] != 0).any()
        n = int((whole.times <= gone_from).sum())
        assert n == int((listed.times <= gone_from).sum()) > 0
        assert whole.weights[:n].tobytes() == listed.weights[:n].tobytes()

    def test_a_number_that_is_none_is_refused_with_its_asset_time_and_value(self):
        bars = self.bars()
        for request in self.spec.requests:
            for seed, value in enumerate((np.nan, 0.0, -1.0, np.inf, -np.inf)):
                asset = request.identifiers[seed % len(request.identifiers)]
                series = bars[request.name][asset]
                bad = len(series.times) // 2 + seed
                values = np.where(np.arange(len(series.times)) == bad, value, series.values)
                other = {**bars, request.name: {**bars[request.name], asset: Series(series.times, values, series.volumes)}}
                time = series.times[bad]
                before = time - np.timedelta64(1, "us")
                self.spec.emit(None, before, self.inputs(self.spec, other, None, self.last, self.delisted))  # nothing is wrong yet
                if value == 0 and request.zero_allowed:
                    self.emit_from(other, None, self.last)
                    continue
                with pytest.raises(InvalidInput) as caught:
                    self.emit_from(other, None, self.last)
                told = str(caught.value)
                assert all(fact in told for fact in (asset, iso(time), f"is {value},", request.column, self.spec.kind)), told

    def test_emit_on_chooses_among_the_same_vectors(self):
        whole, dates = self.emit(self.spec, None, self.last), self.sessions.dates
        label = {
            "week_end": (dates.astype(np.int64) + 3) // 7,
            "month_end": dates.astype("datetime64[M]").astype(np.int64),
            "quarter_end": dates.astype("datetime64[M]").astype(np.int64) // 3,
        }
        for period in self.periods:
            ends = self.sessions.closes[np.append(np.diff(label[period]) > 0, True)]
            kept = np.isin(whole.times, ends)
            some = self.emit(self.family.parse({**self.payload, "emit_on": period}), None, self.last)
            assert 0 < len(some.times) < len(whole.times)
            assert np.array_equal(some.times, whole.times[kept])
            assert some.weights.tobytes() == whole.weights[kept].tobytes()

    def test_computed_through_is_where_every_listed_asset_is_known(self):
        bars, spec, name = self.bars(), self.spec, self.spec.requests[0].name

        def through(until: Mapping[str, np.datetime64], spec: ComputedSignal = spec) -> np.datetime64 | None:
            kept = {a: s.kept(s.times <= until.get(a, self.last)) for a, s in bars[name].items()}
            return spec.computed_through(self.inputs(spec, {**bars, name: kept}, None, self.last, self.delisted), None, self.last)

        early = self.times[-len(self.times) // 10]
        assert through({}) == self.last
        assert through({"XOM": early}) == early
        assert through({GONE: early}) == self.last  # it is delisted by then
        assert through({"XOM": early}, self.family.parse({**self.payload, "stale_after_sessions": 2})) == self.last
        with pytest.raises(MissingPrices, match="XOM"):
            through({"XOM": self.sessions.opens[0]})


def is_held_into(parts: Sequence[Construction], asset: str, time: np.datetime64) -> bool:
    """What is held over from the last trade before an instant counts there."""
    for part in parts:
        trades = part.trades
        before = np.flatnonzero(part.bars.times[trades.rows] < time)
        if asset in part.assets and len(before) and part.times[-1] >= time:
            return bool(trades.after[before[-1], part.assets.index(asset)] != 0)
    return False


def foresight(strategy: RebalanceStrategy) -> int:
    """Sessions to come that a decision asks the calendar for."""
    return max(0, -getattr(strategy, "event_offset", 0))


class RebalanceContract(SpecContract):
    """A strategy decides at sessions with a valid target only, and never from sessions to come; and a portfolio that trades by it has the
    same rows however its window is split, in whatever company it is computed, and whatever happens later.

    payload   what is executed in the random markets of `tests.runs`, in turn with those of `others` that are of its kind and no other
              calendar; its capacity must bind there, where it has one
    grids     valuation grids that make sense for it
    sessions  a calendar that ends on the Sunday that ends a year (2023), so that every period of it is told
    """

    family = REBALANCE_STRATEGIES
    sessions: ClassVar[Sessions] = weekday_sessions("2023-01-02", "2023-12-29")
    grids: ClassVar[Sequence[str]] = ("1d", "30m")
    worlds: ClassVar[int] = 20
    splits: ClassVar[int] = 10  # of each world

    def nested(self, spec: Spec | Payload) -> PortfolioConfiguration:
        return nest(strategy=spec, frequency="30m")

    def unnested(self, configuration: PortfolioConfiguration) -> Spec:
        return configuration.rebalance

    def strategies(self) -> list[RebalanceStrategy]:
        return [self.spec, *(self.family.parse(other) for other in self.others if other["kind"] == self.payload["kind"])]

    def random_targets(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A vector index per session, in order, -1 for a while here and there; and where it differs from the session before."""
        rng = np.random.default_rng(seed)
        target = np.cumsum(rng.random(len(self.sessions.closes)) < 0.2)
        target[rng.random(len(target)) < 0.1] = -1
        return target, target != np.append(-1, target[:-1])

    def test_decides_only_where_a_target_is_valid(self):
        for seed, strategy in enumerate(self.strategies()):
            target, changed = self.random_targets(seed)
            decisions = strategy.decisions(self.sessions, target, changed, len(target) - 1 - foresight(strategy))
            assert (decisions.shape, decisions.dtype) == (target.shape, np.dtype(bool))
            assert not decisions[target < 0].any()

    def test_decisions_do_not_depend_on_sessions_to_come(self):  # P7
        for seed, strategy in enumerate(self.strategies()):
            target, changed = self.random_targets(seed)
            told = len(target) - foresight(strategy)
            whole = strategy.decisions(self.sessions, target, changed, told - 1)
            rng = np.random.default_rng(seed)
            for through in rng.integers(0, told, 20):
                later_target = np.append(target[: through + 1], rng.permutation(target[through + 1 :]))
                later_changed = np.append(changed[: through + 1], ~changed[through + 1 :])
                early = strategy.decisions(self.sessions, later_target, later_changed, int(through))
                assert np.array_equal(early[: through + 1], whole[: through + 1])

    def world(self, k: int, **options: Any) -> Run:
        """A portfolio in a market of its own: every strategy on every grid with every accounting, in turn."""
        usable = [s for s in self.strategies() if s.calendar_key == self.spec.calendar_key]
        strategy = usable[k // 2 % len(usable)]
        intraday = self.grids[k % len(self.grids)] != "1d" or strategy.trades_at_open
        return random_inputs(k, strategy, intraday=intraday, **options)

    def test_nights_are_one_run_to_the_bit(self):  # P1, R73, R97: 200 splits, the order under way carried over
        traded = carried = 0
        for k in range(self.worlds):
            one = self.world(k)
            whole = one.run(one.last)
            rng = random.Random(k)
            times = one.sessions.valuation_times(one.configuration.frequency)
            for split in range(self.splits):
                cuts = random_split(one.sessions.opens[0], one.last, rng)
                if split % 3 == 0:  # at instants that are valued, where the state is met in full
                    cuts = [*sorted(rng.sample(list(times[times < one.last]), rng.randint(1, 12))), one.last]
                nights = one.nights(*cuts)
                assert all_rows([built for built, _ in nights]) == all_rows(whole), (k, split)
                carried += sum(state.order is not None for _, state in nights[:-1])
            traded += len(weight_rows(whole))
        assert traded > 100
        assert (carried > 0) == self.spec.carries

    def test_every_night_is_one_run_to_the_bit(self):  # P1
        for k in range(4):
            one = self.world(k)
            times = one.sessions.valuation_times(one.configuration.frequency)
            assert all_rows(one.run(*times[times <= one.last])) == all_rows(one.run(one.last))

    def test_rows_do_not_depend_on_what_comes_later(self):  # P7
        felt = 0
        for k in range(self.worlds):
            one = self.world(k)
            times = one.sessions.valuation_times(one.configuration.frequency)
            for seed in range(3):
                rng = np.random.default_rng([k, seed])
                known = times[rng.integers(len(times) // 4, len(times) * 4 // 5)]
                other = one.perturbed(known, rng)
                left, right = one.run(one.last), other.run(one.last)
                cut = [[r for r in rows(parts) if r[0] <= str(known)] for parts in (left, right) for rows in (value_rows, weight_rows)]
                assert cut[:2] == cut[2:], (k, seed)
                felt += all_rows(left) != all_rows(right)
                assert all_rows(one.run(known)) == all_rows(other.run(known)), (k, seed)  # the order that is left included
        assert felt > self.worlds

    def test_order_of_what_is_given_is_no_meaning(self):  # P4, R98
        for k in range(self.worlds):
            one = self.world(k)
            names = random.Random(k).sample(list(one.series), len(one.series))
            signal = one.configuration.signal.model_copy(update={"assets": tuple(names)})
            other = replace(one, configuration=with_parts(one.configuration, signal=signal), series={a: one.series[a] for a in names})
            assert all_rows(other.run(one.last)) == all_rows(one.run(one.last))

    def test_renamed_assets_are_traded_as_before(self):  # the order of summing changes, so the last bits may
        for k in range(self.worlds):
            one = self.world(k)
            order = random.Random(k).sample(range(len(one.series)), len(one.series))
            names = {asset: f"{place:02d}" for asset, place in zip(one.series, order, strict=True)}
            other = one.renamed(names)
            left, right = one.run(one.last), other.run(one.last)
            assert len(left) == len(right)
            for a, b in zip(left, right, strict=True):
                assert a.times.tolist() == b.times.tolist()
                np.testing.assert_allclose(a.close, b.close, rtol=1e-9)

    def test_a_batch_is_the_portfolios_alone(self, monkeypatch):  # P3: 31 portfolios, other sizes, windows, fees and ways of trading
        for k in range(4):
            windows, alone = self.batch(k)
            assert len(windows) > 20
            for cells in (execution.CELLS_MAX, 1, 5000):
                monkeypatch.setattr(execution, "CELLS_MAX", cells)
                for order in (range(len(windows)), random.Random(k).sample(range(len(windows)), len(windows))):
                    together = executed([windows[i] for i in order])
                    for i, trades in zip(order, together, strict=True):
                        assert not isinstance(trades, Exception)
                        assert trade_bits(trades) == trade_bits(alone[i]), (k, i)
                        left, right = finished(windows[i], trades), finished(windows[i], alone[i])
                        assert all_rows([left] if left else []) == all_rows([right] if right else [])

    def batch(self, k: int) -> tuple[list[Window], list[Trades]]:
        """Windows of 31 portfolios over one market, many of them in their second night; and the trades of each in a market of its own."""
        one = self.world(k)
        rng = random.Random(k)
        times = one.sessions.valuation_times(one.configuration.frequency)
        usable = [s for s in self.strategies() if s.calendar_key == self.spec.calendar_key]
        usable = [s for s in usable if one.configuration.frequency < timedelta(days=1) or not s.trades_at_open]
        together, _ = one.night(None, one.last)
        windows, alone = list[Window](), list[Trades]()
        for i in range(31):
            assets = sorted(rng.sample(list(one.series), rng.randint(1, len(one.series))), key=str.encode)
            mine = one.narrowed(assets, strategy=rng.choice(usable), fee=rng.choice([0.0, 0.001, 0.02]))
            until, then = sorted(rng.sample(list(times[len(times) // 3 : -20]), 2))
            done = mine.nights(until) if i % 3 else []
            state = done[-1][1] if done else None
            own, vectors = mine.night(state, then)
            cash = mine.cash(then)
            assert vectors is not None
            end = mine.end(own, vectors, state, then, cash)
            shared, single = (prepared(mine.configuration, market, vectors, state, end, cash) for market in (together, own))
            assert (shared is None) == (single is None)
            if shared is None or single is None:
                continue
            (trades,) = executed([single])
            assert not isinstance(trades, Exception)
            windows.append(shared)
            alone.append(trades)
        return windows, alone

    def test_an_unusable_price_of_what_is_held_is_told(self):  # design.md section 3
        told = 0
        for k in range(self.worlds):
            one = self.world(k, staleness=timedelta(0), missing="fail") if k % 3 != 1 else self.world(k + 2)
            whole = one.run(one.last)
            rng = np.random.default_rng(k)
            for value in (np.nan, 0.0, -1.0, np.inf):
                asset = rng.choice(list(one.series))
                series = one.series[asset]
                bad = int(rng.integers(len(series.times) // 3, len(series.times) - 1))
                values = np.where(np.arange(len(series.times)) == bad, value, series.values)
                other = replace(one, series={**one.series, asset: replace(series, values=values)})
                if is_held_into(whole, asset, series.times[bad]):
                    with pytest.raises(InvalidPrice) as error:
                        other.run(one.last)
                    facts = error.value.facts
                    assert (facts["asset"], facts["time"], repr(facts["value"])) == (asset, iso(series.times[bad]), repr(float(value)))
                    told += 1
        assert told > 10

    def test_what_is_left_and_what_was_done_survive_pickling(self):
        for k in range(4):
            one = self.world(k)
            for built, state in one.nights(one.sessions.closes[len(one.sessions.closes) // 2], one.last):
                assert trade_bits(pickle.loads(pickle.dumps(built.trades))) == trade_bits(built.trades)
                assert pickle.dumps(pickle.loads(pickle.dumps(state))) == pickle.dumps(state)

    def test_says_which_column_it_needs_beside_the_price(self):  # R37, R38
        assert self.spec.liquidity_column is None or self.spec.liquidity_column
