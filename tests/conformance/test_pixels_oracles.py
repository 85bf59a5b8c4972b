"""Display values against two independent implementations: dcmtk's `dcmj2pnm` (C++) and highdicom."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import data_store
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.pixels import render_file
from tests.fakes.instances import add_lookup, draw_gradient, make_dataset, to_bytes

SAMPLES = Path(data_store.__file__).parent / "data"
PYDICOM_SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
WINDOWED = {"WindowCenter": 1800, "WindowWidth": 2500}

# Real files with a window or VOI LUT: (file, whether dcmtk decodes its syntax, whether highdicom takes it)
REAL_FILES = [
    (SAMPLES / "RG1_UNCR.dcm", True, True),  # CR, 15 bits, MONOCHROME1: the chest film
    (SAMPLES / "RG1_J2KR.dcm", False, True),
    (SAMPLES / "RG3_UNCI.dcm", True, True),  # CR, 10 bits, MONOCHROME1
    (SAMPLES / "693_UNCR.dcm", True, True),  # CT, signed, rescaled
    (SAMPLES / "MR2_UNCR.dcm", True, True),
    (SAMPLES / "vlut_04.dcm", True, True),  # VOI LUT sequence
    (SAMPLES / "JPGLosslessP14SV1_1s_1f_8b.dcm", True, True),
    (PYDICOM_SAMPLES / "MR_small_RLE.dcm", True, True),
    (PYDICOM_SAMPLES / "MR_small_bigendian.dcm", True, False),
    (PYDICOM_SAMPLES / "examples_overlay.dcm", True, True),
]

# What the real files do not have, as elements of a 12-bit gradient
SYNTHETIC_CASES: dict[str, dict[str, Any]] = {
    "monochrome1": {"PhotometricInterpretation": "MONOCHROME1", **WINDOWED},
    "inverse shape": {
        "PhotometricInterpretation": "MONOCHROME1",
        "PresentationLUTShape": "INVERSE",
        **WINDOWED,
    },
    "identity shape": {"PresentationLUTShape": "IDENTITY", **WINDOWED},
    "linear exact": {"VOILUTFunction": "LINEAR_EXACT", **WINDOWED},
    "sigmoid": {"VOILUTFunction": "SIGMOID", **WINDOWED},
    "rescale": {"RescaleSlope": 2, "RescaleIntercept": -1000, "RescaleType": "US", **WINDOWED},
    "negative slope": {"RescaleSlope": -1, "RescaleIntercept": 4095, "RescaleType": "US", **WINDOWED},
    "signed": {"signed": True, "WindowCenter": -200, "WindowWidth": 2500},
    "modality lut": {"modality_lut": 16, "WindowCenter": 30000, "WindowWidth": 40000},
    "voi lut 8 bits": {"voi_lut": 8},
    "voi lut 12 bits": {"voi_lut": 12},
    "voi lut 16 bits": {"voi_lut": 16, "PhotometricInterpretation": "MONOCHROME1"},
}
DCMTK_CASES = sorted(set(SYNTHETIC_CASES) - {"linear exact"})  # dcmtk 3.6.7 does not know LINEAR_EXACT
HIGHDICOM_CASES = sorted(set(SYNTHETIC_CASES) - {"voi lut 12 bits"})  # highdicom takes LUTs of 8 and 16 bits only


@pytest.fixture(scope="module")
def dcmj2pnm() -> str:
    binary = shutil.which("dcmj2pnm")
    if binary is None and os.environ.get("CI"):
        pytest.fail("dcmtk is part of the CI image; install it")
    if binary is None:
        pytest.skip("dcmtk is not installed")
    return binary


@pytest.fixture(scope="module")
def synthetic_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("synthetic")
    return {name: write_case(folder / f"{n}.dcm", case) for n, (name, case) in enumerate(SYNTHETIC_CASES.items())}


def write_case(path: Path, case: dict[str, Any]) -> Path:
    elements = dict(case)
    signed, modality, voi = (elements.pop(key, 0) for key in ("signed", "modality_lut", "voi_lut"))
    pixels = draw_gradient(90, 70)
    dataset = make_dataset((pixels.astype(np.int16) - 2048) if signed else pixels, 12, **elements)
    if modality:
        add_lookup(dataset, "ModalityLUTSequence", 0, modality, draw_curve(modality), words=True)
        dataset.ModalityLUTSequence[0].ModalityLUTType = "US"
    if voi:
        add_lookup(dataset, "VOILUTSequence", 0, voi, draw_curve(voi), words=voi > 8)
    path.write_bytes(to_bytes(dataset))
    return path


def draw_curve(bits: int) -> NDArray[Any]:
    """A table for 12-bit input that is no straight line."""
    return np.rint(np.sqrt(np.arange(4096) / 4095) * (2**bits - 1)).astype(np.uint16)


def render_dcmtk(binary: str, path: Path, folder: Path) -> NDArray[np.uint8]:
    header = pydicom.dcmread(path, stop_before_pixels=True)
    voi = ["--use-voi-lut", "1"] if "VOILUTSequence" in header else ["--use-window", "1"]
    output = folder / "picture.pgm"
    subprocess.run([binary, *voi, "--no-overlays", "--frame", "1", str(path), str(output)], check=True)
    return np.asarray(Image.open(output))


def render_highdicom(path: Path) -> NDArray[np.float64]:
    highdicom = pytest.importorskip("highdicom")
    image = highdicom.imread(path)
    frame = image.get_frame(1, apply_voi_transform=None, voi_output_range=(0, 255), apply_presentation_lut=True)
    return np.asarray(frame, dtype=np.float64)


def largest_difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs).max())


@pytest.mark.parametrize("path", [path for path, dcmtk, _ in REAL_FILES if dcmtk], ids=lambda path: path.stem)
def test_real_files_agree_with_dcmtk_within_one_grey_level(path: Path, dcmj2pnm: str, tmp_path: Path) -> None:
    assert largest_difference(render_file(path), render_dcmtk(dcmj2pnm, path, tmp_path)) <= 1


@pytest.mark.parametrize("name", DCMTK_CASES)
def test_every_transform_agrees_with_dcmtk_within_one_grey_level(
    name: str, dcmj2pnm: str, synthetic_files: dict[str, Path], tmp_path: Path
) -> None:
    path = synthetic_files[name]
    assert largest_difference(render_file(path), render_dcmtk(dcmj2pnm, path, tmp_path)) <= 1


@pytest.mark.parametrize("path", [path for path, _, highdicom in REAL_FILES if highdicom], ids=lambda path: path.stem)
def test_real_files_agree_with_highdicom_within_one_grey_level(path: Path) -> None:
    assert largest_difference(render_file(path), render_highdicom(path)) <= 1


@pytest.mark.parametrize("name", HIGHDICOM_CASES)
def test_every_transform_agrees_with_highdicom_within_one_grey_level(
    name: str, synthetic_files: dict[str, Path]
) -> None:
    assert largest_difference(render_file(synthetic_files[name]), render_highdicom(synthetic_files[name])) <= 1
