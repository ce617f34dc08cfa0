"""The static schema: registry, catalogue and ledger, storages.

Constraint and index names follow the naming convention of the models, so they carry the namespace as the tables do.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from msm_core.identity import physical_name as t

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        t("asset"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key; asset_identifier in every storage"
        ),
        sa.Column("asset_type", sa.String(length=64), nullable=True, comment="type of the asset, for example equity"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("asset"), ["asset_type"], unique=False)
    op.create_table(
        t("asset_type"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("asset_type", sa.String(length=64), nullable=False, comment="business key, for example equity"),
        sa.Column("display_name", sa.String(length=255), nullable=True, comment="name for people"),
        sa.Column("description", sa.Text(), nullable=True, comment="what assets of this type are"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("asset_type"),
    )
    op.create_table(
        t("calendar"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key; calendar_key of a rebalance strategy"
        ),
        sa.Column("display_name", sa.String(length=255), nullable=False, comment="name for people"),
        sa.Column(
            "calendar_type", sa.String(length=64), nullable=False, comment="TRADING, SETTLEMENT, FIXING, BUSINESS, HOLIDAY, EVENT or CUSTOM"
        ),
        sa.Column("timezone", sa.String(length=64), server_default="UTC", nullable=False, comment="IANA zone of local dates"),
        sa.Column(
            "source", sa.String(length=128), nullable=True, comment="where the sessions came from, for example pandas_market_calendars"
        ),
        sa.Column(
            "source_identifier",
            sa.String(255, collation="C"),
            nullable=True,
            comment="name of the calendar at its source, for example NYSE",
        ),
        sa.Column("valid_from", sa.Date(), nullable=False, comment="first local date that is materialised"),
        sa.Column("valid_to", sa.Date(), nullable=False, comment="last local date that is materialised"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.CheckConstraint(
            "calendar_type IN ('TRADING','SETTLEMENT','FIXING','BUSINESS','HOLIDAY','EVENT','CUSTOM')", name="calendar_type"
        ),
        sa.CheckConstraint("valid_to >= valid_from", name="valid_range"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("calendar"), ["calendar_type"], unique=False)
    op.create_index(None, t("calendar"), ["source", "source_identifier"], unique=False)
    op.create_table(
        t("data_node_update"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("kind", sa.String(length=64), nullable=False, comment="signal_weights, portfolio_weights, portfolios or portfolio_index"),
        sa.Column("storage", sa.String(255, collation="C"), nullable=False, comment="logical identifier of the storage"),
        sa.Column("scope", sa.String(255, collation="C"), nullable=False, comment="value of the storage's scope column: whose rows"),
        sa.Column("configuration_hash", sa.String(length=64), nullable=True, comment="configuration that the rows were computed from"),
        sa.Column("watermark", sa.DateTime(timezone=True), nullable=True, comment="computed through this instant; null = nothing yet"),
        sa.Column(
            "epoch",
            sa.BigInteger(),
            server_default="0",
            nullable=False,
            comment="moves by one with each committed change: the fence against slow writers",
        ),
        sa.Column("row_count", sa.BigInteger(), server_default="0", nullable=False, comment="rows this scope holds"),
        sa.Column("input_digest", sa.String(length=64), nullable=True, comment="sha256 of what the last update read"),
        sa.Column("code_version", sa.String(length=32), nullable=True, comment="version of the kernel that computed the rows"),
        sa.Column("run_uid", sa.Uuid(), nullable=True, comment="run that moved it last"),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False, comment="when it moved last"),
        sa.CheckConstraint("epoch >= 0 AND row_count >= 0", name="counts"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("storage", "scope"),
    )
    op.create_table(
        t("external_prices"),
        sa.Column("asset_identifier", sa.String(255, collation="C"), nullable=False, comment="Asset.unique_identifier"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="end of the bar, UTC"),
        sa.Column("open_time", sa.DateTime(timezone=True), nullable=True, comment="start of the bar, UTC"),
        sa.Column("open", sa.Float(precision=53), nullable=True, comment="first price"),
        sa.Column("high", sa.Float(precision=53), nullable=True, comment="highest price"),
        sa.Column("low", sa.Float(precision=53), nullable=True, comment="lowest price"),
        sa.Column("close", sa.Float(precision=53), nullable=True, comment="last price"),
        sa.Column("volume", sa.Float(precision=53), nullable=True, comment="traded quantity, in the same share unit as the price"),
        sa.Column("trade_count", sa.Float(precision=53), nullable=True, comment="number of trades"),
        sa.Column("vwap", sa.Float(precision=53), nullable=True, comment="volume-weighted average price"),
        sa.Column("interpolated", sa.Boolean(), nullable=True, comment="made by an interpolation policy, not observed"),
        sa.PrimaryKeyConstraint("asset_identifier", "time_index"),
    )
    op.create_table(
        t("index"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "unique_identifier",
            sa.String(255, collation="C"),
            nullable=False,
            comment="business key; portfolio_index_identifier in the publication",
        ),
        sa.Column("index_type", sa.String(length=64), nullable=False, comment="type of the index, for example portfolio"),
        sa.Column("display_name", sa.String(length=255), nullable=False, comment="name for people"),
        sa.Column("description", sa.Text(), nullable=True, comment="what the index measures"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("index"), ["display_name"], unique=False)
    op.create_index(None, t("index"), ["index_type"], unique=False)
    op.create_table(
        t("index_type"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("index_type", sa.String(length=64), nullable=False, comment="business key, for example portfolio"),
        sa.Column("display_name", sa.String(length=255), nullable=True, comment="name for people"),
        sa.Column("description", sa.Text(), nullable=True, comment="what indexes of this type are"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("index_type"),
    )
    op.create_index(None, t("index_type"), ["display_name"], unique=False)
    op.create_table(
        t("portfolio_group"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key; tag:NAME selects its portfolios"
        ),
        sa.Column("display_name", sa.String(length=255), nullable=True, comment="name for people"),
        sa.Column("description", sa.Text(), nullable=True, comment="what the group gathers"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_table(
        t("portfolio_index_values"),
        sa.Column("portfolio_index_identifier", sa.String(255, collation="C"), nullable=False, comment="Index.unique_identifier"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="valuation time, UTC"),
        sa.Column("close", sa.Float(precision=53), nullable=False, comment="published value"),
        sa.Column("return", sa.Float(precision=53), nullable=False, comment="close / previous close - 1"),
        sa.Column("close_time", sa.DateTime(timezone=True), nullable=False, comment="the same instant as time_index"),
        sa.CheckConstraint("close > 0 AND close < 'Infinity'", name="positive"),
        sa.PrimaryKeyConstraint("portfolio_index_identifier", "time_index"),
    )
    op.create_table(
        t("portfolio_metadata"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "unique_identifier",
            sa.String(255, collation="C"),
            nullable=False,
            comment="unique_identifier of the portfolio; deliberately no foreign key",
        ),
        sa.Column("description", sa.Text(), nullable=True, comment="what the portfolio is for"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_table(
        t("portfolio_weights"),
        sa.Column("portfolio_identifier", sa.String(255, collation="C"), nullable=False, comment="Portfolio.unique_identifier"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="the event, UTC"),
        sa.Column("asset_identifier", sa.String(255, collation="C"), nullable=False, comment="Asset.unique_identifier"),
        sa.Column("weight", sa.Float(precision=53), nullable=False, comment="weight after the trade; 0 = sold"),
        sa.Column("weight_before", sa.Float(precision=53), nullable=False, comment="weight before the trade"),
        sa.Column("price_current", sa.Float(precision=53), nullable=True, comment="price traded at"),
        sa.Column(
            "price_before",
            sa.Float(precision=53),
            nullable=True,
            comment="price at the event that struck the position; null where there was none",
        ),
        sa.Column("volume_current", sa.Float(precision=53), nullable=True, comment="volume of the bar; null where the source has none"),
        sa.Column("volume_before", sa.Float(precision=53), nullable=True, comment="volume at the event that struck the position"),
        sa.CheckConstraint(
            "weight > '-Infinity' AND weight < 'Infinity' AND weight_before > '-Infinity' AND weight_before < 'Infinity'", name="finite"
        ),
        sa.PrimaryKeyConstraint("portfolio_identifier", "time_index", "asset_identifier"),
    )
    op.create_table(
        t("portfolios"),
        sa.Column("portfolio_identifier", sa.String(255, collation="C"), nullable=False, comment="Portfolio.unique_identifier"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="valuation time: a session close, UTC"),
        sa.Column("close", sa.Float(precision=53), nullable=False, comment="published value; starts from 1.0 before the first purchase"),
        sa.Column("return", sa.Float(precision=53), nullable=False, comment="close / previous close - 1, fees included"),
        sa.Column(
            "calculated_close",
            sa.Float(precision=53),
            nullable=False,
            comment="computed value, on which the recursion runs; differs from close under an override asset",
        ),
        sa.Column("close_time", sa.DateTime(timezone=True), nullable=False, comment="the same instant as time_index"),
        sa.CheckConstraint("close > 0 AND close < 'Infinity' AND calculated_close > 0 AND calculated_close < 'Infinity'", name="positive"),
        sa.PrimaryKeyConstraint("portfolio_identifier", "time_index"),
    )
    op.create_table(
        t("rebalance_strategy_metadata"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("rebalance_strategy_uid", sa.String(255, collation="C"), nullable=False, comment="identity of the rebalance strategy"),
        sa.Column("rebalance_strategy_description", sa.Text(), nullable=True, comment="explanation for people"),
        sa.Column("configuration_json", postgresql.JSONB(astext_type=sa.Text()), nullable=True, comment="the strategy's parameters"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("rebalance_strategy_uid"),
    )
    op.create_table(
        t("run"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("as_of", sa.DateTime(timezone=True), nullable=False, comment="nothing later than this instant is used"),
        sa.Column("status", sa.String(length=16), nullable=False, comment="running, landed, partial, failed or cancelled"),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="start, by the database's clock",
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True, comment="end; null while it runs, or if it was killed"),
        sa.Column("retry_of", sa.Uuid(), nullable=True, comment="first run of the chain that this one retries"),
        sa.Column(
            "arguments",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="{}",
            nullable=False,
            comment="selection, executor, batch size ...",
        ),
        sa.Column("summary", postgresql.JSONB(astext_type=sa.Text()), nullable=True, comment="counts and seconds"),
        sa.Column("code_version", sa.String(length=255), nullable=False, comment="versions of msm, its kernels and numpy"),
        sa.Column("submitter", sa.String(length=255), nullable=True, comment="user and host"),
        sa.PrimaryKeyConstraint("uid"),
    )
    op.create_index(None, t("run"), ["retry_of"], unique=False)
    op.create_index(None, t("run"), ["started_at"], unique=False)
    op.create_index(None, t("run"), ["status"], unique=False)
    op.create_table(
        t("signal_metadata"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "signal_uid", sa.String(255, collation="C"), nullable=False, comment="identity of the signal; signal_uid in SignalWeights"
        ),
        sa.Column("signal_description", sa.Text(), nullable=True, comment="name or explanation for people"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("signal_uid"),
    )
    op.create_table(
        t("signal_weights"),
        sa.Column("signal_uid", sa.String(255, collation="C"), nullable=False, comment="identity of the signal"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="emission: the vector is known from here on, UTC"),
        sa.Column("asset_identifier", sa.String(255, collation="C"), nullable=False, comment="Asset.unique_identifier"),
        sa.Column("signal_weight", sa.Float(precision=53), nullable=False, comment="target weight; negative is short"),
        sa.CheckConstraint("signal_weight > '-Infinity' AND signal_weight < 'Infinity'", name="finite"),
        sa.PrimaryKeyConstraint("signal_uid", "time_index", "asset_identifier"),
    )
    op.create_table(
        t("time_index_meta_table"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("identifier", sa.String(255, collation="C"), nullable=False, comment="logical identifier, namespace included"),
        sa.Column("namespace", sa.String(length=31), server_default="", nullable=False, comment="namespace, empty for the default one"),
        sa.Column(
            "physical_table_name",
            sa.String(255, collation="C"),
            nullable=False,
            comment="table in the database, schema-qualified where it needs to be",
        ),
        sa.Column(
            "kind", sa.String(length=64), nullable=False, comment="prices, signal_weights, portfolio_weights, portfolios or portfolio_index"
        ),
        sa.Column("cadence", sa.String(length=16), nullable=True, comment="length of a bar: 1d, 5m; null where rows come as they come"),
        sa.Column(
            "time_label",
            sa.String(length=16),
            server_default="close",
            nullable=False,
            comment="close: a bar is stamped at its end; session_date: at 00:00 of its local date",
        ),
        sa.Column(
            "identity_components",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default="{}",
            nullable=False,
            comment="what the identity of a configured storage is made of",
        ),
        sa.Column("schema_fingerprint", sa.String(length=64), nullable=False, comment="digest of column names and types when registered"),
        sa.Column("description", sa.Text(), nullable=True, comment="what the storage holds"),
        sa.CheckConstraint("time_label IN ('close','session_date')", name="time_label"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("identifier"),
    )
    op.create_table(
        t("calendar_date"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("calendar_uid", sa.Uuid(), nullable=False, comment="the calendar"),
        sa.Column("local_date", sa.Date(), nullable=False, comment="date in the calendar's zone"),
        sa.Column("is_business_day", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="a session is scheduled"),
        sa.Column("is_holiday", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="a weekday without a session"),
        sa.Column("is_weekend", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="Saturday or Sunday"),
        sa.Column("is_early_close", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="the session closes early"),
        sa.Column("holiday_name", sa.String(length=255), nullable=True, comment="name of the holiday, where known"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.ForeignKeyConstraint(["calendar_uid"], [t("calendar") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("calendar_uid", "local_date"),
    )
    op.create_index(None, t("calendar_date"), ["calendar_uid", "is_business_day"], unique=False)
    op.create_index(None, t("calendar_date"), ["local_date"], unique=False)
    op.create_table(
        t("calendar_event"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("calendar_uid", sa.Uuid(), nullable=False, comment="the calendar"),
        sa.Column("event_date", sa.Date(), nullable=True, comment="local date of the event"),
        sa.Column("event_time", sa.DateTime(timezone=True), nullable=True, comment="instant of the event, UTC"),
        sa.Column("event_type", sa.String(length=64), nullable=False, comment="for example rebalance, expiry, announcement"),
        sa.Column("event_label", sa.String(length=255), server_default="", nullable=False, comment="which one of several"),
        sa.Column(
            "target_type", sa.String(length=64), server_default="", nullable=False, comment="kind of row the event is about, or empty"
        ),
        sa.Column("target_uid", sa.Uuid(), nullable=True, comment="row the event is about"),
        sa.Column(
            "target_identifier",
            sa.String(255, collation="C"),
            server_default="",
            nullable=False,
            comment="unique_identifier of that row, or empty",
        ),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.ForeignKeyConstraint(["calendar_uid"], [t("calendar") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint(
            "calendar_uid",
            "event_date",
            "event_type",
            "event_label",
            "target_type",
            "target_identifier",
            postgresql_nulls_not_distinct=True,
        ),
    )
    op.create_table(
        t("calendar_session"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("calendar_uid", sa.Uuid(), nullable=False, comment="the calendar"),
        sa.Column("local_date", sa.Date(), nullable=False, comment="date in the calendar's zone"),
        sa.Column(
            "session_label", sa.String(length=64), server_default="regular", nullable=False, comment="regular, or a venue's own name"
        ),
        sa.Column("opens_at", sa.DateTime(timezone=True), nullable=True, comment="opening instant, UTC"),
        sa.Column("closes_at", sa.DateTime(timezone=True), nullable=True, comment="closing instant, UTC: a valuation time"),
        sa.Column("timezone", sa.String(length=64), server_default="UTC", nullable=False, comment="IANA zone of the session"),
        sa.Column(
            "is_primary", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="portfolios are valued on primary sessions"
        ),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.CheckConstraint("closes_at > opens_at", name="closes_after_open"),
        sa.ForeignKeyConstraint(["calendar_uid"], [t("calendar") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("calendar_uid", "local_date", "session_label"),
    )
    op.create_table(
        t("portfolio"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column(
            "unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key; portfolio_identifier in the storages"
        ),
        sa.Column("calendar_name", sa.String(255, collation="C"), nullable=True, comment="deprecated: use calendar_uid"),
        sa.Column("calendar_uid", sa.Uuid(), nullable=True, comment="calendar whose sessions value the portfolio"),
        sa.Column("portfolio_index_uid", sa.Uuid(), nullable=True, comment="index under which its values are published, if any"),
        sa.Column("portfolio_weights_data_node_uid", sa.Uuid(), nullable=True, comment="producer of its weights"),
        sa.Column("signal_weights_data_node_uid", sa.Uuid(), nullable=True, comment="producer of its signal"),
        sa.Column("portfolio_data_node_uid", sa.Uuid(), nullable=True, comment="producer of its values"),
        sa.Column(
            "backtest_table_price_column_name",
            sa.String(length=63),
            server_default="close",
            nullable=False,
            comment="price column that drives its returns",
        ),
        sa.ForeignKeyConstraint(["calendar_uid"], [t("calendar") + ".uid"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["portfolio_data_node_uid"], [t("data_node_update") + ".uid"], ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["portfolio_index_uid"], [t("index") + ".uid"], ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["portfolio_weights_data_node_uid"], [t("data_node_update") + ".uid"], ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["signal_weights_data_node_uid"], [t("data_node_update") + ".uid"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("portfolio"), ["calendar_name"], unique=False)
    op.create_index(None, t("portfolio"), ["calendar_uid"], unique=False)
    op.create_index(None, t("portfolio"), ["portfolio_index_uid"], unique=False)
    op.create_table(
        t("run_node"),
        sa.Column("run_uid", sa.Uuid(), nullable=False, comment="the run"),
        sa.Column("node_uid", sa.Uuid(), nullable=False, comment="progress row of the node"),
        sa.Column("kind", sa.String(length=64), nullable=False, comment="signal or portfolio"),
        sa.Column("identifier", sa.String(255, collation="C"), nullable=False, comment="signal_uid or portfolio_identifier"),
        sa.Column("status", sa.String(length=16), nullable=False, comment="landed, up_to_date, failed, skipped or busy"),
        sa.Column("reason", sa.String(length=64), nullable=False, comment="why the node was in the plan"),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True, comment="reason and message of a failure"),
        sa.Column("row_count", sa.BigInteger(), server_default="0", nullable=False, comment="rows written"),
        sa.Column("watermark", sa.DateTime(timezone=True), nullable=True, comment="computed through this instant afterwards"),
        sa.Column("attempts", sa.Integer(), server_default="1", nullable=False, comment="times the node was tried"),
        sa.Column("seconds", sa.Float(precision=53), server_default="0", nullable=False, comment="share of its batch's time"),
        sa.Column(
            "recorded_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="when the result was recorded",
        ),
        sa.ForeignKeyConstraint(["run_uid"], [t("run") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_uid", "node_uid"),
    )
    op.create_index(None, t("run_node"), ["node_uid", "recorded_at"], unique=False)
    op.create_table(
        t("portfolio_configuration"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("portfolio_uid", sa.Uuid(), nullable=False, comment="the portfolio"),
        sa.Column("version", sa.Integer(), nullable=False, comment="1, 2, 3 ..."),
        sa.Column(
            "configuration_hash", sa.String(length=64), nullable=False, comment="identity of what changes numbers; display text is outside"
        ),
        sa.Column("signal_uid", sa.String(255, collation="C"), nullable=False, comment="identity of the signal it follows"),
        sa.Column(
            "configuration", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="the whole configuration, as validated"
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="when this version was stored",
        ),
        sa.ForeignKeyConstraint(["portfolio_uid"], [t("portfolio") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("portfolio_uid", "version"),
    )
    op.create_index(None, t("portfolio_configuration"), ["configuration_hash"], unique=False)
    op.create_index(None, t("portfolio_configuration"), ["signal_uid"], unique=False)
    op.create_table(
        t("portfolio_group_membership"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("portfolio_group_uid", sa.Uuid(), nullable=False, comment="the group"),
        sa.Column("portfolio_uid", sa.Uuid(), nullable=False, comment="the portfolio"),
        sa.ForeignKeyConstraint(["portfolio_group_uid"], [t("portfolio_group") + ".uid"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["portfolio_uid"], [t("portfolio") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("portfolio_group_uid", "portfolio_uid"),
    )
    op.create_index(None, t("portfolio_group_membership"), ["portfolio_group_uid"], unique=False)
    op.create_index(None, t("portfolio_group_membership"), ["portfolio_uid"], unique=False)


def downgrade() -> None:
    op.drop_table(t("portfolio_group_membership"))
    op.drop_table(t("portfolio_configuration"))
    op.drop_table(t("run_node"))
    op.drop_table(t("portfolio"))
    op.drop_table(t("calendar_session"))
    op.drop_table(t("calendar_event"))
    op.drop_table(t("calendar_date"))
    op.drop_table(t("time_index_meta_table"))
    op.drop_table(t("signal_weights"))
    op.drop_table(t("signal_metadata"))
    op.drop_table(t("run"))
    op.drop_table(t("rebalance_strategy_metadata"))
    op.drop_table(t("portfolios"))
    op.drop_table(t("portfolio_weights"))
    op.drop_table(t("portfolio_metadata"))
    op.drop_table(t("portfolio_index_values"))
    op.drop_table(t("portfolio_group"))
    op.drop_table(t("index_type"))
    op.drop_table(t("index"))
    op.drop_table(t("external_prices"))
    op.drop_table(t("data_node_update"))
    op.drop_table(t("calendar"))
    op.drop_table(t("asset_type"))
    op.drop_table(t("asset"))
