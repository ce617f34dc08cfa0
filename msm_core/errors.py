"""Every error that msm raises on purpose: a sentence that carries facts and ends with the remedy.

Facts are names, dates and plain values, never live objects, so an error crosses a process border (Ray, pickle) unchanged.
"""

from typing import Any, ClassVar


class MsmError(Exception):
    """Root of every error msm raises on purpose."""

    message: ClassVar[str] = "msm failed"
    retryable: ClassVar[bool] = False  # true only where trying the same again can help

    def __init__(self, **facts: Any) -> None:
        super().__init__()  # no positional arguments: this is what makes pickling work
        self.facts = facts

    def __str__(self) -> str:
        return self.message.format(**self.facts)

    @property
    def reason(self) -> str:
        """Stable machine name of the error, as stored in the ledger: `missing_price`."""
        name = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


# -- configuration and identity ---------------------------------------------------------------------------------------


class ConfigurationError(MsmError):
    """A fleet file or a configuration that cannot be used; `problems` holds every one found, not only the first."""

    message = "{problems}"

    def __str__(self) -> str:
        problems = self.facts["problems"]
        return problems if isinstance(problems, str) else "\n".join(problems)


class NotCanonical(MsmError):
    message = "{value} at {path} cannot be part of an identity: {why}."


class InvalidNamespace(MsmError):
    message = "namespace {namespace!r} is not usable: it must match ^[a-z][a-z0-9_]{{0,30}}$. Set MSM_AUTO_REGISTER_NAMESPACE accordingly."


class NamespaceChanged(MsmError):
    message = (
        "the models were loaded for namespace {loaded!r}, but {requested!r} is asked for now. "
        "Set MSM_AUTO_REGISTER_NAMESPACE before the first import of msm_core, in a new process."
    )


class NaiveTimestamp(MsmError):
    message = "{what} is {value}, without a time zone. Give an offset, for example {value}+00:00."


class UnknownKind(MsmError):
    message = "{family} kind {kind!r} is not registered. Known kinds: {known}."


class PluginLeftOut(UnknownKind):
    message = "{family} kind {kind!r} is declared by {plugin}, which is left out: {why}. Repair or uninstall it. Known kinds: {known}."


class SelectionError(MsmError):
    message = "cannot select {selector!r}: {why}. Examples: portfolio:ew-*, tag:core, signal:equal+, asset:AAPL+, status:failed."


# -- database -----------------------------------------------------------------------------------------------------------


class DatabaseNotConfigured(MsmError):
    message = (
        "no database is configured: set MSM_DATABASE_URL or MSM_DATABASE_URL_FILE, or start the embedded one with `msm-ray db start` "
        "(looked for {url_file})."
    )


class DatabaseUnavailable(MsmError):
    message = "the database at {where} does not answer: {why}. Check MSM_DATABASE_URL, or start the embedded one with `msm-ray db start`."
    retryable = True


class UnsupportedDatabase(MsmError):
    message = "the database is {found}; Postgres {needed} or newer is needed."


class EmbeddedPostgresError(MsmError):
    message = "embedded Postgres: {why}. {remedy}"


class EngineNotStarted(MsmError):
    message = (
        "{models} not attached to the configured database (attached: {attached}). Call msm_core.start_engine(models=[{models}]) first."
    )


class UnknownModel(MsmError):
    message = "no model is called {model!r}. Known models: {known}."


class StorageNotPrepared(MsmError):
    message = "these tables are missing: {tables}. Run `msm-ray prepare` (it creates and upgrades tables; nothing else does)."


class StorageMismatch(MsmError):
    message = (
        "not as declared: {differences}. Nothing was done about it: the table may hold somebody's data. "
        "Put it right by hand, or rename or drop it and run `msm-ray prepare`."
    )


class StorageNotEmpty(StorageMismatch):
    message = (
        "only empty tables can be partitioned, and these hold rows: {tables}. Empty all of them (TRUNCATE {all}; the next run computes "
        "everything afresh), or leave them as they are: partitions change no number."
    )


class StoragePartitioned(StorageMismatch):
    message = (
        "partitioned in another way: {differences}. Leave them so: partitions change no number. Or drop all of them, rows "
        "included (DROP TABLE {all}): the same `msm-ray prepare` makes them anew, and the next run computes everything afresh."
    )


class StorageCollision(MsmError):
    message = (
        "storage {storage} was made for {stored}, but {given} has the same name. "
        "Give one of the sources another identifier in the catalogue."
    )


class PrepareBusy(MsmError):
    message = "another `msm-ray prepare` has held the lock for {seconds} s. Wait for it, or see who it is in pg_stat_activity."
    retryable = True


