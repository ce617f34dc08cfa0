"""Nodes: storage + scope + dependencies + update. Importing the package registers the kinds of price source."""

from msm_core.data_nodes import prices as prices
