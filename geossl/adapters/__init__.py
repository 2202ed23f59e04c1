"""geossl.adapters."""