class RowNotFound(MsmError):
    message = "no {model} row has {key}."


class InvalidRow(MsmError):
    message = "{model}: {why}."


class ProgressConflict(MsmError):
    """The epochs moved between claim and commit: everything was rolled back; computing again from the new state is right."""

    message = "progress of {count} node(s) was moved by another run: {nodes}. Nothing was written."
    retryable = True


# -- sources, calendars, inputs ---------------------------------------------------------------------------------------


class SourceNotRegistered(MsmError):
    message = "no storage is registered as {source!r} in the catalogue. Known: {known}. Register it, or correct the price source."


class SourceUnusable(MsmError):
    message = "price source {source}: {why}."


class SourceConflict(MsmError):
    message = (
        "{source} is registered already with {differences}. Replace it if that was wrong (--replace, replace=True), "
        "then recompute what reads it with --full-refresh."
    )


class UnusableFile(MsmError):
    message = "{file}: {why}."


class LoadRefused(MsmError):
    """Rows of a file that cannot be loaded; `errors` holds the first of them as {"row", "asset", "time", "column", "reason"}."""

    message = "{file}: {count} errors, so nothing was loaded. The first: {first}."


class CalendarNotFound(MsmError):
    message = (
        "calendar {calendar!r} is neither a stored calendar (unique_identifier, source_identifier) nor a pandas-market-calendars name. "
        "Create it with Calendar.create_from_pandas_calendar(...) or in the calendars section of the fleet file."
    )


class CalendarRangeError(MsmError):
    message = (
        "calendar {calendar} covers {valid_from}..{valid_to}, but {needed} is needed ({why}). Extend it with create_from_pandas_calendar."
    )


class EmptySchedule(MsmError):
    message = "calendar {calendar} has no session in {start}..{end}. Materialise its sessions with create_from_pandas_calendar."


class UnknownAssets(MsmError):
    message = "{owner}: {assets} not registered as assets. Register them (Asset.upsert), or remove them from the signal."


class MissingPrices(MsmError):
    """Assets that a portfolio needs and for which the source has no bar at all."""

    message = "{portfolio}: {source} has no {column} for {assets}. Load them, or remove them from the signal."


class MissingPrice(MsmError):
    """One needed cell has no bar that is fresh enough."""

    message = (
        "{portfolio}: no {column} of {asset} at {time} (last bar {last}, maximum_staleness {staleness}). "
        "Load the bar, or widen price_alignment_policy."
    )


class InvalidPrice(MsmError):
    message = "{portfolio}: {column} of {asset} at {time} is {value}; a price must be finite and above 0. Correct the source."


class InvalidInput(MsmError):
    message = "{owner}: {column} of {asset} at {time} in {source} is {value}, which is no usable number. Correct the source."


class UnexpectedAsset(MsmError):
    message = (
        "{owner}: {source} gives {asset} at {time} the weight {value}, but asset_list does not name it. "
        "Add it to asset_list, or remove the row."
    )


class RepeatedWeight(MsmError):
    message = "{owner}: {source} gives {asset} at {time} two weights, {value} and {other}. Remove one of the rows."


class FitFailed(MsmError):
    """An estimator found no weights, or none that are near enough to its own."""

    message = "signal {signal}: {estimator} found no weights at {time}: {why}. {remedy}."


class PackageMissing(MsmError):
    message = "{owner} needs {package}, which is not installed here: {remedy}."


class MisplacedBar(MsmError):
    message = (
        "{source}: the bar of {asset} at {time} belongs to no session of {calendar}: that of {date} is {opens} to {closes}. "
        "Stamp bars at the close of their session, register the source with time label session_date, or correct the asset's calendar."
    )


class MislabelledBar(MsmError):
    message = (
        "{source}: the bar of {asset} at {time} is stamped at no midnight, of UTC or of {timezone}. A source with time label session_date "
        "stamps each bar at 00:00 of its date; correct it, or register the source with time label close."
    )


class BarOffGrid(MsmError):
    message = (
        "{source}: the bar of {asset} at {time} is off the {cadence} grid of {calendar}, whose session opens at {opens}. "
        "Stamp bars at the end of their interval, or correct the cadence of the source or the asset's calendar."
    )


class RepeatedBar(MsmError):
    message = "{source}: {asset} has two bars for {time}. Its cadence is not {cadence}, or the source repeats itself: correct either."


class PriceGap(MsmError):
    """A gap under the rule `none`."""

    message = "{source}: {asset} lacks {count} bar(s): {times}. Load them, or choose the rule ffill."


