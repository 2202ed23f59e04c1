"""geossl.evaluation."""
