"""geossl.models."""
