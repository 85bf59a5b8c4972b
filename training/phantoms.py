"""Phantoms: pictures whose truth is known, drawn from a seed, for training, tests and the demo. This is the door.

No network, no torch: numpy, Pillow and, for the DICOM layouts, pydicom.
"""

from training.findings import Finding, Truth
from training.layouts import write_coco, write_mimic, write_pacs
from training.phantom_text import ReportText, caption_truth, write_report
from training.radiographs import Radiograph, draw_radiograph
from training.scenes import Scene, draw_scene

__all__ = [
    "Finding",
    "Radiograph",
    "ReportText",
    "Scene",
    "Truth",
    "caption_truth",
    "draw_radiograph",
    "draw_scene",
    "write_coco",
    "write_mimic",
    "write_pacs",
    "write_report",
]
