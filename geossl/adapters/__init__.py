"""geossl's data in the shapes of other packages, which are imported when they are needed."""

from geossl.adapters.spconv import from_spconv, to_spconv

__all__ = ["from_spconv", "to_spconv"]
