"""Portfolio nodes: weights and values of a portfolio are computed together and land in one transaction."""

import functools
import uuid
from datetime import datetime
from functools import cached_property
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict

from msm_core.configuration import PortfolioConfiguration
from msm_core.construction import required_assets
from msm_core.data_nodes.base import NodeResult
from msm_core.data_nodes.signals import SignalWeights
from msm_core.identity import UIDS_KEPT
from msm_core.models import PortfolioIndexValuesStorage, PortfolioRebalanceStateStorage, PortfoliosStorage, PortfolioWeightsStorage
from msm_core.price_sources import PriceSource
from msm_core.storage import Scope
from msm_core.valuation import CODE_VERSION


class PortfoliosDataNode(BaseModel):
    """The node that writes a portfolio's values to PortfoliosStorage and its weights to PortfolioWeightsStorage.

    held            assets of the last stored weights vector with a weight
    watermark, expected_epoch  progress that the plan saw; a node that has moved since is reported busy
    replace         compute from scratch and replace everything that is stored, in one transaction
    had_orders      an earlier configuration of it left orders, which go with it
    identities      configuration hash and signal uid, worked out by the driver; None = not yet
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    portfolio_configuration: PortfolioConfiguration
    held: tuple[str, ...] = ()
    watermark: AwareDatetime | None = None
    replace: bool = False
    expected_epoch: int | None = None
    had_orders: bool = False
    identities: tuple[str, str] | None = None

    def model_post_init(self, _context: Any) -> None:
        if self.identities:
            self.portfolio_configuration.identified(*self.identities)

    @property
    def identifier(self) -> str:
        return self.portfolio_configuration.identifier

    @property
    def scopes(self) -> tuple[Scope, ...]:
        return portfolio_scopes(self.portfolio_configuration, self.had_orders)

    @property
    def data_node_uid(self) -> uuid.UUID:
        """Uid of its progress row, to which the Portfolio row points."""
        return self.scopes[0].uid

    def dependencies(self) -> dict[str, SignalWeights | PriceSource]:
        """Exactly the signal node and the explicit price source."""
        signal = SignalWeights(signal_weights_instance=self.portfolio_configuration.signal)
        return {"signal_weights": signal, "price_source": self.portfolio_configuration.price_source}

    def run(
        self, debug_mode: bool = True, update_tree: bool = True, force_update: bool = False, as_of: datetime | None = None
    ) -> NodeResult:
        """Bring this portfolio up to date in this process, its signal first if `update_tree`; asked again, it writes nothing.

        debug_mode, force_update  accepted for callers of the documented form; an update is always in this process and idempotent
        as_of                     nothing later is used; default: now, by the database's clock
        Raises NodeFailed with what is wrong, StorageNotPrepared.
        """
        from msm_core.data_nodes.local import run_portfolio  # it stands above this module: it plans and registers too

        return run_portfolio(self, as_of, update_tree)

    @property
    def since(self) -> datetime | None:
        """Start of its window: its own watermark, never another portfolio's; None = from scratch."""
        return None if self.replace else self.watermark

    @cached_property
    def assets(self) -> tuple[str, ...]:
        return required_assets(self.portfolio_configuration, () if self.replace else self.held)


class PortfolioWeights(PortfoliosDataNode):
    """The same update, seen from its weights: weights and values of a portfolio land in one transaction or not at all."""

    @property
    def data_node_uid(self) -> uuid.UUID:
        return self.scopes[1].uid


def portfolio_scopes(configuration: PortfolioConfiguration, has_orders: bool = False) -> tuple[Scope, ...]:
    """Progress rows that one portfolio moves together: values first, weights, its index publication and its orders if it has any."""
    return _scopes(configuration.identifier, configuration.index_identifier, has_orders or configuration.rebalance.carries)


@functools.lru_cache(maxsize=UIDS_KEPT)
def _scopes(identifier: str, index_identifier: str | None, has_orders: bool) -> tuple[Scope, ...]:
    """Asked for again and again, of each node of a fleet."""
    scopes = [Scope(PortfoliosStorage, identifier), Scope(PortfolioWeightsStorage, identifier)]
    if index_identifier:
        scopes.append(Scope(PortfolioIndexValuesStorage, index_identifier))
    if has_orders:
        scopes.append(Scope(PortfolioRebalanceStateStorage, identifier))
    return tuple(scopes)


def portfolio_code_version(configuration: PortfolioConfiguration) -> str:
    """Of the kernels and of its strategy: a change of either computes it afresh."""
    return f"{CODE_VERSION}.{configuration.rebalance.code_version}"
