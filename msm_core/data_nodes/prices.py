"""Price sources as nodes: `APIDataNode` points at anyone's registered storage."""

from typing import Literal
from uuid import UUID

from msm_core.configuration import PRICE_SOURCES, PriceSource


@PRICE_SOURCES.register
class APIDataNode(PriceSource):
    """A node that only points: a storage in the catalogue, written by whoever writes it."""

    kind: Literal["api_data_node"] = "api_data_node"
    time_index_meta_table_uid: UUID

    @property
    def source_uid(self) -> UUID:
        return self.time_index_meta_table_uid
