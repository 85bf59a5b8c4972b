"""The lookup table of `models.display` against the standard's formulas, evaluated pixel by pixel in float64.

The reference below is written from PS3.3 C.7.5.1.1.2, C.7.6.3.1.2, C.11.1, C.11.2 and C.11.6 alone: no tables over the
domain, nothing of pydicom, nothing of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.pixels import render_source
from tests.fakes.instances import add_lookup, make_dataset, to_bytes


@dataclass(frozen=True)
class Lut:
    first: int
    bits: int
    entries: tuple[int, ...]
    words: bool

    def look_up(self, value: float) -> int:
        index = round(value) - self.first  # rounds half to even, as numpy does
        return self.entries[min(max(index, 0), len(self.entries) - 1)]


@dataclass(frozen=True)
class Case:
    bits: int
    allocated: int
    signed: bool
    stored: tuple[int, ...]
    junk: int  # what stands in the bits above the value
    rescale: tuple[float, float] | None
    modality: Lut | None
    window: tuple[float, float, str | None] | None
    voi: Lut | None
    photometric: str
    shape: str | None
    padding: tuple[int, int | None] | None


def draw_luts(first: st.SearchStrategy[int], bits: st.SearchStrategy[int]) -> st.SearchStrategy[Lut]:
    """Tables of random entries, from two (nearly every input clipped) to 4096 (nearly none)."""
    return st.builds(make_lut, first, bits, st.sampled_from([2, 40, 4096]), st.integers(0, 2**32 - 1), st.booleans())


def make_lut(first: int, bits: int, count: int, seed: int, words: bool) -> Lut:
    entries = np.random.default_rng(seed).integers(0, 2**bits, count)
    return Lut(first, bits, tuple(entries.tolist()), words)


@st.composite
def draw_cases(draw: st.DrawFn) -> Case:
    bits = draw(st.integers(8, 16))
    signed = draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = st.integers(low, high)
    kind = draw(st.sampled_from(["plain", "rescale", "lut"]))
    center = draw(st.integers(2 * low - 10, 2 * high + 10)) / draw(st.sampled_from([1, 4]))
    width = draw(st.one_of(st.sampled_from([0, 0.5, 1, 2, -3]), st.integers(1, 2**bits)))
    function = draw(st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID", "sigmoid"]))
    firsts = st.integers(low // 2, high // 2)
    modality_first = firsts if signed else st.integers(0, high // 2)
    return Case(
        bits=bits,
        allocated=draw(st.sampled_from([8, 16])) if bits == 8 else 16,
        signed=signed,
        stored=tuple(draw(st.lists(values, min_size=24, max_size=24))),
        junk=draw(st.integers(0, 2**16 - 1)),
        rescale=draw(st.tuples(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.5]), st.integers(-1024, 1024)))
        if kind == "rescale"
        else None,
        modality=draw(draw_luts(modality_first, st.sampled_from([8, 10, 12, 16]))) if kind == "lut" else None,
        window=draw(st.none() | st.just((center, width, function))),
        voi=draw(st.none() | draw_luts(firsts if signed else st.integers(0, high // 2), st.integers(8, 16))),
        photometric=draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"])),
        shape=draw(st.sampled_from([None, "IDENTITY", "INVERSE"])),
        padding=draw(st.none() | st.tuples(values, st.none() | values)),
    )


def write_case(case: Case) -> bytes:
    """The case as a DICOM file, its unused high bits filled with junk."""
    size = case.allocated // 8
    mask = 2**case.bits - 1
    words = [(value & mask) | (case.junk & ~mask) for value in case.stored]
    pixels = (np.array(words) & (2**case.allocated - 1)).astype(f"u{size}")
    signed_pixels = pixels.view(f"i{size}") if case.signed else pixels
    dataset = make_dataset(
        signed_pixels.reshape(4, 6),
        case.bits,
        PhotometricInterpretation=case.photometric,
        PresentationLUTShape=case.shape,
    )
    add_transforms(dataset, case)
    return to_bytes(dataset)


def add_transforms(dataset: Any, case: Case) -> None:
    if case.rescale:
        dataset.RescaleSlope, dataset.RescaleIntercept = case.rescale
    if case.modality:
        lut = case.modality
        add_lookup(dataset, "ModalityLUTSequence", lut.first, lut.bits, np.array(lut.entries), lut.words)
    if case.window:
        dataset.WindowCenter, dataset.WindowWidth = case.window[:2]
        if case.window[2]:
            dataset.add_new("VOILUTFunction", "CS", case.window[2])
    if case.voi:
        add_lookup(dataset, "VOILUTSequence", case.voi.first, case.voi.bits, np.array(case.voi.entries), case.voi.words)
    if case.padding:
        kind = "SS" if case.signed else "US"
        dataset.add_new("PixelPaddingValue", kind, case.padding[0])
        if case.padding[1] is not None:
            dataset.add_new("PixelPaddingRangeLimit", kind, case.padding[1])


def reference(case: Case) -> list[float]:
    """Display values 0..255 before rounding."""
    padded = [is_padding(case, value) for value in case.stored]
    modality = [to_modality(case, value) for value in case.stored]
    fractions = [to_fraction(case, value) for value in modality]
    if any(fraction is None for fraction in fractions):
        fractions = list(stretch(modality, padded))
    inverted = case.shape == "INVERSE" or (case.shape is None and case.photometric == "MONOCHROME1")
    shown = [1 - f if inverted else f for f in fractions if f is not None]
    return [0.0 if pad else 255 * f for pad, f in zip(padded, shown, strict=True)]


def is_padding(case: Case, value: int) -> bool:
    if case.padding is None:
        return False
    first, last = case.padding
    return min(first, first if last is None else last) <= value <= max(first, first if last is None else last)


def to_modality(case: Case, value: int) -> float:
    if case.modality:
        return case.modality.look_up(value)
    slope, intercept = case.rescale or (1.0, 0.0)
    return value * slope + intercept if slope else value


def to_fraction(case: Case, x: float) -> float | None:
    if case.voi:
        return case.voi.look_up(x) / (2**case.voi.bits - 1)
    if case.window is None:
        return None
    center, width, function = case.window
    if (function or "LINEAR") == "LINEAR":
        return ramp(x, center - 0.5, width - 1) if width >= 1 else None
    if width <= 0:
        return None
    if function == "LINEAR_EXACT":
        return ramp(x, center, width)
    return 1 / (1 + math.exp(min(700.0, -4 * (x - center) / width)))


def ramp(x: float, center: float, width: float) -> float:
    """PS3.3 C.11.2.1.2.1 with ymin 0 and ymax 1."""
    if x <= center - width / 2:
        return 0.0
    return 1.0 if x > center + width / 2 else (x - center) / width + 0.5


def stretch(values: list[float], padded: list[bool]) -> list[float]:
    """24 pixels at most: the 0.5 % percentile that occurs is the minimum, from either end."""
    seen = [value for value, pad in zip(values, padded, strict=True) if not pad]
    if not seen:
        return [0.0] * len(values)
    low, high = min(seen), max(seen)
    return [0.5 if low == high else min(max((v - low) / (high - low), 0.0), 1.0) for v in values]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(draw_cases())
def test_any_header_gives_what_the_formulas_give(case: Case) -> None:
    image = render_source(write_case(case)).ravel().astype(np.float64)
    assert np.abs(image - np.array(reference(case))).max() <= 0.5 + 1e-6


@settings(max_examples=40, deadline=None)
@given(draw_cases())
def test_an_image_and_its_monochrome1_inverse_look_the_same(case: Case) -> None:
    """Without transforms that act on the values: what remains is the percentile stretch and the inversion."""
    top = 2**case.bits - 1
    stored = np.array([value & top for value in case.stored], dtype=np.uint16).reshape(4, 6)
    direct = make_dataset(stored, case.bits, PhotometricInterpretation="MONOCHROME2")
    inverse = make_dataset(top - stored, case.bits, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(render_source(to_bytes(direct)), render_source(to_bytes(inverse)))
