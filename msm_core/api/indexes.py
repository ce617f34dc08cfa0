"""Index rows: under what name a portfolio's values may be published."""

from msm_core.api.base import Row
from msm_core.api.fields import Json
from msm_core.models import IndexTable, IndexTypeTable


class IndexType(Row, table=IndexTypeTable, key=("index_type",)):
    index_type: str
    display_name: str | None = None
    description: str | None = None
    metadata_json: Json | None = None


class Index(Row, table=IndexTable, key=("unique_identifier",)):
    """`unique_identifier` is the portfolio_index_identifier of the publication."""

    unique_identifier: str
    index_type: str
    display_name: str
    description: str | None = None
    metadata_json: Json | None = None
