"""geossl.tasks."""
