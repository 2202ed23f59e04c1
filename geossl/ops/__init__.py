"""geossl.ops."""
