"""Delisted assets, and what rebalance strategies that take their time have still to do."""

import sqlalchemy as sa
from alembic import op

from msm_core.identity import physical_name as t

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        t("asset"),
        sa.Column("delisted_on", sa.Date(), nullable=True, comment="local date of its last trading day; null = it is listed"),
    )
    op.create_table(
        t("portfolio_rebalance_state"),
        sa.Column("portfolio_identifier", sa.String(255, collation="C"), nullable=False, comment="Portfolio.unique_identifier"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="watermark of the portfolio, UTC"),
        sa.Column("asset_identifier", sa.String(255, collation="C"), nullable=False, comment="Asset.unique_identifier"),
        sa.Column("target_weight", sa.Float(53), nullable=True, comment="weight that is still to be reached; null = nothing is to be done"),
        sa.Column("active_from", sa.DateTime(timezone=True), nullable=True, comment="instant from which the order is active, UTC"),
        sa.Column("used_weight", sa.Float(53), nullable=False, comment="sum of weight changes in the session of time_index"),
        sa.PrimaryKeyConstraint(
            "portfolio_identifier", "time_index", "asset_identifier", name=op.f(f"pk_{t('portfolio_rebalance_state')}")
        ),
    )
    op.alter_column(
        t("time_index_meta_table"), "kind", comment="such as prices, interpolated_prices, signal_weights, portfolio_weights, portfolios"
    )
    op.alter_column(t("data_node_update"), "kind", comment="kind of the storage: interpolated_prices, signal_weights, portfolios ...")


def downgrade() -> None:
    op.alter_column(
        t("data_node_update"), "kind", comment="interpolated_prices, signal_weights, portfolio_weights, portfolios or portfolio_index"
    )
    op.alter_column(
        t("time_index_meta_table"),
        "kind",
        comment="prices, interpolated_prices, signal_weights, portfolio_weights, portfolios or portfolio_index",
    )
    for table in ("data_node_update", "time_index_meta_table"):
        rows = sa.table(t(table), sa.column("kind"))
        op.execute(sa.delete(rows).where(rows.c.kind == "rebalance_state"))
    op.drop_table(t("portfolio_rebalance_state"))
    op.drop_column(t("asset"), "delisted_on")
