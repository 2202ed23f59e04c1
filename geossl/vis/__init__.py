"""Pictures of a training run: :func:`write_report` turns a run folder into one self-contained HTML file.

Nothing in geossl imports this package at module level; the programs do when a report is wanted. It reads what a run left behind and
knows nothing of models or data.
"""

from geossl.vis.report import write_report
from geossl.vis.viewer import view_gaussians

__all__ = ["view_gaussians", "write_report"]
