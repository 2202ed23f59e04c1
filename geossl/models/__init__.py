"""Backbones: encoders from raw input to tokens or feature pyramids. No masking, no decoder, no loss."""

from geossl.models.cloud_teacher import CloudOutput, CloudTeacher, TeacherPoints, TeacherStore
from geossl.models.croco_files import load_pair_backbone, save_pair_backbone
from geossl.models.croco_vit import CroCoDecoder, CroCoDecoderConfig, CroCoPair, CroCoViT, CroCoViTConfig
from geossl.models.factory import BACKBONES, FeatureInfo, create_backbone, list_backbones, load, save_backbone
from geossl.models.point_m2ae import PointM2AEEncoder, PointM2AEEncoderConfig
from geossl.models.point_vit import PointViT, PointViTConfig
from geossl.models.point_vit_volume import VolumeGroups, VolumePointViT, VolumePointViTConfig
from geossl.models.teachers import Teacher, TeacherConfig, TeacherOutput, list_teachers

__all__ = [
    "BACKBONES",
    "CloudOutput",
    "CloudTeacher",
    "CroCoDecoder",
    "CroCoDecoderConfig",
    "CroCoPair",
    "CroCoViT",
    "CroCoViTConfig",
    "FeatureInfo",
    "PointM2AEEncoder",
    "PointM2AEEncoderConfig",
    "PointViT",
    "PointViTConfig",
    "Teacher",
    "TeacherConfig",
    "TeacherOutput",
    "TeacherPoints",
    "TeacherStore",
    "VolumeGroups",
    "VolumePointViT",
    "VolumePointViTConfig",
    "create_backbone",
    "list_backbones",
    "list_teachers",
    "load",
    "load_pair_backbone",
    "save_backbone",
    "save_pair_backbone",
]
