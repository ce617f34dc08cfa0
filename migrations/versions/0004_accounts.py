"""Accounts: registry, target positions, holdings, virtual funds."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from msm_core.identity import physical_name as t

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

SNAPSHOT_KINDS = ("target_positions", "account_holdings", "virtual_fund_holdings")


def upgrade() -> None:
    op.create_table(
        t("account_allocation_model"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("allocation_model_name", sa.String(length=100), nullable=False, comment="business key"),
        sa.Column("allocation_model_description", sa.Text(), nullable=True, comment="how accounts of the model are allocated"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("allocation_model_name"),
    )
    op.create_table(
        t("account_group"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("group_name", sa.String(length=100), nullable=False, comment="business key"),
        sa.Column("group_description", sa.Text(), nullable=True, comment="what the group gathers"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("group_name"),
    )
    op.create_table(
        t("account"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key"),
        sa.Column("account_name", sa.String(length=255), nullable=False, comment="name for people"),
        sa.Column("is_paper", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="it holds no real money"),
        sa.Column("account_is_active", sa.Boolean(), server_default=sa.text("false"), nullable=False, comment="it may be traded"),
        sa.Column("account_group_uid", sa.Uuid(), nullable=True, comment="the group, if any"),
        sa.Column("holdings_data_node_uid", sa.Uuid(), nullable=True, comment="producer of its holdings"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.ForeignKeyConstraint(["account_group_uid"], [t("account_group") + ".uid"], ondelete="SET NULL"),
        sa.ForeignKeyConstraint(["holdings_data_node_uid"], [t("data_node_update") + ".uid"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("account"), ["account_group_uid"], unique=False)
    op.create_index(None, t("account"), ["account_is_active"], unique=False)
    op.create_index(None, t("account"), ["account_name"], unique=False)
    op.create_table(
        t("account_holdings_set"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("account_uid", sa.Uuid(), nullable=False, comment="the account"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="when it was so, UTC"),
        sa.Column("source_data_node_uid", sa.Uuid(), nullable=True, comment="producer of the snapshot"),
        sa.ForeignKeyConstraint(["account_uid"], [t("account") + ".uid"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["source_data_node_uid"], [t("data_node_update") + ".uid"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("account_uid", "time_index"),
        sa.UniqueConstraint("uid", "account_uid", "time_index"),
    )
    op.create_table(
        t("account_target_allocation"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key"),
        sa.Column("account_uid", sa.Uuid(), nullable=False, comment="the account"),
        sa.Column("account_allocation_model_uid", sa.Uuid(), nullable=False, comment="the model it follows"),
        sa.Column("display_name", sa.String(length=255), nullable=True, comment="name for people"),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False, comment="its target positions are in force"),
        sa.Column("source", sa.String(length=255), nullable=True, comment="who decided it"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.ForeignKeyConstraint(["account_allocation_model_uid"], [t("account_allocation_model") + ".uid"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["account_uid"], [t("account") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("uid", "account_uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("account_target_allocation"), ["account_allocation_model_uid"], unique=False)
    op.create_index(None, t("account_target_allocation"), ["account_uid"], unique=False)
    op.create_index(None, t("account_target_allocation"), ["is_active"], unique=False)
    op.create_table(
        t("account_holdings"),
        sa.Column("account_uid", sa.Uuid(), nullable=False, comment="the account"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="when it was so, UTC"),
        sa.Column("asset_identifier", sa.String(255, collation="C"), nullable=False, comment="Asset.unique_identifier"),
        sa.Column("holdings_set_uid", sa.Uuid(), nullable=False, comment="the snapshot"),
        sa.Column("quantity", sa.Float(precision=53), nullable=False, comment="units held, above 0; direction has the sign"),
        sa.Column("direction", sa.SmallInteger(), server_default="1", nullable=False, comment="1 = long, -1 = short"),
        sa.Column("is_trade_snapshot", sa.Boolean(), nullable=True, comment="taken for a trade"),
        sa.Column("target_trade_time", sa.DateTime(timezone=True), nullable=True, comment="when that trade was due, UTC"),
        sa.Column("extra_details", postgresql.JSONB(astext_type=sa.Text()), nullable=True, comment="free descriptive facts"),
        sa.CheckConstraint("quantity > 0 AND quantity < 'Infinity'", name="positive"),
        sa.CheckConstraint("direction IN (1, -1)", name="direction"),
        sa.ForeignKeyConstraint(["account_uid"], [t("account") + ".uid"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["asset_identifier"], [t("asset") + ".unique_identifier"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(
            ["holdings_set_uid", "account_uid", "time_index"],
            [t("account_holdings_set") + ".uid", t("account_holdings_set") + ".account_uid", t("account_holdings_set") + ".time_index"],
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("account_uid", "time_index", "asset_identifier"),
        sa.UniqueConstraint("holdings_set_uid", "asset_identifier", "direction"),
    )
    op.create_index(None, t("account_holdings"), ["asset_identifier"], unique=False)
    op.create_table(
        t("position_set"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("account_target_allocation_uid", sa.Uuid(), nullable=False, comment="the allocation"),
        sa.Column("position_set_time", sa.DateTime(timezone=True), nullable=False, comment="from here on these are the targets, UTC"),
        sa.Column("source", sa.String(length=255), nullable=True, comment="who decided them"),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.ForeignKeyConstraint(["account_target_allocation_uid"], [t("account_target_allocation") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("account_target_allocation_uid", "position_set_time"),
        sa.UniqueConstraint("uid", "position_set_time"),
    )
    op.create_table(
        t("virtual_fund"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("unique_identifier", sa.String(255, collation="C"), nullable=False, comment="business key"),
        sa.Column("account_uid", sa.Uuid(), nullable=False, comment="account whose holdings it views"),
        sa.Column("target_portfolio_uid", sa.Uuid(), nullable=False, comment="portfolio that it follows"),
        sa.Column(
            "account_target_allocation_uid", sa.Uuid(), nullable=True, comment="allocation of the same account that asks for it, if any"
        ),
        sa.ForeignKeyConstraint(
            ["account_target_allocation_uid", "account_uid"],
            [t("account_target_allocation") + ".uid", t("account_target_allocation") + ".account_uid"],
        ),
        sa.ForeignKeyConstraint(["account_uid"], [t("account") + ".uid"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["target_portfolio_uid"], [t("portfolio") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("uid", "account_uid"),
        sa.UniqueConstraint("unique_identifier"),
    )
    op.create_index(None, t("virtual_fund"), ["account_target_allocation_uid"], unique=False)
    op.create_index(None, t("virtual_fund"), ["account_uid"], unique=False)
    op.create_index(None, t("virtual_fund"), ["target_portfolio_uid"], unique=False)
    op.create_table(
        t("target_positions"),
        sa.Column("position_set_uid", sa.Uuid(), nullable=False, comment="the snapshot"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="its position_set_time, UTC"),
        sa.Column("target_type", sa.String(length=32), nullable=False, comment="asset or portfolio"),
        sa.Column("target_uid", sa.Uuid(), nullable=False, comment="asset_uid or portfolio_uid, whichever it is"),
        sa.Column("asset_uid", sa.Uuid(), nullable=True, comment="the asset"),
        sa.Column("portfolio_uid", sa.Uuid(), nullable=True, comment="the portfolio"),
        sa.Column(
            "weight_notional_exposure",
            sa.Float(precision=53),
            nullable=True,
            comment="fraction of the account's notional; negative is short",
        ),
        sa.Column("constant_notional_exposure", sa.Float(precision=53), nullable=True, comment="amount of money; negative is short"),
        sa.Column(
            "single_asset_quantity",
            sa.Float(precision=53),
            nullable=True,
            comment="units of the asset; negative is short; never of a portfolio",
        ),
        sa.Column(
            "metadata_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="free descriptive facts; never part of an identity",
        ),
        sa.CheckConstraint(
            "(target_type = 'asset' AND asset_uid IS NOT NULL AND portfolio_uid IS NULL AND target_uid = asset_uid) OR "
            "(target_type = 'portfolio' AND portfolio_uid IS NOT NULL AND asset_uid IS NULL AND target_uid = portfolio_uid)",
            name="one_target",
        ),
        sa.CheckConstraint("target_type = 'asset' OR single_asset_quantity IS NULL", name="quantity_of_assets_only"),
        sa.CheckConstraint("target_type IN ('asset', 'portfolio')", name="target_type"),
        sa.CheckConstraint(
            "weight_notional_exposure > '-Infinity' AND weight_notional_exposure < 'Infinity' AND "
            "constant_notional_exposure > '-Infinity' AND constant_notional_exposure < 'Infinity' AND "
            "single_asset_quantity > '-Infinity' AND single_asset_quantity < 'Infinity'",
            name="finite",
        ),
        sa.CheckConstraint(
            "num_nonnulls(weight_notional_exposure, constant_notional_exposure, single_asset_quantity) = 1", name="one_exposure"
        ),
        sa.ForeignKeyConstraint(["asset_uid"], [t("asset") + ".uid"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["portfolio_uid"], [t("portfolio") + ".uid"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(
            ["position_set_uid", "time_index"], [t("position_set") + ".uid", t("position_set") + ".position_set_time"], ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("position_set_uid", "time_index", "target_type", "target_uid"),
    )
    op.create_index(None, t("target_positions"), ["asset_uid"], unique=False)
    op.create_index(None, t("target_positions"), ["portfolio_uid"], unique=False)
    op.create_table(
        t("virtual_fund_holdings_set"),
        sa.Column("uid", sa.Uuid(), nullable=False, comment="made by the client; stable for the life of the row"),
        sa.Column("virtual_fund_uid", sa.Uuid(), nullable=False, comment="the fund"),
        sa.Column("source_account_holdings_set_uid", sa.Uuid(), nullable=False, comment="the snapshot that it is a view of"),
        sa.Column("account_uid", sa.Uuid(), nullable=False, comment="account of both"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="time of that snapshot, UTC"),
        sa.ForeignKeyConstraint(
            ["source_account_holdings_set_uid", "account_uid", "time_index"],
            [t("account_holdings_set") + ".uid", t("account_holdings_set") + ".account_uid", t("account_holdings_set") + ".time_index"],
            ondelete="RESTRICT",
        ),
        sa.ForeignKeyConstraint(
            ["virtual_fund_uid", "account_uid"], [t("virtual_fund") + ".uid", t("virtual_fund") + ".account_uid"], ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("uid"),
        sa.UniqueConstraint("uid", "virtual_fund_uid", "source_account_holdings_set_uid", "time_index"),
        sa.UniqueConstraint("virtual_fund_uid", "source_account_holdings_set_uid"),
    )
    op.create_index(None, t("virtual_fund_holdings_set"), ["source_account_holdings_set_uid"], unique=False)
    op.create_table(
        t("virtual_fund_holdings"),
        sa.Column("virtual_fund_uid", sa.Uuid(), nullable=False, comment="the fund"),
        sa.Column("time_index", sa.DateTime(timezone=True), nullable=False, comment="time of the source snapshot, UTC"),
        sa.Column("asset_identifier", sa.String(255, collation="C"), nullable=False, comment="Asset.unique_identifier"),
        sa.Column("virtual_fund_holdings_set_uid", sa.Uuid(), nullable=False, comment="the allocation view"),
        sa.Column("source_account_holdings_set_uid", sa.Uuid(), nullable=False, comment="the snapshot that it is of"),
        sa.Column(
            "allocated_quantity", sa.Float(precision=53), nullable=False, comment="units attributed, above 0; direction has the sign"
        ),
        sa.Column("direction", sa.SmallInteger(), server_default="1", nullable=False, comment="1 = long, -1 = short"),
        sa.Column(
            "allocation_strategy",
            sa.String(length=64),
            server_default="explicit",
            nullable=False,
            comment="explicit, proportional_attribution or strict_feasible",
        ),
        sa.Column("target_trade_time", sa.DateTime(timezone=True), nullable=True, comment="when the trade that it is for is due, UTC"),
        sa.Column("extra_details", postgresql.JSONB(astext_type=sa.Text()), nullable=True, comment="free descriptive facts"),
        sa.CheckConstraint("allocated_quantity > 0 AND allocated_quantity < 'Infinity'", name="positive"),
        sa.CheckConstraint("direction IN (1, -1)", name="direction"),
        sa.ForeignKeyConstraint(["asset_identifier"], [t("asset") + ".unique_identifier"], ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(
            ["source_account_holdings_set_uid", "asset_identifier", "direction"],
            [
                t("account_holdings") + ".holdings_set_uid",
                t("account_holdings") + ".asset_identifier",
                t("account_holdings") + ".direction",
            ],
            ondelete="RESTRICT",
        ),
        sa.ForeignKeyConstraint(
            ["virtual_fund_holdings_set_uid", "virtual_fund_uid", "source_account_holdings_set_uid", "time_index"],
            [
                t("virtual_fund_holdings_set") + ".uid",
                t("virtual_fund_holdings_set") + ".virtual_fund_uid",
                t("virtual_fund_holdings_set") + ".source_account_holdings_set_uid",
                t("virtual_fund_holdings_set") + ".time_index",
            ],
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(["virtual_fund_uid"], [t("virtual_fund") + ".uid"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("virtual_fund_uid", "time_index", "asset_identifier"),
    )
    op.create_index(None, t("virtual_fund_holdings"), ["asset_identifier"], unique=False)
    op.create_index(None, t("virtual_fund_holdings"), ["source_account_holdings_set_uid", "asset_identifier", "direction"], unique=False)
    op.create_index(None, t("virtual_fund_holdings"), ["virtual_fund_holdings_set_uid"], unique=False)


def downgrade() -> None:
    catalogue = sa.table(t("time_index_meta_table"), sa.column("kind"))
    op.execute(sa.delete(catalogue).where(catalogue.c.kind.in_(SNAPSHOT_KINDS)))
    op.drop_table(t("virtual_fund_holdings"))
    op.drop_table(t("virtual_fund_holdings_set"))
    op.drop_table(t("target_positions"))
    op.drop_table(t("virtual_fund"))
    op.drop_table(t("position_set"))
    op.drop_table(t("account_holdings"))
    op.drop_table(t("account_target_allocation"))
    op.drop_table(t("account_holdings_set"))
    op.drop_table(t("account"))
    op.drop_table(t("account_group"))
    op.drop_table(t("account_allocation_model"))
