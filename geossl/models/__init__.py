"""Backbones: encoders from raw input to tokens or feature pyramids. No masking, no decoder, no loss."""

from geossl.models.factory import BACKBONES, FeatureInfo, create_backbone, list_backbones, load, save_backbone
from geossl.models.point_vit import PointViT, PointViTConfig

__all__ = ["BACKBONES", "FeatureInfo", "PointViT", "PointViTConfig", "create_backbone", "list_backbones", "load", "save_backbone"]
