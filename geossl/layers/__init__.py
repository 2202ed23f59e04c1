"""geossl.layers."""
