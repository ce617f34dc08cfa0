"""All accounts at once: batches of accounts on an executor, each expanded under one snapshot. Nothing is written."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pandas as pd
from sqlalchemy import Engine

from msm_core.data_nodes.base import failure_facts
from msm_core.database import exported_snapshot, transaction
from msm_core.services.account_exposure import AccountExposure, accounts_with_targets
from msm_ray.executors import Errand, Executor, encode_accounts

BATCH_ACCOUNTS_MAX = 1_000  # of some fifty targets each: bounds the memory of a worker


@dataclass(frozen=True)
class FleetExposure:
    """What all accounts should hold; `failures` are {"reason", "message"} of those that cannot be told.

    accounts  all that were asked for, and have target positions in force
    """

    as_of: datetime
    accounts: tuple[str, ...]
    exposure: pd.DataFrame
    failures: Mapping[str, dict[str, str]]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 all expanded, 3 some, 4 none."""
        return 0 if not self.failures else 3 if len(self.failures) < len(self.accounts) else 4

    def summary(self) -> dict[str, Any]:
        return {
            "as_of": self.as_of.isoformat(),
            "accounts": len(self.accounts),
            "expanded": len(self.accounts) - len(self.failures),
            "rows": len(self.exposure),
            "seconds": round(self.seconds, 3),
            "failures": [{"account": account, **facts} for account, facts in sorted(self.failures.items())],
        }


def expand_fleet(
    engine: Engine,
    executor: Executor,
    as_of: datetime,
    accounts: Sequence[str] | None = None,
    *,
    net: bool = False,
    on_batch: Callable[[int, int], None] = lambda accounts, all_accounts: None,
) -> FleetExposure:
    """Targets in force at `as_of` of `accounts`, None = of all, as exposure to assets. The columns are those of expand_account_targets.

    on_batch  told the accounts of each batch that comes back, and of all batches
    Statements: a fixed number per batch, and one more. Raises RowNotFound naming unknown accounts. A batch that is lost is a failure of
    its accounts.
    """
    started = time.perf_counter()
    with exported_snapshot(engine) as snapshot:
        with transaction(engine, read_only=True, snapshot=snapshot) as connection:
            names = accounts_with_targets(connection, accounts, as_of)
        waiting: dict[int, Sequence[str]] = {}
        for ticket, batch in enumerate(_batches(names, executor)):
            waiting[ticket] = batch
            executor.submit(ticket, "accounts", encode_accounts(batch, Errand(as_of, snapshot=snapshot), net))
        found: dict[int, AccountExposure] = {}
        while len(found) < len(waiting):
            ticket, outcome = executor.wait()
            if isinstance(outcome, Exception):
                outcome = AccountExposure(pd.DataFrame(), dict.fromkeys(waiting[ticket], failure_facts(outcome)))
            found[ticket] = outcome
            on_batch(len(waiting[ticket]), len(names))
    exposure = pd.concat([found[t].exposure for t in sorted(found) if len(found[t].exposure)] or [pd.DataFrame()], ignore_index=True)
    failures = {account: facts for part in found.values() for account, facts in part.failures.items()}
    return FleetExposure(as_of, tuple(names), exposure, failures, time.perf_counter() - started)


def _batches(names: Sequence[str], executor: Executor) -> Iterator[Sequence[str]]:
    """One for each worker, and more only where memory asks for it: each reads the portfolios that its accounts share."""
    if not names:
        return  # Ray starts to tell its slots
    size = min(math.ceil(len(names) / executor.slots), BATCH_ACCOUNTS_MAX)
    for begin in range(0, len(names), size):
        yield names[begin : begin + size]
