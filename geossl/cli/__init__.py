"""geossl.cli."""
