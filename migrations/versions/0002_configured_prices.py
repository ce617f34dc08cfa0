"""Configured price storages: calendars of assets, the revision that made a table, room for names of price nodes in the ledger."""

import sqlalchemy as sa
from alembic import op

from msm_core.identity import physical_name as t

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        t("asset"),
        sa.Column(
            "calendar_uid",
            sa.Uuid(),
            sa.ForeignKey(t("calendar") + ".uid"),
            nullable=True,
            comment="calendar of its trading sessions; null = it trades around the clock, 24/7",
        ),
    )
    op.create_index(None, t("asset"), ["calendar_uid"], unique=False)
    op.add_column(
        t("time_index_meta_table"),
        sa.Column("revision", sa.Text(), nullable=True, comment="the Alembic operations that made the table of a configured storage"),
    )
    op.alter_column(
        t("time_index_meta_table"),
        "kind",
        comment="prices, interpolated_prices, signal_weights, portfolio_weights, portfolios or portfolio_index",
    )
    op.alter_column(
        t("data_node_update"), "kind", comment="interpolated_prices, signal_weights, portfolio_weights, portfolios or portfolio_index"
    )
    op.alter_column(t("run_node"), "kind", comment="prices, signal or portfolio")
    op.alter_column(
        t("run_node"),
        "identifier",
        type_=sa.String(512, collation="C"),
        comment="storage/asset_identifier, signal_uid or portfolio_identifier",
    )


def downgrade() -> None:
    run_node = sa.table(t("run_node"), sa.column("kind"))
    op.execute(sa.delete(run_node).where(run_node.c.kind == "prices"))
    op.alter_column(t("run_node"), "identifier", type_=sa.String(255, collation="C"), comment="signal_uid or portfolio_identifier")
    op.alter_column(t("run_node"), "kind", comment="signal or portfolio")
    op.alter_column(t("data_node_update"), "kind", comment="signal_weights, portfolio_weights, portfolios or portfolio_index")
    op.alter_column(t("time_index_meta_table"), "kind", comment="prices, signal_weights, portfolio_weights, portfolios or portfolio_index")
    op.drop_column(t("time_index_meta_table"), "revision")
    op.drop_index(op.f(f"ix_{t('asset')}_calendar_uid"), table_name=t("asset"))
    op.drop_column(t("asset"), "calendar_uid")
