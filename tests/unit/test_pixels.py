"""What `models.pixels` draws, and what it refuses before a decoder sees it."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmwrite, uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders import RLELosslessDecoder

from models import decoders
from models.display import equalize_histogram
from models.pixels import (
    PROFILES,
    PixelLimits,
    render_array,
    render_file,
    render_pil,
    render_source,
    sniff_format,
    to_model_input,
)
from readroom.errors import BadCall, ImageError
from tests.fakes.instances import SECRET, add_lookup, draw_gradient, make_dataset, make_instance, to_bytes

WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}
GRADIENT = draw_gradient()


def refuse(source: bytes | Path, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        render_source(source, **options)
    assert SECRET not in str(caught.value)
    return caught.value


def save_picture(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# DICOM: what is drawn


def test_a_full_window_maps_the_whole_range_to_black_and_white() -> None:
    image = render_source(make_instance(GRADIENT, 12, **WINDOW))
    assert image.dtype == np.uint8 and image.shape == GRADIENT.shape
    assert (image[0, 0], image[-1, -1]) == (0, 255)
    assert np.abs(image - GRADIENT / 4095 * 255).max() <= 0.51


def test_monochrome1_and_its_inverse_give_the_same_model_input() -> None:
    for elements in (WINDOW, {}):
        direct = make_instance(GRADIENT, 12, **elements)
        window = {"WindowCenter": 2048, "WindowWidth": 4096} if elements else {}
        inverse = make_instance(4095 - GRADIENT, 12, PhotometricInterpretation="MONOCHROME1", **window)
        assert np.array_equal(render_source(direct, size=24), render_source(inverse, size=24))


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME1", None, True),
        ("MONOCHROME2", None, False),
        ("MONOCHROME1", "INVERSE", True),  # once, not twice
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", False),
    ],
)
def test_inversion_happens_once(photometric: str, shape: str | None, inverted: bool) -> None:
    source = make_instance(GRADIENT, 12, PhotometricInterpretation=photometric, PresentationLUTShape=shape, **WINDOW)
    image = render_source(source)
    assert (image[0, 0], image[-1, -1]) == ((255, 0) if inverted else (0, 255))


def test_padding_is_black_and_out_of_the_percentiles() -> None:
    pixels = np.tile(np.arange(1000, 1100, dtype=np.uint16), (40, 1))
    pixels[:20] = 4095
    dataset = make_dataset(pixels, 12, PhotometricInterpretation="MONOCHROME1")
    dataset.add_new("PixelPaddingValue", "US", 4095)
    image = render_source(to_bytes(dataset))
    assert (image[:20] == 0).all()
    assert (image[20:, 0] == 255).all() and (image[20:, -1] == 0).all()


def test_padding_counts_by_its_bits_when_its_vr_is_wrong() -> None:
    pixels = np.full((8, 8), -2000, dtype=np.int16)
    pixels[:4] = 100
    pixels[0] = 900
    dataset = make_dataset(pixels, WindowCenter=500, WindowWidth=8000)
    dataset.add_new("PixelPaddingValue", "US", 65536 - 2000)
    image = render_source(to_bytes(dataset))
    assert (image[4:] == 0).all() and (image[:4] > 100).all()


def test_overlay_bits_above_high_bit_do_not_show() -> None:
    with_overlay = GRADIENT | (np.uint16(1) << np.uint16(13))
    clean = make_instance(GRADIENT, 12, **WINDOW)
    assert np.array_equal(render_source(make_instance(with_overlay, 12, **WINDOW)), render_source(clean))


def test_values_placed_high_in_their_words_are_shifted_down() -> None:
    shifted = make_instance(GRADIENT << np.uint16(4), 12, HighBit=15, **WINDOW)
    assert np.array_equal(render_source(shifted), render_source(make_instance(GRADIENT, 12, **WINDOW)))


@pytest.mark.parametrize("window", [("", ""), ("abc", "10"), ("100", "0"), ("100", "-5"), ("1e400", "20")])
def test_an_invalid_window_falls_back_to_percentiles(window: tuple[str, str]) -> None:
    dataset = make_dataset(GRADIENT, 12)
    source = to_bytes(dataset)
    for tag, value in ((0x00281050, window[0]), (0x00281051, window[1])):
        dataset.add_new(tag, "LO", value)  # written as text, read back as DS below
    broken = to_bytes(dataset).replace(b"\x28\x00\x50\x10LO", b"\x28\x00\x50\x10DS")
    broken = broken.replace(b"\x28\x00\x51\x10LO", b"\x28\x00\x51\x10DS")
    assert np.array_equal(render_source(broken), render_source(source))


def test_the_first_of_several_windows_is_used() -> None:
    several = make_instance(GRADIENT, 12, WindowCenter=[2048, 100], WindowWidth=[4096, 10])
    assert np.array_equal(render_source(several), render_source(make_instance(GRADIENT, 12, **WINDOW)))


def test_without_a_window_half_a_percent_at_either_end_is_clipped() -> None:
    pixels = np.full((20, 50), 2000, dtype=np.uint16)
    pixels[0, :4], pixels[1, :5], pixels[2, :4], pixels[3, :5] = 0, 1000, 4095, 3000  # 1000 pixels: 5 are 0.5 %
    image = render_source(make_instance(pixels, 12))
    assert (image[0, 0], image[1, 0], image[2, 0], image[3, 0], image[5, 5]) == (0, 0, 255, 255, 128)


@pytest.mark.parametrize("words", [True, False])
def test_lookup_tables_of_65536_entries_and_of_packed_bytes_are_read(words: bool) -> None:
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    long = make_dataset(values)
    add_lookup(long, "VOILUTSequence", 0, 16, 65535 - values.ravel(), words)  # written as 0 entries
    assert np.array_equal(render_source(to_bytes(long)), np.rint((65535 - values) / 65535 * 255))
    packed = make_dataset(values)
    add_lookup(packed, "VOILUTSequence", 100, 8, np.arange(256, dtype=np.uint8)[::-1].copy().view("<u2"), words)
    packed.VOILUTSequence[0].LUTDescriptor = [256, 100, 8]
    assert np.array_equal(render_source(to_bytes(packed)), 255 - np.clip(values.astype(int) - 100, 0, 255))


def test_a_fractional_rescale_meets_the_nearest_entry_of_a_voi_table() -> None:
    values = np.arange(16, dtype=np.uint16).reshape(4, 4)
    dataset = make_dataset(values, 12, RescaleSlope="0.25", RescaleIntercept="0")
    add_lookup(dataset, "VOILUTSequence", 0, 8, np.arange(8) * 10, words=True)
    assert np.array_equal(render_source(to_bytes(dataset)), np.rint(values / 4) * 10)


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_an_unusable_lookup_table_falls_back_to_percentiles(keyword: str) -> None:
    dataset = make_dataset(GRADIENT, 12)
    expected = render_source(to_bytes(dataset))
    add_lookup(dataset, keyword, 0, 12, np.arange(10), words=False)
    getattr(dataset, keyword)[0].LUTDescriptor = [4096, 0, 12]  # more entries than there are
    assert np.array_equal(render_source(to_bytes(dataset)), expected)


def test_a_flat_image_is_grey_and_an_all_padding_one_black() -> None:
    flat = np.full((4, 4), 7, dtype=np.uint16)
    assert (render_source(make_instance(flat)) == 128).all()
    dataset = make_dataset(flat)
    dataset.add_new("PixelPaddingValue", "US", 7)
    assert (render_source(to_bytes(dataset)) == 0).all()


def test_float_and_32_bit_pixels_are_drawn() -> None:
    wide = GRADIENT.astype(np.uint32) * 65537
    expected = render_source(make_instance(GRADIENT, 12))
    assert np.array_equal(render_source(make_instance(wide)), expected)
    dataset = make_dataset(GRADIENT, 12)
    del dataset.PixelData
    dataset.FloatPixelData = (GRADIENT / 1000).astype(np.float32).tobytes()
    dataset.BitsAllocated = 32
    for keyword in ("BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, keyword)
    assert np.abs(render_source(to_bytes(dataset)).astype(int) - expected).max() <= 1


def test_a_frame_of_an_enhanced_instance_uses_its_own_window() -> None:
    pixels = np.stack([GRADIENT, GRADIENT])
    dataset = make_dataset(pixels[0], 12, NumberOfFrames=2, PixelData=pixels.tobytes())
    dataset.PerFrameFunctionalGroupsSequence = [make_group(2048, 4096), make_group(1024, 2)]
    source = to_bytes(dataset)
    assert np.array_equal(render_source(source), render_source(make_instance(GRADIENT, 12, **WINDOW)))
    assert set(np.unique(render_source(source, frame=1))) == {0, 255}
    assert refuse(source, frame=2).reason == "multi_frame"


def make_group(center: float, width: float) -> Dataset:
    group, window = Dataset(), Dataset()
    window.WindowCenter, window.WindowWidth = center, width
    group.FrameVOILUTSequence = [window]
    return group


def test_colour_instances_become_rgb() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    planar = make_instance(rgb, PixelData=rgb.transpose(2, 0, 1).tobytes(), PlanarConfiguration=1)
    deep = make_instance(rgb.astype(np.uint16) * 257)
    for source in (make_instance(rgb), planar, deep):
        assert np.array_equal(render_source(source), rgb)
    assert render_source(make_instance(rgb), size=8).shape == (8, 8, 3)


def test_files_without_preamble_or_meta_header_are_read() -> None:
    dataset = make_dataset(GRADIENT, 12, **WINDOW)
    expected = render_source(to_bytes(dataset))
    for implicit in (True, False):
        buffer = io.BytesIO()
        bare = Dataset(dataset)
        dcmwrite(buffer, bare, implicit_vr=implicit, little_endian=True)
        assert np.array_equal(render_source(buffer.getvalue()), expected)


def test_a_deflated_instance_is_read() -> None:
    dataset = make_dataset(GRADIENT, 12, **WINDOW)
    expected = render_source(to_bytes(dataset))
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    assert np.array_equal(render_source(to_bytes(dataset)), expected)


# DICOM: profiles


def test_the_profiles_are_named_and_others_are_a_bad_call() -> None:
    assert set(PROFILES) == {"dicom_voi_v1", "mimic_jpg_v1"}
    with pytest.raises(BadCall, match="dicom_voi_v1"):
        render_source(make_instance(GRADIENT, 12), profile="no_such")


def test_the_mimic_profile_ignores_windows_and_inverts_monochrome1() -> None:
    plain = render_source(make_instance(GRADIENT, 12), profile="mimic_jpg_v1")
    windowed = make_instance(GRADIENT, 12, WindowCenter=100, WindowWidth=10)
    assert np.array_equal(render_source(windowed, profile="mimic_jpg_v1"), plain)
    inverse = make_instance(4095 - GRADIENT, 12, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(render_source(inverse, profile="mimic_jpg_v1").astype(int) - plain).max() <= 4  # truncation
    assert (plain.min(), plain.max()) == (0, 255)


def test_equalisation_follows_opencv_on_a_worked_example() -> None:
    # shades 10, 20, 20, 30: after the first, counts cumulate to 0, 2, 3 of 3
    table = equalize_histogram(np.bincount([10, 20, 20, 30], minlength=256))
    assert [table[shade] for shade in (10, 20, 30)] == [0, 170, 255]
    assert equalize_histogram(np.bincount([9, 9], minlength=256))[9] == 9


# DICOM: what is refused


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 60000, "Columns": 60000}, "too_large"),
        ({"Rows": 65}, "truncated"),
        ({"NumberOfFrames": 2}, "truncated"),
        ({"NumberOfFrames": 5000}, "too_large"),
        ({"Rows": 0}, "corrupt"),
        ({"Rows": None}, "corrupt"),
        ({"BitsStored": 17}, "corrupt"),
        ({"BitsAllocated": 12}, "corrupt"),
        ({"PhotometricInterpretation": "NONSENSE"}, "corrupt"),
        ({"PhotometricInterpretation": "HSV"}, "unsupported_syntax"),
        ({"PixelData": b""}, "truncated"),
    ],
)
def test_a_header_that_lies_is_refused(elements: dict[str, Any], reason: str) -> None:
    assert refuse(make_instance(GRADIENT, 12, **elements)).reason == reason


def test_limits_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.pixels.decode_frame", lambda *_: pytest.fail("a decoder was reached"))
    source = make_instance(GRADIENT, 12)
    for limits in (
        PixelLimits(max_pixels=GRADIENT.size - 1),
        PixelLimits(max_decoded_bytes=GRADIENT.nbytes - 1),
        PixelLimits(max_file_bytes=len(source) - 1),
        PixelLimits(max_frames=0),
    ):
        assert refuse(source, limits=limits).reason == "too_large"


def test_a_deflated_bomb_is_refused_without_inflating_it_whole() -> None:
    dataset = make_dataset(GRADIENT, 12)
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    source = to_bytes(dataset)
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    zeros = b"".join(deflater.compress(bytes(2**20)) for _ in range(64)) + deflater.flush()
    meta_end = 144 + int.from_bytes(source[140:144], "little")
    bomb = source[:meta_end] + zeros
    assert len(bomb) < 2**20
    assert refuse(bomb, limits=PixelLimits(max_file_bytes=2**24)).reason == "too_large"


def test_a_file_cut_anywhere_is_refused_with_a_reason() -> None:
    source = make_instance(GRADIENT, 12, **WINDOW)
    reasons = {refuse(source[:length]).reason for length in range(0, len(source) - 1, 97)}
    assert reasons <= {"empty", "not_image", "truncated", "corrupt"} and "truncated" in reasons


def test_an_object_without_pixels_is_no_image() -> None:
    dataset = make_dataset(GRADIENT, 12, PixelData=b"")
    del dataset.PixelData
    assert refuse(to_bytes(dataset)).reason == "truncated"
    del dataset.Rows
    assert refuse(to_bytes(dataset)).reason == "not_image"


def encapsulate_frame(codestream: bytes, syntax: str) -> bytes:
    dataset = make_dataset(GRADIENT, 12, PixelData=encapsulate([codestream]))
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    return to_bytes(dataset)


def test_a_cut_or_foreign_codestream_is_refused() -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    good = imagecodecs.jpeg2k_encode(GRADIENT, codecformat="j2k", reversible=True, level=0, bitspersample=12)
    other = imagecodecs.jpeg2k_encode(GRADIENT[:32], codecformat="j2k", reversible=True, level=0, bitspersample=12)
    render_source(encapsulate_frame(good, uid.JPEG2000Lossless))
    assert refuse(encapsulate_frame(good[: len(good) // 2], uid.JPEG2000Lossless)).reason == "truncated"
    assert refuse(encapsulate_frame(other, uid.JPEG2000Lossless)).reason == "corrupt"
    assert refuse(encapsulate_frame(b"noise\xff\xd9", uid.JPEG2000Lossless)).reason == "corrupt"


def test_pixel_data_encoded_otherwise_than_declared_is_refused() -> None:
    encapsulated = encapsulate_frame(b"\xff\xd9", uid.JPEG2000Lossless)
    native = uid.ExplicitVRLittleEndian.encode().ljust(len(uid.JPEG2000Lossless), b"\0")
    assert refuse(encapsulated.replace(uid.JPEG2000Lossless.encode(), native)).reason == "corrupt"
    dataset = make_dataset(GRADIENT, 12)
    source = to_bytes(dataset).replace(uid.ExplicitVRLittleEndian.encode() + b"\0", b"1.2.840.10008.1.2.5\0")
    assert refuse(source).reason in ("corrupt", "truncated")


def test_an_unsupported_syntax_is_named_with_a_remedy() -> None:
    error = refuse(encapsulate_frame(b"\0\0\0\1", uid.MPEG2MPML))
    assert error.reason == "unsupported_syntax" and "MPEG2" in error.detail and "gdcmconv" in error.remedy
    private = refuse(encapsulate_frame(b"\0\0", "1.2.826.0.1.3680043.99.1"))
    assert private.reason == "unsupported_syntax" and "3680043" not in str(private)


def test_missing_decoder_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    source = encapsulate_frame(b"\xff\x4f\xff\x51\xff\xd9", uid.JPEG2000Lossless)
    decoders.register_imagecodecs()
    monkeypatch.setattr(get_decoder(uid.JPEG2000Lossless), "_available", {})
    error = refuse(source)
    assert error.reason == "unsupported_syntax" and "readroom[decoders]" in error.remedy


def test_a_failing_decoder_hands_on_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(GRADIENT, 12, **WINDOW)
    expected = render_source(to_bytes(dataset))
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
    source = to_bytes(dataset)

    def fail(*_: Any) -> bytes:
        raise RuntimeError(SECRET)

    plugins = dict(RLELosslessDecoder._available)
    first, *others = decoders.list_plugins(uid.RLELossless)
    monkeypatch.setattr(RLELosslessDecoder, "_available", plugins | {first: fail})
    assert np.array_equal(render_source(source), expected)
    monkeypatch.setattr(RLELosslessDecoder, "_available", dict.fromkeys([first, *others], fail))
    error = refuse(source)
    assert error.reason == "corrupt" and error.__cause__ is None


# Other pictures


def test_formats_are_recognised_by_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    path.write_bytes(save_picture(Image.new("L", (5, 4), 9)))
    assert np.array_equal(render_file(path), np.full((4, 5), 9))
    path.with_suffix(".jpg").write_bytes(make_instance(GRADIENT, 12))
    assert render_file(path.with_suffix(".jpg")).shape == GRADIENT.shape
    assert sniff_format(b"\0" * 128 + b"DICM") == "dicom"
    assert sniff_format(b"\x89PNG\r\n\x1a\n" + b"\0" * 200) == "other"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"%PDF-1.7 something", "not_image"),
        (os.urandom(16).hex().encode() * 20, "not_image"),
        (bytes.fromhex("3080" + "06092a864886f70d010703" + "a080") + b"\0" * 300, "encrypted"),
        (save_picture(Image.effect_noise((64, 64), 50), "JPEG")[:-600], "truncated"),
        (save_picture(Image.effect_noise((64, 64), 50))[:-600], "truncated"),
    ],
)
def test_what_is_no_whole_picture_is_refused(content: bytes, reason: str) -> None:
    assert refuse(content).reason == reason


def test_files_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refuse(tmp_path / "absent").reason == "missing"
    assert refuse(tmp_path).reason == "unreadable"
    assert refuse(tmp_path / "pipe").reason == "unreadable"


def test_the_size_of_a_picture_is_checked_before_loading() -> None:
    source = save_picture(Image.new("1", (3000, 3000)))
    assert refuse(source, limits=PixelLimits(max_pixels=10**6)).reason == "too_large"
    header = struct.pack(">4s2I", b"IHDR", 60000, 60000) + bytes([8, 0, 0, 0, 0])
    bomb = source[:12] + header + struct.pack(">I", zlib.crc32(header)) + source[33:]
    assert refuse(bomb).reason == "too_large"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    image = Image.new("L", (20, 10))
    image.paste(255, (0, 0, 10, 10))
    upright = render_source(save_picture(image, "JPEG", exif=exif, quality=95))
    assert upright.shape == (20, 10) and upright[:8].mean() > 250 and upright[12:].mean() < 5


def test_every_colour_mode_becomes_gray_or_rgb() -> None:
    base = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    expected = {"1": 2, "L": 2, "LA": 2, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3, "I": 2, "F": 2}
    for mode, dimensions in expected.items():
        converted = base.convert("L").convert(mode) if mode in ("I", "F") else base.convert(mode)
        image = render_pil(converted)
        assert image.dtype == np.uint8 and image.ndim == dimensions, mode
    assert np.array_equal(render_pil(base), np.asarray(base))
    assert np.abs(render_source(save_picture(base.convert("CMYK"), "TIFF")).astype(int) - np.asarray(base)).max() <= 1


def test_transparent_parts_are_black() -> None:
    rgba = np.full((4, 4, 4), 200, dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[:2, :, 3] = 0
    for image in (render_source(save_picture(Image.fromarray(rgba))), render_array(rgba)):
        assert (image[:2] == 0).all() and (image[2:] == 200).all() and image.shape == (4, 4, 3)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 50, 60, 70])
    palette.putpixel((0, 0), 0)
    assert render_source(save_picture(palette, "GIF", transparency=0)).tolist() == [[[0, 0, 0], [50, 60, 70]]]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_pngs_are_scaled_by_the_bits_in_use(bits: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 300).astype(np.uint16).reshape(3, 100)
    image = render_source(save_picture(Image.fromarray(ramp)))
    assert image.shape == (3, 100) and np.abs(image - ramp / (2**bits - 1) * 255).max() <= 0.51


def test_the_first_frame_of_an_animation_is_drawn_unless_another_is_asked_for() -> None:
    frames = [Image.new("L", (4, 4), shade) for shade in (10, 20, 30)]
    source = save_picture(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (render_source(source) == 10).all() and (render_source(source, frame=2) == 30).all()
    assert refuse(source, frame=3).reason == "multi_frame"


def test_arrays_of_every_kind_are_scaled() -> None:
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for array in (ramp, ramp * 2 - 1, expected, expected[..., None], expected.astype(np.int64)):
        assert np.array_equal(render_array(array), expected)
    assert render_array(ramp > 0.5).max() == 255
    for wrong in (np.zeros(4), np.zeros((2, 2, 2)), np.zeros((0, 4)), np.array([["a"]])):
        with pytest.raises(ImageError, match="not_image"):
            render_array(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_floats_none_of_which_is_finite_are_no_picture(value: float, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="corrupt"):
        render_array(np.full(shape, value))
    with pytest.raises(ImageError, match="corrupt"):
        render_pil(Image.fromarray(np.full((8, 8), value, dtype=np.float32)))


def test_scattered_samples_that_are_no_number_are_padding() -> None:
    array = np.linspace(-2.0, 2.0, 16).reshape(4, 4)
    plain = render_array(array)
    array[1, 1], array[2, 2], array[3, 0] = np.nan, np.inf, -np.inf
    found = render_array(array)
    assert (found[1, 1], found[2, 2], found[3, 0]) == (0, 255, 0)
    kept = np.isfinite(array)
    assert np.array_equal(found[kept], plain[kept])


# The model's input


def test_model_input_is_pillows_bicubic_in_three_channels() -> None:
    gray = np.random.default_rng(2).integers(0, 256, (100, 70), dtype=np.uint8)
    sized = to_model_input(gray, 32)
    expected = np.asarray(Image.fromarray(gray).resize((32, 32), Image.Resampling.BICUBIC))
    assert sized.shape == (32, 32, 3) and sized.flags.c_contiguous
    assert all(np.array_equal(sized[..., channel], expected) for channel in range(3))
    rgb = np.repeat(gray[..., None], 3, axis=2)
    assert np.array_equal(to_model_input(rgb, 32), sized)


def test_a_reducing_gap_stays_close_to_exact() -> None:
    film = np.asarray(Image.effect_noise((1000, 800), 40).resize((2000, 1600), Image.Resampling.BICUBIC))
    source = save_picture(Image.fromarray(film), "JPEG", quality=95)
    exact, fast = render_source(source, size=64), render_source(source, size=64, reducing_gap=2.0)
    assert np.abs(exact.astype(int) - fast).mean() < 1.0


# Privacy


def test_nothing_of_the_header_is_told(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    dataset = make_dataset(GRADIENT, 12, BurnedInAnnotation=SECRET, ImageType=[SECRET])
    dataset.add_new(0x00281050, "LO", SECRET)
    whole = to_bytes(dataset).replace(b"\x28\x00\x50\x10LO", b"\x28\x00\x50\x10DS")
    render_source(whole)
    texts = [str(refuse(whole[:length])) for length in range(400, len(whole) - 2, 211)]
    texts += [str(refuse(whole.replace(b"MONOCHROME2", SECRET.encode() + b" ")))]
    printed = capfd.readouterr()
    assert len(texts) > 10
    assert SECRET not in "".join((*texts, caplog.text, printed.out, printed.err))
