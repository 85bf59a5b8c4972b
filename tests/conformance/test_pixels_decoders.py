"""Every decoder of `DECODER_ORDER` gives the same pixels, and the real radiograph looks the same in four encodings."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import data_store
import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from models.decoders import DECODER_ORDER, list_plugins, run_decoder
from models.pixels import render_file, to_model_input
from tests.fakes.instances import draw_gradient, make_dataset

SAMPLES = Path(data_store.__file__).parent / "data"
PYDICOM_SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
LOSSLESS = (
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
    uid.HTJ2KLossless,
    uid.HTJ2KLosslessRPCL,
    uid.RLELossless,
)
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)
# Compressed colour files and their decoded twins: RLE, JPEG lossless, JPEG 2000, JPEG baseline with RGB and YBR inside.
COLOUR_TWINS = {
    "SC_rgb_rle.dcm": "SC_rgb.dcm",
    "SC_rgb_rle_16bit.dcm": "SC_rgb.dcm",
    "SC_rgb_rle_32bit.dcm": "SC_rgb.dcm",
    "SC_rgb_jpeg_gdcm.dcm": "SC_rgb.dcm",
    "SC_rgb_gdcm_KY.dcm": "SC_rgb_gdcm2k_uncompressed.dcm",
    "SC_rgb_dcmtk_+eb+cr.dcm": "SC_rgb_dcmtk_ebcr_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+np.dcm": "SC_rgb_dcmtk_ebcynp_dcmd.dcm",
    "SC_rgb_dcmtk_+eb+cy+s4.dcm": "SC_rgb_dcmtk_ebcys4_dcmd.dcm",
    "examples_jpeg2k.dcm": "US1_UNCR.dcm",
}
COLOUR_FILES = [
    SAMPLES / "color-pl.dcm",  # PlanarConfiguration 1
    SAMPLES / "color-px.dcm",
    SAMPLES / "OBXXXX1A.dcm",  # PALETTE COLOR
    SAMPLES / "OBXXXX1A_rle.dcm",
    SAMPLES / "SC_rgb_expb.dcm",  # big endian
    PYDICOM_SAMPLES / "SC_ybr_full_422_uncompressed.dcm",
    PYDICOM_SAMPLES / "SC_rgb_dcmtk_+eb+cy+np.dcm",
]


@pytest.fixture(scope="module")
def radiographs() -> dict[str, NDArray[np.uint8]]:
    """The chest film RG1 (1955 x 1841, 15 bits, MONOCHROME1) as uncompressed and as JPEG 2000, rendered."""
    return {name: render_file(SAMPLES / f"RG1_{name}.dcm") for name in ("UNCR", "UNCI", "J2KR", "J2KI")}


def test_the_lossless_encodings_of_the_radiograph_are_identical(radiographs: dict[str, NDArray[np.uint8]]) -> None:
    assert radiographs["UNCR"].shape == (1955, 1841) and radiographs["UNCR"].std() > 30
    assert np.array_equal(radiographs["UNCR"], radiographs["J2KR"])  # R: reversible, and its original


def test_the_lossy_encoding_of_the_radiograph_stays_within_its_bound(radiographs: dict[str, NDArray[np.uint8]]) -> None:
    decoded = np.abs(radiographs["UNCI"].astype(int) - radiographs["J2KI"])  # UNCI is J2KI, decoded by its maker
    assert decoded.max() <= 1
    original = np.abs(radiographs["UNCR"].astype(int) - radiographs["J2KI"])
    assert original.mean() < 0.5 and original.max() <= 3
    inputs = [to_model_input(radiographs[name], 384).astype(int) for name in ("UNCR", "J2KI")]
    assert np.abs(inputs[0] - inputs[1]).max() <= 1


def draw_noisy(bits: int, signed: bool) -> NDArray[Any]:
    """A gradient with noise over the whole range of `bits`."""
    noise = np.random.default_rng(bits).integers(0, 7, (64, 48))
    values = (draw_gradient(bits=bits) + noise) % 2**bits - (2 ** (bits - 1) if signed else 0)
    return values.astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")


def encode_frame(pixels: NDArray[Any], bits: int, syntax: str) -> bytes:
    """The codestream of `pixels`; codecs that know no sign get the bits of the value alone."""
    words = pixels.view(f"u{pixels.itemsize}") & (2**bits - 1)
    words = words.astype(f"u{pixels.itemsize}")
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        return bytes(imagecodecs.ljpeg_encode(words, bitspersample=bits))
    if syntax == uid.JPEGLSLossless:
        return bytes(imagecodecs.jpegls_encode(words))
    if syntax == uid.JPEG2000Lossless:
        options = {"codecformat": "j2k", "reversible": True, "level": 0, "bitspersample": bits}
        return bytes(imagecodecs.jpeg2k_encode(pixels, **options))
    return bytes(imagecodecs.htj2k_encode(pixels, reversible=True))


def make_compressed(pixels: NDArray[Any], bits: int, syntax: str) -> FileDataset:
    dataset = make_dataset(pixels, bits)
    if syntax == uid.RLELossless:
        dataset.compress(syntax, generate_instance_uid=False)
        return dataset
    dataset.PixelData = encapsulate([encode_frame(pixels, bits, syntax)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    return dataset


def test_every_syntax_has_an_order_and_its_decoders_are_installed() -> None:
    assert set(DECODER_ORDER) == {*LOSSLESS, *LOSSY}
    for syntax, order in DECODER_ORDER.items():
        assert tuple(list_plugins(uid.UID(syntax))) == order


def test_no_decoder_under_a_copyleft_licence_is_ever_called() -> None:
    """The plugin `pylibjpeg` decodes the JPEG family with pylibjpeg-libjpeg, which is GPL."""
    jpeg = (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes)
    assert len(jpeg) == 6
    assert not [syntax for syntax in jpeg if "pylibjpeg" in DECODER_ORDER[syntax]]


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_every_decoder_gives_the_pixels_that_were_encoded(syntax: uid.UID, bits: int, signed: bool) -> None:
    pixels = draw_noisy(bits, signed)
    dataset = make_compressed(pixels, bits, syntax)
    for plugin in DECODER_ORDER[syntax]:
        decoded = run_decoder(dataset, 0, plugin).pixels
        assert decoded.shape == pixels.shape
        # the display table looks at the stored bits alone: JPEG-LS leaves the sign of 12 bits unextended
        assert not ((decoded.astype(int) - pixels) % 2**bits).any(), plugin


def test_twelve_bit_jpeg_is_decoded() -> None:
    """GDCM, Pillow and libjpeg all refuse this real file."""
    image = render_file(PYDICOM_SAMPLES / "JPEG-lossy.dcm")
    assert image.shape == (1024, 256) and image.std() > 10


@pytest.mark.parametrize("name", COLOUR_TWINS)
def test_compressed_colour_files_equal_their_decoded_twins(name: str) -> None:
    twin = render_file(SAMPLES / COLOUR_TWINS[name]).astype(int)
    assert np.abs(render_file(PYDICOM_SAMPLES / name) - twin).max() <= 1


@pytest.mark.parametrize("path", COLOUR_FILES, ids=lambda path: path.stem)
def test_every_colour_model_agrees_with_dcmtk_within_one_level(path: Path, tmp_path: Path) -> None:
    binary = shutil.which("dcmj2pnm") or pytest.skip("dcmtk is not installed (CI fails in test_pixels_oracles)")
    output = tmp_path / "picture.ppm"
    subprocess.run([binary, "--frame", "1", str(path), str(output)], check=True)
    assert np.abs(render_file(path).astype(int) - np.asarray(Image.open(output))).max() <= 1


def test_grayscale_files_of_the_corpus_decode_alike_with_every_decoder() -> None:
    """Lossless files exactly; lossy ones within 1, since their decoders may round differently."""
    compared = 0
    for path in sorted(PYDICOM_SAMPLES.glob("*.dcm")):
        dataset = pydicom.dcmread(path, force=True)
        syntax = dataset.file_meta.get("TransferSyntaxUID") if "PixelData" in dataset else None
        if syntax not in DECODER_ORDER or dataset.SamplesPerPixel != 1:
            continue
        frames = [pixels for plugin in list_plugins(syntax) if (pixels := decode_quietly(dataset, plugin)) is not None]
        tolerance = 0 if syntax in LOSSLESS else 1
        for other in frames[1:]:
            assert np.abs(frames[0].astype(int) - other).max() <= tolerance, path.name
            compared += 1
    assert compared >= 20


def decode_quietly(dataset: FileDataset, plugin: str) -> NDArray[Any] | None:
    """The frame, or None when this decoder refuses the file."""
    try:
        return run_decoder(dataset, 0, plugin).pixels
    except Exception:
        return None


def test_pydicom_still_offers_what_the_order_relies_on() -> None:
    decoder = get_decoder(uid.JPEG2000Lossless)
    assert {"_available", "_unavailable"} <= set(vars(decoder))
