"""Which tables this process may use: `start_engine` attaches them, once per database, and creates nothing.

Attachment belongs to a database, not to the process: rows always use the engine of the configured address, and if the address
changes, rows raise EngineNotStarted until `start_engine` has looked at the tables of the new one.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, Table

from msm_core.database import check_server, get_engine
from msm_core.errors import EngineNotStarted, NamespaceChanged, UnknownModel
from msm_core.identity import current_namespace
from msm_core.models import LOADED_NAMESPACE, MetaTable
from msm_core.storage import verify_prepared

Model = type[MetaTable]

_attached: dict[Engine, tuple[Model, ...]] = {}
_joined: ContextVar[Connection | None] = ContextVar("msm_joined_connection", default=None)


@dataclass(frozen=True)
class Runtime:
    """The engine of the configured database and the tables attached to it, every table after those it refers to."""

    engine: Engine
    models: tuple[Model, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.__concept__ for model in self.models)


def start_engine(models: Iterable[str | type] | str | None = None) -> Runtime:
    """Attach tables of the configured database, with all that their foreign keys need. Call it again to attach more.

    models  names ("Calendar", "ExternalPricesStorage"), row classes or table classes; None = every static table

    Creates nothing. Raises UnknownModel, NamespaceChanged, StorageNotPrepared (naming the tables), DatabaseNotConfigured,
    DatabaseUnavailable, UnsupportedDatabase.
    """
    if (namespace := current_namespace()) != LOADED_NAMESPACE:
        raise NamespaceChanged(loaded=LOADED_NAMESPACE, requested=namespace)
    if isinstance(models, str):
        models = [models]
    wanted = _static_models() if models is None else [_resolved(selector) for selector in models]
    engine = get_engine()
    ordered = _with_dependencies([*_attached.get(engine, ()), *wanted])
    check_server(engine)
    with engine.connect() as look:
        verify_prepared(look, ordered)
    _attached[engine] = ordered
    return Runtime(engine, ordered)


@contextmanager
def connection(*models: Model) -> Iterator[Connection]:
    """A transaction on the attached database, or the one opened by `one_transaction`. Raises EngineNotStarted."""
    engine = get_engine()
    attached = _attached.get(engine, ())
    if missing := [model.__concept__ for model in models if model not in attached]:
        raise EngineNotStarted(models=", ".join(missing), attached=", ".join(model.__concept__ for model in attached) or "none")
    joined = _joined.get()
    if joined is not None and joined.engine is engine:
        yield joined
    else:
        with engine.begin() as own:
            yield own


@contextmanager
def one_transaction(*models: Model) -> Iterator[Connection]:
    """All row operations inside land together, or none does. A refused operation ends it: let its error leave the block."""
    with connection(*models) as shared:
        token = _joined.set(shared)
        try:
            yield shared
        finally:
            _joined.reset(token)


# -- selection ------------------------------------------------------------------------------------------------------------------


def _static_models() -> list[Model]:
    """The tables of this package; storages that `prepare` derives at run time have a MetaData of their own."""
    models = [mapper.class_ for mapper in MetaTable.registry.mappers]
    return sorted((m for m in models if m.__table__.metadata is MetaTable.metadata), key=lambda m: m.__concept__)


def _resolved(selector: str | type) -> Model:
    if isinstance(selector, str):
        for model in _static_models():
            if selector in (model.__concept__, model.__name__, model.logical_name()):
                return model
    else:
        model = getattr(selector, "__model__", selector)  # a row class knows its table class
        if isinstance(model, type) and issubclass(model, MetaTable):
            return model
    known = ", ".join(model.__concept__ for model in _static_models())
    raise UnknownModel(model=selector if isinstance(selector, str) else repr(selector), known=known)


def _with_dependencies(models: Iterable[Model]) -> tuple[Model, ...]:
    """`models` and all that they refer to, a table after its targets; the order is the same in every process."""
    by_table = {mapper.local_table: mapper.class_ for mapper in MetaTable.registry.mappers}
    ordered: dict[Model, None] = {}

    def visit(model: Model) -> None:
        assert isinstance(model.__table__, Table)
        targets = {key.column.table for key in model.__table__.foreign_keys} - {model.__table__}
        for target in sorted(targets, key=lambda table: table.name):
            if by_table[target] not in ordered:
                visit(by_table[target])
        ordered.setdefault(model)

    for model in models:
        visit(model)
    return tuple(ordered)