class InvalidWeight(MsmError):
    message = "{owner}: weight of {asset} at {time} is {value}; a weight must be finite. Correct the signal."


class WeightOutOfBounds(MsmError):
    message = (
        "{portfolio}: the {what} wanted at {time} is {value}, outside {lowest}..{highest}. Correct the signal, or the limits of the "
        "rebalance strategy (violation: clip cuts to them)."
    )


class NoSuchEvent(MsmError):
    message = "calendar {calendar} has no event of type {event!r}; it has: {known}. Store them with CalendarEvent, or correct event_type."


class EmptyWindow(MsmError):
    message = (
        "{kind}: no valuation time of calendar {calendar} lies in {start}..{end} local time, so nothing would ever trade (its last session "
        "closes {last} after midnight). Correct rebalance_start and rebalance_end."
    )


class MissingRate(MsmError):
    message = "cash rate {rate} of {source} is not known for {time}. Load it, start the portfolio later, or widen the rate's forward_fill."


class InvalidValue(MsmError):
    message = (
        "{portfolio}: the value at {time} is {value}; it must be finite and above 0. Check leverage, prices and fees around that session."
    )


class ScopeUndetermined(MsmError):
    message = "{portfolio}: the signal names no assets, so the assets that bound its window are unknown. Give the signal a universe."


class StateLost(MsmError):
    message = "{portfolio}: progress says {watermark}, but the stored rows do not reach it. Compute it afresh with --full-refresh."


class InvalidFrame(MsmError):
    message = "{what}: {why}."


class IndexTaken(MsmError):
    message = "index {index} would be published by both {first} and {second}. Give each portfolio its own index."


# -- accounts -----------------------------------------------------------------------------------------------------------


class SnapshotRefused(MsmError):
    """Snapshots with rows that cannot be stored; `problems` holds every one as {"snapshot", "row", "field", "reason"}, rows from 0."""

    message = "{what}: {count} problems, so nothing was stored. The first: {first}."


class SnapshotExists(MsmError):
    message = "{what} of {owners} exist already. Pass overwrite=True (--overwrite) to replace them whole."


class SnapshotInUse(MsmError):
    message = (
        "holdings of {snapshots} are attributed to virtual funds ({funds}). Release those allocations first, then replace the snapshot."
    )


class TargetsRefused(MsmError):
    """Target rows that cannot be expanded; `problems` holds every one."""

    message = "{count} target rows cannot be expanded. The first: {first}."


class ResolverMissing(MsmError):
    message = "{count} targets are portfolios, and nothing says what they hold. Pass a resolver of their weights, such as CurrentWeights."


class UnresolvedPortfolios(MsmError):
    message = "no weights are known of portfolios {portfolios}. Run them up to that time, or take them out of the targets."


class CyclicPortfolios(MsmError):
    message = "portfolios hold each other: {cycle}. Break the cycle: no portfolio may hold itself."


class AllocationRefused(MsmError):
    """An allocation to virtual funds that cannot be; `problems` holds every reason."""

    message = "{what}: {count} problems, so nothing was allocated. The first: {first}."


# -- driver -------------------------------------------------------------------------------------------------------------


class CyclicPlan(MsmError):
    message = "the plan has a cycle: {cycle}. Break it: no portfolio may depend on itself."


class RayUnavailable(MsmError):
    message = "Ray did not start: {why}. {remedy}"


class TaskTimedOut(MsmError):
    message = "the task did not finish within {seconds} s. Raise --task-timeout or lower --batch-size."


class WorkerLost(MsmError):
    message = "the worker was lost: {why}. Run `msm-ray retry`; lower --batch-size if memory was the cause."


class TooFewConnections(MsmError):
    message = (
        "the database at {where} grants {left} more connections, and a run needs {needed}: one for a worker beside those of the driver. "
        "Close other clients, raise max_connections (or the limit of the role or the database), or connect through pgbouncer."
    )


class UnexpectedReply(MsmError):
    message = "the worker answered for {answered} nodes, not exactly for the {asked} that it was asked for. This is a fault of a node kind."


class StaleCode(MsmError):
    message = "the worker runs code version {worker}, the driver {driver}. Give every node the same installation."


class RunNotFound(MsmError):
    message = "the ledger has no run {run}. `msm-ray status` lists the recent ones."


class DependencyFailed(MsmError):
    message = "skipped: {upstream} failed. Repair that first, then `msm-ray retry`."


class NodeFailed(MsmError):
    """An error that msm did not foresee, told by its type and text."""

    message = "{type}: {text}"
