"""Vision towers: pixels [N, 3, S, S] to patch features [N, P, W]."""

from __future__ import annotations

from torch import nn

from visavis.model.config import EfficientNetConfig, MixtureConfig, Qwen2VLTowerConfig, TowerConfig
from visavis.model.embedder_config import GemmaTowerConfig, NaFlexConfig


def build_tower(config: TowerConfig) -> nn.Module:
    """Return the (randomly initialised) tower that a config describes."""
    if isinstance(config, EfficientNetConfig):
        from visavis.model.vision.efficientnet import EfficientNetLite

        return EfficientNetLite(config)
    if isinstance(config, Qwen2VLTowerConfig) and config.class_token:
        from visavis.model.vision.rice import RiceTower

        return RiceTower(config)
    if isinstance(config, Qwen2VLTowerConfig):
        from visavis.model.vision.qwen2_vl import Qwen2VLTower

        return Qwen2VLTower(config)
    if isinstance(config, GemmaTowerConfig):
        from visavis.model.gemma_encoder import GemmaTower

        return GemmaTower(config)
    if isinstance(config, NaFlexConfig):
        from visavis.model.vision.naflex import NaFlexTower

        return NaFlexTower(config)
    if isinstance(config, MixtureConfig):
        from visavis.model.vision.vit import TowerMixture

        return TowerMixture(config)
    from visavis.model.vision.vit import ViT

    return ViT(config)
