"""A plug-in package outside mosaic_ray: one strategy and one method."""
