"""Asset rows: what prices are keyed by. Facts of one kind of asset live in tables of their own."""

import uuid
from datetime import date

from msm_core.api.base import Row
from msm_core.api.fields import Json
from msm_core.models import AssetTable, AssetTypeTable


class AssetType(Row, table=AssetTypeTable, key=("asset_type",)):
    asset_type: str
    display_name: str | None = None
    description: str | None = None
    metadata_json: Json | None = None


class Asset(Row, table=AssetTable, key=("unique_identifier",)):
    """`unique_identifier` is the asset_identifier of every storage.

    calendar_uid  the stored calendar whose sessions the asset trades in, which interpolation goes by; None = 24/7
    delisted_on   local date of its last trading day: portfolios sell it at its last price in the next session, and wait for it no more
    """

    unique_identifier: str
    asset_type: str | None = None
    calendar_uid: uuid.UUID | None = None
    delisted_on: date | None = None
