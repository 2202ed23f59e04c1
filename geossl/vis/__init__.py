"""Pictures of a training run: :func:`write_report` turns a run folder into one self-contained HTML file.

Nothing in geossl imports this package at module level; the programs do when a report is wanted.
"""

from geossl.vis.collect import save_report_data
from geossl.vis.report import write_report

__all__ = ["save_report_data", "write_report"]
