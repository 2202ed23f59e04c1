"""Data sets of point clouds, their augmentation, and the loader that turns them into batches.

``DATASETS.config("objects").build("train")`` gives a data set; :func:`build_loader` gives batches of it; :func:`read_points` reads
any single file. The files are named for what they hold: ``objects``, ``shapenet``, ``modelnet``, ``scanobjectnn``, ``folder``, ``shards``.
"""

from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.folder import FileOptions, FolderConfig
from geossl.data.gaussian_ply import read_gaussians, write_gaussians
from geossl.data.loader import Loader, build_loader
from geossl.data.modelnet import ModelNet40Config
from geossl.data.objects import ObjectLibrary, ObjectsConfig, load_objects
from geossl.data.readers import read_points
from geossl.data.sample import PointCloud, Sample, collate
from geossl.data.scanobjectnn import ScanObjectNNConfig
from geossl.data.shapenet import ShapeNet55Config
from geossl.data.shards import ShardOptions, ShardsConfig, check_shards, write_shards
from geossl.data.splits import group_resplit

__all__ = [
    "DATASETS",
    "AugmentConfig",
    "FileOptions",
    "FolderConfig",
    "Loader",
    "ModelNet40Config",
    "ObjectLibrary",
    "ObjectsConfig",
    "PointCloud",
    "PointDataConfig",
    "PointDataset",
    "Sample",
    "ScanObjectNNConfig",
    "ShapeNet55Config",
    "ShardOptions",
    "ShardsConfig",
    "build_loader",
    "check_shards",
    "collate",
    "group_resplit",
    "load_objects",
    "read_gaussians",
    "read_points",
    "write_gaussians",
    "write_shards",
]
