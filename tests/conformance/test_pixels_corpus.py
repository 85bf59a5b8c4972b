"""Every test file of pydicom and pydicom-data renders, or is refused with a reason; nothing else happens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import data_store
import numpy as np
import pydicom
import pytest

from models.pixels import render_file
from readroom.errors import ImageError
from readroom.records import Reason

ROOTS = (Path(pydicom.__file__).parent / "data", Path(data_store.__file__).parent / "data")
# What the few damaged files are refused for; all others render or hold no image.
DAMAGED = {
    "MR_truncated.dcm": "truncated",
    "chrJapMulti.dcm": "truncated",  # image headers without pixel data
    "chrJapMultiExplicitIR6.dcm": "truncated",
    "chrKoreanMulti.dcm": "truncated",
    "emri_small_jpeg_2k_lossless_too_short.dcm": "truncated",
    "JPEG2000-embedded-sequence-delimiter.dcm": "corrupt",  # the codestream claims 3.7 billion columns
    "badVR.dcm": "corrupt",  # NumberOfFrames is no number
    "meta_missing_tsyntax.dcm": "corrupt",  # pixel data and nothing to say what it is
    "nested_priv_SQ.dcm": "corrupt",
}


def list_files() -> list[Path]:
    files = [path for root in ROOTS for path in sorted(root.rglob("*"))]
    return [path for path in files if path.is_file() and path.suffix not in (".py", ".pyc")]


def try_render(path: Path) -> str:
    """`rendered`, or the reason of the refusal; any other exception fails the test."""
    try:
        image = render_file(path)
    except ImageError as error:
        assert path.name not in str(error)
        return error.reason
    assert image.dtype == np.uint8 and image.ndim in (2, 3) and min(image.shape[:2]) > 0
    return "rendered"


@pytest.fixture(scope="module")
def outcomes() -> dict[Path, str]:
    return {path: try_render(path) for path in list_files()}


def test_every_file_renders_or_has_a_reason(outcomes: dict[Path, str]) -> None:
    assert len(outcomes) >= 250
    assert set(outcomes.values()) <= {"rendered", *Reason}


def test_most_files_render_and_the_damaged_ones_are_known(outcomes: dict[Path, str]) -> None:
    counts = Counter(outcomes.values())
    assert counts["rendered"] >= 160
    refused = {path.name: reason for path, reason in outcomes.items() if reason not in ("rendered", "not_image")}
    assert refused == DAMAGED


def test_only_files_without_pixels_are_called_no_image(outcomes: dict[Path, str]) -> None:
    no_images = [path for path, reason in outcomes.items() if reason == "not_image"]
    with_pixels = [path.name for path in no_images if "PixelData" in pydicom.dcmread(path, force=True)]
    assert len(no_images) >= 80
    assert with_pixels == []
