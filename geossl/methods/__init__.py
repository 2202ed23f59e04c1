"""Self-supervised systems: masking, decoder and loss around a backbone, one file each."""

from geossl.methods.croco import CroCo, CroCoConfig
from geossl.methods.i2p_mae import I2PMAE, I2PMAEConfig, reference_teacher
from geossl.methods.point_m2ae import PointM2AE, PointM2AEConfig
from geossl.methods.point_mae import PointMAE, PointMAEConfig
from geossl.methods.polar_mae import PolarMAE, PolarMAEConfig
from geossl.methods.reference import REFERENCES, load_reference
from geossl.methods.registry import METHODS

__all__ = [
    "I2PMAE",
    "METHODS",
    "REFERENCES",
    "CroCo",
    "CroCoConfig",
    "I2PMAEConfig",
    "PointM2AE",
    "PointM2AEConfig",
    "PointMAE",
    "PointMAEConfig",
    "PolarMAE",
    "PolarMAEConfig",
    "load_reference",
    "reference_teacher",
]
