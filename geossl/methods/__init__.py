"""geossl.methods."""
