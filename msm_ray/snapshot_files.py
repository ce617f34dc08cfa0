"""Snapshots from files: the columns are those that `msm-ray show targets` and `show holdings` write, others are passed over."""

from collections.abc import Hashable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from msm_core.api import Asset, Portfolio
from msm_core.api.checks import shown
from msm_core.data_nodes.bar_files import usable_file
from msm_core.errors import UnusableFile
from msm_core.models.accounts import EXPOSURES
from msm_core.services.snapshots import HoldingsSnapshot, TargetSnapshot
from msm_ray.export import check_path

TARGETS = ("account_target_allocation", "time_index", "target_type", "target")
HOLDINGS = ("account", "time_index", "asset_identifier", "quantity")
NUMBERS = ("quantity", *EXPOSURES)


def target_snapshots(path: Path) -> list[TargetSnapshot]:
    """A snapshot for each allocation and time: target_type asset or portfolio, target its unique_identifier, one of the exposures.

    Raises UnusableFile, RowNotFound naming unknown assets and portfolios. What else is wrong with a row is told when it is stored.
    """
    frame = _read(path, TARGETS)
    given = [name for name in EXPOSURES if name in frame.columns]
    known: dict[tuple[str, Hashable], Any] = {}
    for kind, rows in (("asset", Asset), ("portfolio", Portfolio)):
        named = frame.loc[frame["target_type"] == kind, "target"].dropna().unique()
        known |= {(kind, row.unique_identifier): row.uid for row in rows.get_many(named)}
    targets = list(zip(frame["target_type"], frame["target"], strict=True))
    for kind in ("asset", "portfolio"):
        frame[f"{kind}_uid"] = [known.get(target) if target[0] == kind else None for target in targets]
    columns = ["target_type", "asset_uid", "portfolio_uid", *given]
    return [TargetSnapshot(owner, time, rows[columns]) for (owner, time), rows in _groups(frame, TARGETS[:2])]


def holdings_snapshots(path: Path) -> list[HoldingsSnapshot]:
    """A snapshot for each account and time; a quantity below 0 is short. Raises UnusableFile; the rest is told when it is stored."""
    frame = _read(path, HOLDINGS)
    given = frame["quantity"].tolist()
    short = [isinstance(quantity, int | float) and quantity < 0 for quantity in given]
    quantities = pd.Series(
        [-quantity if is_short else quantity for quantity, is_short in zip(given, short, strict=True)], frame.index, object
    )
    frame = frame.assign(quantity=quantities, direction=[-1 if is_short else 1 for is_short in short])
    columns = ["asset_identifier", "quantity", "direction"]
    return [HoldingsSnapshot(owner, time, rows[columns]) for (owner, time), rows in _groups(frame, HOLDINGS[:2])]


def _groups(frame: pd.DataFrame, by: Sequence[str]) -> Iterable[tuple[Any, pd.DataFrame]]:
    return frame.groupby(list(by), sort=False, dropna=False)


def _read(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """Names as text, never as numbers; times as aware datetimes."""
    check_path(path)
    with usable_file(str(path)):
        frame = pd.read_parquet(path) if path.name.lower().endswith(".parquet") else _csv(path)
    if absent := [name for name in needed if name not in frame.columns]:
        raise UnusableFile(file=path, why=f"it has no column {', '.join(absent)}. Needed are {', '.join(needed)}")
    return frame.assign(time_index=pd.Series([_time(path, i, t) for i, t in enumerate(frame["time_index"])], frame.index, dtype=object))


def _csv(path: Path) -> pd.DataFrame:
    """Only an empty cell is nothing: an asset may be called NA. Numbers read back as they were; what is none is told when it is stored."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    numbers = {name: frame[name].map(_number, na_action="ignore").astype(object) for name in NUMBERS if name in frame.columns}
    return frame.assign(**numbers)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _time(path: Path, row: int, given: Any) -> datetime:
    try:
        time = datetime.fromisoformat(given) if isinstance(given, str) else given.to_pydatetime()
    except (ValueError, AttributeError):
        raise UnusableFile(file=path, why=f"row {row}: time_index {shown(given)} is no instant, such as 2024-06-28T20:00:00Z") from None
    if time.tzinfo is None:
        raise UnusableFile(file=path, why=f"row {row}: time_index {shown(given)} lacks an offset, such as {time.isoformat()}Z")
    return time
