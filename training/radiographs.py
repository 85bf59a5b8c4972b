"""Chest film phantoms: line integrals through a simple chest, by the Beer-Lambert law, seeded.

The chest is laid out in centimetres (x from the midline, positive towards the right of the picture, which is the
patient's left; y from the upper film edge). Every organ adds or removes centimetres of water on the way of the ray;
the detector counts what comes through, with scatter and noise, and takes the logarithm.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.anatomy import (
    Chest,
    Grid,
    Plane,
    draw_body,
    draw_bones,
    draw_heart,
    draw_middle,
    draw_soft_parts,
    make_grid,
    make_lungs,
    sample_chest,
    step,
)
from training.devices import draw_devices
from training.findings import Finding, Truth, sample_truth
from training.lesions import FINDING_DRAWERS

GENERATOR_VERSION = "radiograph-2"
WATER_PER_CM = 0.17  # effective attenuation of water near 70 keV, softened by the wide beam
METAL_MARGIN = 0.12  # of the grey scale above the densest tissue, so that metal shows on the spine too
LUNG_DENSITY = 0.26  # inflated lung against water


@dataclass(frozen=True)
class Radiograph:
    """One film: `pixels` uint8 [height, width], white is dense; `truth` names what was drawn, with boxes."""

    pixels: NDArray[np.uint8]
    truth: Truth


def draw_radiograph(seed: int, height: int = 160, lateral: bool = False) -> Radiograph:
    """Draw the film of `seed`, `height` pixels high. The same seed gives the same patient at any height."""
    rng = np.random.default_rng([1, seed])
    view = "LL" if lateral else str(rng.choice(["PA", "AP"], p=[0.7, 0.3]))
    truth = sample_truth(seed, rng, view)
    chest = sample_chest(rng, view)
    grid = make_grid(rng, height)
    if lateral:
        return Radiograph(_expose(rng, _draw_lateral(rng, chest, grid), grid, ""), Truth(seed, view, truth.ctr))
    water, findings = _draw_frontal(rng, chest, grid, truth)
    marker = str(rng.choice(["R", "L", ""], p=[0.4, 0.4, 0.2]))
    return Radiograph(_expose(rng, water, grid, marker), Truth(seed, view, truth.ctr, findings))


def _draw_frontal(
    rng: np.random.Generator, chest: Chest, grid: Grid, truth: Truth
) -> tuple[Plane, tuple[Finding, ...]]:
    """Centimetres of water on each ray, and the findings with the boxes they fill."""
    lungs = make_lungs(rng, chest, grid)
    added = np.zeros_like(grid.x)
    drawn = []
    for finding in truth.findings:
        drawer = FINDING_DRAWERS.get(finding.name)
        if drawer is not None:
            finding = finding.with_box(drawer(rng, chest, grid, lungs, added, finding))
        drawn.append(finding)
    heart, heart_box = draw_heart(rng, chest, grid, truth.ctr)
    lungs.air *= 1 - 0.93 * heart
    water = draw_body(chest, grid) - (1 - LUNG_DENSITY) * lungs.air
    water += 1.3 * heart + draw_middle(rng, chest, grid) + draw_bones(rng, chest, grid, lungs)
    water += lungs.vessels + added + draw_soft_parts(rng, chest, grid)
    metal, boxes = draw_devices(rng, chest, grid, [finding.name for finding in truth.findings])
    boxes["cardiomegaly"] = heart_box
    return water + metal, tuple(f.with_box(boxes[f.name]) if f.name in boxes else f for f in drawn)


def _draw_lateral(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """A plain lateral view: breastbone to the left, spine to the right, heart low in front. No findings are drawn."""
    middle, reach = (chest.apex + chest.dome) / 2 + 1.0, (chest.dome - chest.apex) / 2 + 2.5
    half = 5.0 + (6.5 + chest.skin) * step(grid.y - chest.apex - 1.0, 1.2)
    body = 24 * np.clip(1 - (grid.x / half) ** 2, 0, 1) ** 0.35
    floor = chest.dome - 1.0 + rng.uniform(0.035, 0.06) * (grid.x + 3) ** 2
    gap = np.minimum((1 - np.hypot(grid.x / 9.6, (grid.y - middle) / reach)) * 7, floor - grid.y)
    heart = step((1 - np.hypot((grid.x + 3.6) / 4.8, (grid.y - chest.dome + 4.4) / 5.4)) * 4, 0.25)
    lung = 16 * step(gap, 0.2) * np.clip(0.4 + gap / 5, 0.4, 1) * (1 - 0.6 * heart)
    vertebrae = 0.8 + 0.2 * np.sin(grid.y * 2 * np.pi / 2.6)
    spine = 4.0 * step(1.5 - np.abs(grid.x - 6.4 + 0.012 * (grid.y - middle) ** 2), 0.25) * vertebrae
    ribs = 0.8 * step(gap + 0.5, 0.3) * (np.sin((grid.y - 0.55 * grid.x) * 2 * np.pi / chest.rib_gap) > 0.5)
    water: Plane = body - (1 - LUNG_DENSITY) * lung + spine + ribs
    return water.astype(np.float32)


def _expose(rng: np.random.Generator, water: Plane, grid: Grid, marker: str) -> NDArray[np.uint8]:
    """Beer-Lambert, scatter, quantum noise, logarithm and display: uint8, white is dense."""
    through = np.exp(-WATER_PER_CM * np.maximum(water, 0))
    small = Image.fromarray(through).resize((12, 14), Image.Resampling.BOX)
    scatter = np.asarray(small.resize(through.shape[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
    through = through + rng.uniform(0.05, 0.22) * np.maximum(scatter, 0)
    noise = rng.uniform(0.004, 0.016) * np.sqrt(through.mean() / through)
    log = -np.log(through) + noise * rng.standard_normal(through.shape, dtype=np.float32)
    inside = log[:: max(1, log.shape[0] // 64), :: max(1, log.shape[1] // 64)]
    low, high = np.percentile(inside, [rng.uniform(2, 6), rng.uniform(97, 99.5)])
    high += METAL_MARGIN * (high - low)
    grey = np.clip((log - low) / (high - low), 0, 1) ** rng.uniform(0.8, 1.35)
    if marker:
        grey = np.maximum(grey, _draw_marker(grid, marker, rng.uniform(0.75, 1.0)))
    pixels: NDArray[np.uint8] = (grey * 255).round().astype(np.uint8)
    return pixels


def _draw_marker(grid: Grid, letter: str, brightness: float) -> Plane:
    """The lead letter, on the patient's own side: R on the left of the picture, L on its right."""
    high, wide = grid.x.shape
    canvas = Image.new("L", (wide, high))
    x, y = wide * (0.06 if letter == "R" else 0.90), high * 0.08
    ImageDraw.Draw(canvas).text((x, y), letter, fill=255, font=_marker_font(max(8, round(1.8 * grid.scale))))
    return brightness * np.asarray(canvas, dtype=np.float32) / 255


@cache
def _marker_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
