"""geossl.vis."""
