"""geossl.engine."""
