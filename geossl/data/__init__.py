"""geossl.data."""
