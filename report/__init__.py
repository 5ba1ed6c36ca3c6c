"""Tables, charts and pictures of one run, as JSON, Markdown and one HTML file.

It takes plain data (`ReportData`) and knows nothing of models, datasets or engines.
"""

from core.errors import ReportError
from report.data import DetectionPanel, ReportData
from report.drawing import draw_detections, join_pictures, paint_detections
from report.operating import format_operating
from report.tables import format_table
from report.write import ReportPaths, write_report

__all__ = [
    "DetectionPanel",
    "ReportData",
    "ReportError",
    "ReportPaths",
    "draw_detections",
    "format_operating",
    "format_table",
    "join_pictures",
    "paint_detections",
    "write_report",
]
