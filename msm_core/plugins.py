"""What installed plugins bring, kinds of signals and of rebalance strategies, and which versions of all kinds this process has."""

import functools
from typing import Any

from msm_core.identity import Kinds, identity
from msm_core.interpolation import CODE_VERSION as PRICES_CODE_VERSION
from msm_core.rebalance_strategy import REBALANCE_STRATEGIES
from msm_core.signals import SIGNALS
from msm_core.valuation import CODE_VERSION as PORTFOLIO_CODE_VERSION

FAMILIES: tuple[Kinds[Any], ...] = (SIGNALS, REBALANCE_STRATEGIES)


def plugin_versions() -> str:
    """`distribution version` of every plugin that brought a kind, in order; empty without plugins. Imports them all."""
    return ", ".join(sorted({version for family in FAMILIES for version in family.plugins().values()}))


@functools.cache
def code_version() -> str:
    """What must be the same wherever a fleet is computed: versions of the kernels, of the kinds that come with us, and of plugins."""
    own = {f"{family.family} {kind}": cls.code_version for family in FAMILIES for kind, cls in family.classes.items() if _is_ours(cls)}
    parts = [f"prices-{PRICES_CODE_VERSION} portfolios-{PORTFOLIO_CODE_VERSION} kinds-{identity(own)[:8]}", plugin_versions()]
    return ", ".join(filter(None, parts))


def _is_ours(cls: type[Any]) -> bool:
    return cls.__module__.startswith("msm_core.")
