"""The documented nested models of one portfolio, declarations only; flat properties on the top one hide the nesting.

Everything under `portfolio_build_configuration` changes numbers and is identity; `portfolio_markets_configuration` describes.
"""

from datetime import date, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from msm_core.alignment import PriceAlignmentPolicy
from msm_core.frames import format_frequency, parse_frequency
from msm_core.identity import Spec, canonical_fields, identity_of, joined
from msm_core.price_sources import AnyPriceSource, PriceSource
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES, RebalanceStrategy
from msm_core.signals import SIGNALS, Signal
from msm_core.valuation import WeightAccounting


class PriceTypeNames(StrEnum):
    OPEN = "open"
    HIGH = "high"
    LOW = "low"
    CLOSE = "close"
    VWAP = "vwap"


AnySignal = Annotated[SerializeAsAny[Signal], BeforeValidator(SIGNALS.parse)]
AnyRebalanceStrategy = Annotated[SerializeAsAny[RebalanceStrategy], BeforeValidator(REBALANCE_STRATEGIES.parse)]


class CashRate(Spec):
    """What cash earns (or costs, where weights sum to more than 1): an annual rate from a registered source, accrued between valuations.

    source           storage of the rate, keyed (time_index, asset_identifier)
    identifier       the rate's asset_identifier in it
    column           numeric column; 0.05 = 5 % a year
    day_count        days of a year
    forward_fill     how long a published rate stays valid: valuation waits for a newer one after that
    """

    kind: Literal["cash_rate"] = "cash_rate"
    source: AnyPriceSource
    identifier: str = Field(min_length=1, max_length=255)
    column: str = Field(default="close", min_length=1, max_length=63)
    day_count: Literal[360, 365] = 365
    forward_fill: timedelta = Field(default=timedelta(days=7), gt=timedelta(0))


class PortfolioExecutionConfiguration(Spec):
    """What trading costs, what cash earns, and how weights are accounted for.

    commission_fee     fraction of traded value, 0.00018 = 1.8 basis points
    weight_accounting  drifted: self-financing; target: constant mix, re-set at every valuation time
    cash_rate          rate that 1 - sum of weights earns; none: nothing
    """

    kind: Literal["execution"] = "execution"
    commission_fee: float = Field(default=0.00018, ge=0, lt=1)
    weight_accounting: WeightAccounting = "drifted"
    cash_rate: CashRate | None = None


class BacktestingWeightsConfig(Spec):
    kind: Literal["backtesting_weights"] = "backtesting_weights"
    signal_weights_instance: AnySignal
    rebalance_strategy_instance: AnyRebalanceStrategy


class PortfolioBuildConfiguration(Spec):
    """Everything that changes the numbers of a portfolio.

    price_column                column of the source that drives returns
    portfolio_prices_frequency  1d: valued at session closes; 5m, 1h: on that grid inside sessions, and at the close
    start_date                  first local date on which it may trade; without one, the first session at which every asset of its
                                first target has a price
    """

    kind: Literal["portfolio_build"] = "portfolio_build"
    price_source_instance: AnyPriceSource
    price_column: str = Field(default=PriceTypeNames.CLOSE, min_length=1, max_length=63)
    portfolio_prices_frequency: str = "1d"
    start_date: date | None = None
    price_alignment_policy: PriceAlignmentPolicy = PriceAlignmentPolicy()
    execution_configuration: PortfolioExecutionConfiguration = PortfolioExecutionConfiguration()
    backtesting_weights_configuration: BacktestingWeightsConfig

    @model_validator(mode="after")
    def _open_is_known(self) -> Self:
        strategy = self.backtesting_weights_configuration.rebalance_strategy_instance
        if strategy.trades_at_open and parse_frequency(self.portfolio_prices_frequency) >= timedelta(days=1):
            raise ValueError(f"{strategy.kind} trades at the open: portfolio_prices_frequency must be intraday, such as 30m, not 1d")
        return self

    @field_validator("price_column", mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, StrEnum) else value

    @field_validator("portfolio_prices_frequency")
    @classmethod
    def _one_day_at_most(cls, value: str) -> str:
        frequency = parse_frequency(value)
        if frequency > timedelta(days=1):
            raise ValueError("portfolio_prices_frequency is 1d at most")
        return format_frequency(frequency)  # 60m and 1h mean the same, so they are the same


class PortfolioMarketsConfig(Spec):
    """What the portfolio is called and how it is presented; never part of the configuration hash."""

    kind: Literal["portfolio_markets"] = "portfolio_markets"
    portfolio_identifier: str = Field(min_length=1, max_length=255)
    portfolio_name: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    portfolio_index_identifier: str | None = None
    signal_name: str | None = None


class PortfolioConfiguration(Spec):
    """One portfolio, whole."""

    kind: Literal["portfolio"] = "portfolio"
    portfolio_build_configuration: PortfolioBuildConfiguration
    portfolio_markets_configuration: PortfolioMarketsConfig

    @cached_property
    def configuration_hash(self) -> str:
        """Identity of what changes numbers: renaming a portfolio does not change it."""
        without_signal = {"backtesting_weights_configuration": {"signal_weights_instance"}}
        build = self.portfolio_build_configuration.model_dump(exclude_none=True, exclude=without_signal)
        weights = canonical_fields(build["backtesting_weights_configuration"])
        weights["signal_weights_instance"] = joined(self.signal.canonical_fields)
        build["price_source_instance"] = self.price_source.identity_payload
        fields = canonical_fields(build) | {"backtesting_weights_configuration": joined(weights)}
        return identity_of(canonical_fields({"kind": self.kind}) | {"portfolio_build_configuration": joined(fields)})

    def _uid(self) -> str:
        return self.configuration_hash

    def identified(self, configuration_hash: str, signal_uid: str) -> None:
        """Take both from who has worked them out for this very configuration: another process of the run, or `prepare`."""
        self.remember("configuration_hash", configuration_hash)
        self.signal.remember("uid", signal_uid)

    @cached_property
    def identifier(self) -> str:
        return self.portfolio_markets_configuration.portfolio_identifier

    @property
    def index_identifier(self) -> str | None:
        return self.portfolio_markets_configuration.portfolio_index_identifier

    @cached_property
    def signal(self) -> Signal:
        return self.portfolio_build_configuration.backtesting_weights_configuration.signal_weights_instance

    @property
    def signal_uid(self) -> str:
        return self.signal.uid

    @cached_property
    def rebalance(self) -> RebalanceStrategy:
        return self.portfolio_build_configuration.backtesting_weights_configuration.rebalance_strategy_instance

    @property
    def price_source(self) -> PriceSource:
        return self.portfolio_build_configuration.price_source_instance

    @property
    def price_column(self) -> str:
        return self.portfolio_build_configuration.price_column

    @property
    def frequency(self) -> timedelta:
        return parse_frequency(self.portfolio_build_configuration.portfolio_prices_frequency)

    @property
    def start_date(self) -> date | None:
        return self.portfolio_build_configuration.start_date

    @property
    def alignment(self) -> PriceAlignmentPolicy:
        return self.portfolio_build_configuration.price_alignment_policy

    @property
    def execution(self) -> PortfolioExecutionConfiguration:
        return self.portfolio_build_configuration.execution_configuration
