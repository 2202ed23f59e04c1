"""Data sets of point clouds, their augmentation, and the loader that turns them into batches.

``DATASETS.config("objects").build("train")`` gives a data set; :func:`build_loader` gives batches of it; :func:`read_points` reads
any single file. The files are named for what they hold: ``objects``, ``shapenet``, ``modelnet``, ``scanobjectnn``, ``folder``, ``shards``;
``shapenet_part``, whose points carry parts; particle events: ``pilarnet``, ``event_shards`` and ``lartpc`` (simulated), whose points carry
classes.

Posed images of whole places are :class:`SceneSample`, whatever they come from: ``SCENES.config("rooms").build("train")`` gives simulated
furnished rooms, ``room_shards`` the same written once; ``rgbd_folder``, ``sunrgbd`` and ``transforms`` read what others publish.
"""

from geossl.data.augment import AugmentConfig
from geossl.data.dataset import DATASETS, PointDataConfig, PointDataset
from geossl.data.dense import DepthDataConfig, FlowDataConfig, StereoDataConfig
from geossl.data.dense_files import read_disparity, read_flow
from geossl.data.event_files import read_events
from geossl.data.event_shards import EventShardOptions, EventShardsConfig, write_event_shards
from geossl.data.events import Event, EventDataConfig, EventDataset, event_sample
from geossl.data.few_shot import ModelNet40FewShotConfig, draw_episode
from geossl.data.folder import FileOptions, FolderConfig
from geossl.data.gaussian_ply import read_gaussians, write_gaussians
from geossl.data.image_augment import ColorJitterConfig
from geossl.data.lartpc import LArTPCConfig, LArTPCFileOptions, write_lartpc
from geossl.data.loader import Loader, build_loader
from geossl.data.mixture import MixtureConfig
from geossl.data.modelnet import ModelNet40Config
from geossl.data.objects import ObjectLibrary, ObjectsConfig, load_objects
from geossl.data.pair_mining import MiningOptions
from geossl.data.pair_shards import PairShardsConfig
from geossl.data.pair_writer import PairShardOptions, check_pairs, write_pairs
from geossl.data.pairs import PairDataConfig, PairDataset, PairsConfig
from geossl.data.pilarnet import PILArNetConfig, PILArNetFile, write_pilarnet
from geossl.data.pose_pairs import PosePairsConfig
from geossl.data.readers import read_points
from geossl.data.room_pairs import RoomPairsConfig, normals_from_depth
from geossl.data.room_shards import RoomShardOptions, RoomShardsConfig, RoomShardsDataset, check_rooms, write_rooms
from geossl.data.rooms import RoomsConfig, RoomsDataset
from geossl.data.sample import ImageSample, PointCloud, Sample, collate
from geossl.data.scanobjectnn import ScanObjectNNConfig
from geossl.data.scene import SCENES, SceneDataConfig, SceneDataset, SceneSample
from geossl.data.scene_readers import RGBDFolderConfig, SUNRGBDConfig, TransformsConfig
from geossl.data.shapenet import ShapeNet55Config
from geossl.data.shapenet_part import ShapeNetPartConfig
from geossl.data.shard_store import check_shards
from geossl.data.shards import ShardOptions, ShardsConfig, write_shards
from geossl.data.simulate import LArTPCOptions, Room, RoomError, build_room, simulate_event
from geossl.data.splits import group_resplit
from geossl.data.subset import Subset, random_subset

__all__ = [
    "DATASETS",
    "SCENES",
    "AugmentConfig",
    "ColorJitterConfig",
    "DepthDataConfig",
    "Event",
    "EventDataConfig",
    "EventDataset",
    "EventShardOptions",
    "EventShardsConfig",
    "FileOptions",
    "FlowDataConfig",
    "FolderConfig",
    "ImageSample",
    "LArTPCConfig",
    "LArTPCFileOptions",
    "LArTPCOptions",
    "Loader",
    "MiningOptions",
    "MixtureConfig",
    "ModelNet40Config",
    "ModelNet40FewShotConfig",
    "ObjectLibrary",
    "ObjectsConfig",
    "PILArNetConfig",
    "PILArNetFile",
    "PairDataConfig",
    "PairDataset",
    "PairShardOptions",
    "PairShardsConfig",
    "PairsConfig",
    "PointCloud",
    "PointDataConfig",
    "PointDataset",
    "PosePairsConfig",
    "RGBDFolderConfig",
    "Room",
    "RoomError",
    "RoomPairsConfig",
    "RoomShardOptions",
    "RoomShardsConfig",
    "RoomShardsDataset",
    "RoomsConfig",
    "RoomsDataset",
    "SUNRGBDConfig",
    "Sample",
    "ScanObjectNNConfig",
    "SceneDataConfig",
    "SceneDataset",
    "SceneSample",
    "ShapeNet55Config",
    "ShapeNetPartConfig",
    "ShardOptions",
    "ShardsConfig",
    "StereoDataConfig",
    "Subset",
    "TransformsConfig",
    "build_loader",
    "build_room",
    "check_pairs",
    "check_rooms",
    "check_shards",
    "collate",
    "draw_episode",
    "event_sample",
    "group_resplit",
    "load_objects",
    "normals_from_depth",
    "random_subset",
    "read_disparity",
    "read_events",
    "read_flow",
    "read_gaussians",
    "read_points",
    "simulate_event",
    "write_event_shards",
    "write_gaussians",
    "write_lartpc",
    "write_pairs",
    "write_pilarnet",
    "write_rooms",
    "write_shards",
]
