"""Portfolios, computed: the domain. `start_engine` attaches the tables of the configured database; typed rows are in `msm_core.api`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msm_core.api.runtime import Runtime, start_engine

__version__ = "0.1.0"

__all__ = ["Runtime", "__version__", "start_engine"]


def __getattr__(name: str) -> Any:
    # pure modules are below this package too: they must not pay for SQLAlchemy
    if name in ("Runtime", "start_engine"):
        from msm_core.api import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
