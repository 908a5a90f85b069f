"""Connectors: tower features [V, P, W] to image tokens [V, n, D] in the decoder's width.

One file and one row of `CONNECTORS` per kind (docs/add-a-connector.md). A connector does not depend
on the vision tower or the decoder.
"""

from __future__ import annotations

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.base import Connector
from visavis.model.connectors.merger import Merger
from visavis.model.connectors.mixture import MixtureMLP
from visavis.model.connectors.mlp import MLP, Identity
from visavis.model.connectors.pooled_projection import PooledProjection
from visavis.model.connectors.qformer import QFormer
from visavis.model.connectors.resampler import Resampler
from visavis.model.connectors.words import Words
from visavis.utils import lookup

CONNECTORS: dict[str, type[Connector]] = {
    "identity": Identity,
    "linear": MLP,
    "mlp": MLP,
    "merger": Merger,
    "pooled": PooledProjection,
    "mixture": MixtureMLP,
    "resampler": Resampler,
    "qformer": QFormer,
    "words": Words,
}


def build_connector(config: ConnectorConfig) -> Connector:
    """Return the (randomly initialised) connector that a config describes.

    Raises:
        UnknownNameError: no connector is of that kind.
    """
    return lookup("connector", config.kind, CONNECTORS)(config)


def connector_tokens(config: ConnectorConfig, num_patches: int) -> int:
    """Return the number of image tokens for a number of patches.

    Raises:
        UnknownNameError: no connector is of that kind.
    """
    return lookup("connector", config.kind, CONNECTORS).num_tokens(config, num_patches)
