"""What every signal and every rebalance strategy keeps. The test of a new kind is a subclass that supplies data, and its own numbers.

No expected value comes from the code under test: the contracts compare one road with another (whole and split, spelled one way and
another), or with facts that the subclass states.
"""

import json
import pickle
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from uuid import UUID

import numpy as np
import pytest
from pydantic import ValidationError

from msm_core.configuration import PortfolioConfiguration
from msm_core.data_nodes.prices import APIDataNode
from msm_core.errors import UnknownKind
from msm_core.identity import Kinds, Spec
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES, RebalanceStrategy
from msm_core.sessions import Sessions
from msm_core.signals import SIGNALS, Signal, Vectors

Payload = Mapping[str, Any]

A_SIGNAL: Payload = {"kind": "equal_weights", "asset_list": ["AAPL"]}
A_STRATEGY: Payload = {"kind": "immediate_signal", "calendar_key": "XNYS"}
PRICES = APIDataNode(time_index_meta_table_uid=UUID(int=1))


def nest(
    signal: Spec | Payload = A_SIGNAL, strategy: Spec | Payload = A_STRATEGY, prices: Spec | Payload = PRICES
) -> PortfolioConfiguration:
    """The documented nesting around a signal, a strategy and a price source, each an instance or plain data."""
    return PortfolioConfiguration.model_validate(
        {
            "portfolio_build_configuration": {
                "price_source_instance": prices,
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
        for seed in range(25):
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


class RebalanceContract(SpecContract):
    """A strategy decides at sessions with a valid target only, and never from sessions to come.

    sessions  a calendar that ends on the Sunday that ends a year (2023), so that every period of it is told
    """

    family = REBALANCE_STRATEGIES
    sessions: ClassVar[Sessions]

    def nested(self, spec: Spec | Payload) -> PortfolioConfiguration:
        return nest(strategy=spec)

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
            decisions = strategy.decisions(self.sessions, target, changed, len(target) - 1)
            assert (decisions.shape, decisions.dtype) == (target.shape, np.dtype(bool))
            assert not decisions[target < 0].any()

    def test_decisions_do_not_depend_on_sessions_to_come(self):  # P7
        for seed, strategy in enumerate(self.strategies()):
            target, changed = self.random_targets(seed)
            whole = strategy.decisions(self.sessions, target, changed, len(target) - 1)
            rng = np.random.default_rng(seed)
            for through in rng.integers(0, len(target), 20):
                later_target = np.append(target[: through + 1], rng.permutation(target[through + 1 :]))
                later_changed = np.append(changed[: through + 1], ~changed[through + 1 :])
                early = strategy.decisions(self.sessions, later_target, later_changed, int(through))
                assert np.array_equal(early[: through + 1], whole[: through + 1])

    def test_says_whether_it_needs_volume(self):  # R37, R38
        assert isinstance(self.spec.needs_volume, bool)
