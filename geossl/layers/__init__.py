"""Shared layers: attention, the transformer block, token embeddings, position codes, masks, the DPT head, pictures and points.

They know nothing of models or methods.
"""

from geossl.layers.attention import Attention, CrossAttention, Segments, scaled_dot_product
from geossl.layers.block import Block, BlockStack, CrossBlock, init_transformer_weights, run_block
from geossl.layers.dpt import DPTHead
from geossl.layers.gathered_regression import gathered_regression_loss
from geossl.layers.image_metrics import l1, psnr, ssim
from geossl.layers.lifting import LiftedFeatures, lift_features, visible_in
from geossl.layers.masking import block_mask, random_mask, weighted_mask
from geossl.layers.norm import BatchNorm, BatchwideNorm, share_of_rows
from geossl.layers.packed_token_embedding import PackedTokenEmbedding
from geossl.layers.position import PositionMLP
from geossl.layers.projection import ProjectedViews, ViewFrames, back_project, fit_views, project_views, splat_depth
from geossl.layers.sampling import BatchRandom
from geossl.layers.token_embedding import PointTokenEmbedding
from geossl.layers.token_propagation import TokenPropagation
from geossl.layers.volume_tokens import TOKENIZERS, VolumeTokenizer, VolumeTokens

__all__ = [
    "TOKENIZERS",
    "Attention",
    "BatchNorm",
    "BatchRandom",
    "BatchwideNorm",
    "Block",
    "BlockStack",
    "CrossAttention",
    "CrossBlock",
    "DPTHead",
    "LiftedFeatures",
    "PackedTokenEmbedding",
    "PointTokenEmbedding",
    "PositionMLP",
    "ProjectedViews",
    "Segments",
    "TokenPropagation",
    "ViewFrames",
    "VolumeTokenizer",
    "VolumeTokens",
    "back_project",
    "block_mask",
    "fit_views",
    "gathered_regression_loss",
    "init_transformer_weights",
    "l1",
    "lift_features",
    "project_views",
    "psnr",
    "random_mask",
    "run_block",
    "scaled_dot_product",
    "share_of_rows",
    "splat_depth",
    "ssim",
    "visible_in",
    "weighted_mask",
]
