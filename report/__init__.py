"""Tables, charts and pictures of one run, as JSON, Markdown and one HTML file.

It takes plain data (`ReportData`) and knows nothing of models, datasets or engines.
"""

from core.errors import ReportError
from report.build import build_report, read_report
from report.data import ReportData
from report.drawing import draw_detections, join_pictures, paint_detections
from report.operating import format_operating
from report.panels import DetectionPanel, DetectionView
from report.tables import format_table
from report.verdict import format_verdicts
from report.write import ReportPaths, write_report

__all__ = [
    "DetectionPanel",
    "DetectionView",
    "ReportData",
    "ReportError",
    "ReportPaths",
    "build_report",
    "draw_detections",
    "format_operating",
    "format_table",
    "format_verdicts",
    "join_pictures",
    "paint_detections",
    "read_report",
    "write_report",
]
