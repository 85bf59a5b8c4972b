"""Chest film phantoms: line integrals through a simple chest, by the Beer-Lambert law, seeded.

The chest is laid out in centimetres (x from the midline, positive towards the right of the picture, which is the
patient's left; y from the upper film edge). Every organ adds or removes centimetres of water on the way of the ray;
the detector counts what comes through, with scatter and noise, and takes the logarithm.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.findings import Box, Finding, Truth, sample_truth

Plane = NDArray[Any]  # floating, [height, width]

GENERATOR_VERSION = "radiograph-1"
# Film sizes in centimetres, width x height: portrait 5:6, portrait 35x43, square 43x43 and landscape 43x36.
FILM_SIZES = ((36.0, 43.0), (35.0, 43.0), (42.0, 42.0), (43.0, 39.0))
WATER_PER_CM = 0.17  # effective attenuation of water near 70 keV, softened by the wide beam
LUNG_DENSITY = 0.26  # inflated lung against water
EFFUSION_HEIGHT = {"small": (3.8, 5.6), "moderate": (8.5, 11.5), "large": (15.0, 19.0)}
COLLAPSE_CM = {"small": (1.7, 2.6), "large": (4.5, 7.0)}
HAZE = {"mild": 0.34, "moderate": 0.5}
SIGN = {"right": -1.0, "left": 1.0}


@dataclass(frozen=True)
class Radiograph:
    """One film: `pixels` uint8 [height, width], white is dense; `truth` names what was drawn, with boxes."""

    pixels: NDArray[np.uint8]
    truth: Truth


@dataclass(frozen=True)
class Chest:
    """One patient's measures, in centimetres."""

    width: float  # half of the inner chest width at the widest
    apex: float
    dome: float  # height of the right dome; the left one stands lower
    skin: float  # soft tissue outside the ribs
    depth: float  # front to back
    tilt: float  # of the heart, radians
    rib_gap: float
    breast: float  # thickness, 0 for none
    bubble: float  # gas in the stomach, 0 for none


@dataclass(frozen=True)
class Grid:
    """Film coordinates: `x`, `y` float32 [height, width] in centimetres, and the way back to pixels."""

    x: Plane
    y: Plane
    scale: float
    left: float
    top: float
    film: tuple[float, float]

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Column and row of a point given in centimetres."""
        return (x - self.left) * self.scale, (y - self.top) * self.scale

    def box(self, x0: float, y0: float, x1: float, y1: float) -> Box:
        """A box in fractions of the picture, cut at its edges."""
        wide, high = self.film
        values = (x0 - self.left) / wide, (y0 - self.top) / high, (x1 - self.left) / wide, (y1 - self.top) / high
        a, b, c, d = (round(float(min(max(value, 0.0), 1.0)), 4) for value in values)
        return a, b, c, d


@dataclass
class Lungs:
    """The two lungs on the grid: `gap` is the signed distance inside their outline, `air` the air on the ray."""

    side: Plane  # |x|
    lateral: Plane  # half width of the chest at this height
    sulcus: Plane  # height of the diaphragm
    gap: Plane
    shape: Plane
    air: Plane
    vessels: Plane


def draw_radiograph(seed: int, height: int = 160, lateral: bool = False) -> Radiograph:
    """Draw the film of `seed`, `height` pixels high. The same seed gives the same patient at any height."""
    rng = np.random.default_rng([1, seed])
    view = "LL" if lateral else str(rng.choice(["PA", "AP"], p=[0.7, 0.3]))
    truth = sample_truth(seed, rng, view)
    chest = _sample_chest(rng, view)
    grid = _make_grid(rng, height)
    if lateral:
        return Radiograph(_expose(rng, _draw_lateral(rng, chest, grid), grid, ""), Truth(seed, view, truth.ctr))
    water, findings = _draw_frontal(rng, chest, grid, truth)
    marker = str(rng.choice(["R", "L", ""], p=[0.4, 0.4, 0.2]))
    return Radiograph(_expose(rng, water, grid, marker), Truth(seed, view, truth.ctr, findings))


def _sample_chest(rng: np.random.Generator, view: str) -> Chest:
    apex = rng.uniform(5.5, 8.0)
    reach = rng.uniform(20.5, 23.5) - (2.0 if view == "AP" else 0.0)  # lying patients breathe in less
    return Chest(
        width=rng.uniform(12.4, 14.4),
        apex=apex,
        dome=apex + reach,
        skin=rng.uniform(1.6, 3.6),
        depth=rng.uniform(17.0, 22.0),
        tilt=rng.uniform(0.3, 0.55),
        rib_gap=rng.uniform(2.0, 2.4),
        breast=rng.uniform(0.8, 2.4) if rng.random() < 0.45 else 0.0,
        bubble=rng.uniform(2.0, 5.0) if rng.random() < 0.7 else 0.0,
    )


def _make_grid(rng: np.random.Generator, height: int) -> Grid:
    wide, high = FILM_SIZES[int(rng.integers(len(FILM_SIZES)))]
    zoom = rng.uniform(0.88, 0.99)
    wide, high = wide * zoom, high * zoom
    scale = height / high
    left, top = rng.uniform(-1.2, 1.2) - wide / 2, rng.uniform(-1.5, 1.5)
    columns = (np.arange(round(wide * scale), dtype=np.float32) + 0.5) / scale + left
    rows = (np.arange(height, dtype=np.float32) + 0.5) / scale + top
    x, y = np.meshgrid(columns, rows)
    return Grid(x, y, scale, float(left), float(top), (wide, high))


def _step(distance: Plane, softness: float) -> Plane:
    """0 outside, 1 inside, with an edge about four `softness` centimetres wide."""
    return (0.5 + 0.5 * np.tanh(distance / (2 * softness))).astype(np.float32)


def _make_lungs(rng: np.random.Generator, chest: Chest, grid: Grid) -> Lungs:
    side = np.abs(grid.x)
    t = np.clip((grid.y - chest.apex) / (chest.dome - chest.apex), 0, 1.3)
    lateral = chest.width * (0.42 + 0.58 * (1 - np.clip(1 - t / 0.8, 0, 1) ** 2.2))
    dome = chest.dome + np.where(grid.x > 0, 1.2, 0.0)
    middle = chest.width * 0.45
    outer = 4.6 * ((side - middle) / (chest.width - middle)) ** 2  # down to the costophrenic angle
    slope = np.where(side > middle, outer, 1.3 * (1 - side / middle) ** 2)
    sulcus = (dome + slope).astype(np.float32)
    roof = chest.apex + 0.3 * (side - 4.2) ** 2 * (side < 4.2) + 0.1 * (side - 4.2) ** 2 * (side >= 4.2)
    walls: list[Plane] = [lateral - side, side - 2.0, sulcus - grid.y, (grid.y - roof) * 0.8]
    gap = np.minimum.reduce(walls).astype(np.float32)
    shape = _step(gap, 0.16)
    air = shape * (0.62 * chest.depth) * np.clip(0.3 + gap / 3.0, 0.3, 1) ** 0.6
    return Lungs(side, lateral.astype(np.float32), sulcus, gap, shape, air, _draw_vessels(rng, chest, grid) * shape)


def _draw_frontal(
    rng: np.random.Generator, chest: Chest, grid: Grid, truth: Truth
) -> tuple[Plane, tuple[Finding, ...]]:
    """Centimetres of water on each ray, and the findings with the boxes they fill."""
    lungs = _make_lungs(rng, chest, grid)
    added = np.zeros_like(grid.x)
    drawn = []
    for finding in truth.findings:
        drawer = FINDING_DRAWERS.get(finding.name)
        if drawer is not None:
            finding = finding.with_box(drawer(rng, chest, grid, lungs, added, finding))
        drawn.append(finding)
    heart, heart_box = _draw_heart(rng, chest, grid, truth.ctr)
    lungs.air *= 1 - 0.93 * heart
    water = _draw_body(chest, grid) - (1 - LUNG_DENSITY) * lungs.air
    water += 1.3 * heart + _draw_middle(rng, chest, grid) + _draw_bones(rng, chest, grid, lungs)
    water += lungs.vessels + added + _draw_soft_parts(rng, chest, grid)
    metal, boxes = _draw_devices(rng, chest, grid, [finding.name for finding in truth.findings])
    boxes["cardiomegaly"] = heart_box
    return water + metal, tuple(f.with_box(boxes[f.name]) if f.name in boxes else f for f in drawn)


def _draw_body(chest: Chest, grid: Grid) -> Plane:
    y = grid.y
    shoulders = 0.5 + 0.5 * np.tanh((y - (chest.apex - 2.4)) / 1.1)
    half = 6.2 + (chest.width + chest.skin + 4.5 - 6.2) * shoulders - 4.5 * _step(y - (chest.apex + 6), 1.6)
    inside = np.clip(1 - (grid.x / half) ** 2, 0, 1)
    return (chest.depth * inside**0.32 * (0.72 + 0.28 * shoulders)).astype(np.float32)


def _draw_heart(rng: np.random.Generator, chest: Chest, grid: Grid, ctr: float) -> tuple[Plane, Box]:
    """A tilted ellipse whose horizontal extent is exactly `ctr` of the inner chest width."""
    half = ctr * chest.width  # half of the heart's width
    tall = rng.uniform(4.6, 5.4) * (0.7 + 0.3 * ctr / 0.44)
    share = rng.uniform(0.62, 0.7)  # two thirds of the heart lie to the patient's left
    centre_x = half * (2 * share - 1)
    cos, sin = np.cos(chest.tilt), np.sin(chest.tilt)
    long = np.sqrt(max(half**2 - (tall * sin) ** 2, 4.0)) / cos
    centre_y = chest.dome - 0.62 * tall
    dx, dy = grid.x - centre_x, grid.y - centre_y
    radius = np.sqrt(((dx * cos + dy * sin) / long) ** 2 + ((dy * cos - dx * sin) / tall) ** 2)
    box = grid.box(centre_x - half, centre_y - tall * 1.1, centre_x + half, centre_y + tall * 1.1)
    return _step((1 - radius) * half * 0.8, 0.2), box


def _draw_middle(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """Spine, great vessels with the aortic knob, and the windpipe."""
    side = np.abs(grid.x)
    spine = 2.3 * _step(1.9 - side, 0.25) * (0.9 + 0.1 * np.sin(grid.y * 2 * np.pi / 2.6))
    upper = _step(chest.dome - 3 - grid.y, 1.5)
    vessels = 1.9 * _step(2.6 - np.abs(grid.x - 0.2), 0.3) * upper
    knob_y, knob = chest.apex + rng.uniform(5.0, 6.5), rng.uniform(1.3, 1.9)
    knob_plane = 1.8 * _step(knob - np.hypot(grid.x - 2.3, grid.y - knob_y), 0.2)
    windpipe = 2.4 * _step(0.85 - side, 0.12) * _step(chest.apex + 7.5 - grid.y, 0.5)
    return (spine + vessels + knob_plane - windpipe).astype(np.float32)


def _draw_bones(rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs) -> Plane:
    """Ribs as two periodic bands (rear parts fall gently, front arcs rise to the breastbone), and collar bones."""
    side, strength = lungs.side, rng.uniform(0.7, 1.15)
    cage = _step(lungs.lateral + 0.5 - side, 0.2) * _step(side - 2.0, 0.3) * _step(grid.y - chest.apex + 0.5, 0.4)
    cage = cage * _step(chest.dome + 4.5 - grid.y, 1.0)
    rear = grid.y - chest.apex - 0.30 * side - 0.055 * np.maximum(side - 6, 0) ** 2
    front = grid.y - chest.apex - 6 + 0.55 * (chest.width - side) - 0.05 * np.maximum(side - 8, 0) ** 2
    ribs = _band(rear, chest.rib_gap, 0.20) * 1.15 + _band(front, chest.rib_gap * 1.15, 0.17) * 0.5 * (side > 4)
    rise = rng.uniform(0.16, 0.26)
    line = grid.y - (chest.apex + 2.6 - rise * (side - 1.5) + 0.012 * (side - 7) ** 2)
    collar = _step(0.6 - np.abs(line), 0.12) * _step(side - 1.6, 0.2)
    bones: Plane = strength * (ribs * cage + 1.5 * collar)
    return bones.astype(np.float32)


def _band(height: Plane, period: float, half: float) -> Plane:
    """1 on bands of 2*`half` of each `period`, soft at their edges."""
    phase = np.abs(height / period - np.round(height / period))
    return np.clip((half - phase) / 0.08 + 0.5, 0, 1)


def _draw_soft_parts(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """Breasts, and gas in the stomach under the patient's left dome."""
    low = chest.dome - rng.uniform(0.5, 3.0)
    breast = np.clip(1 - ((np.abs(grid.x) - 7.5) / 5.2) ** 2 - ((grid.y - low) / 4.6) ** 2, 0, 1) ** 0.5
    across, down = rng.uniform(2.2, 3.4), rng.uniform(1.1, 1.8)
    gas = ((grid.x - rng.uniform(5, 7)) / across) ** 2 + ((grid.y - chest.dome - 4.2) / down) ** 2
    return (chest.breast * breast - chest.bubble * np.clip((1 - gas) * 1.8, 0, 1)).astype(np.float32)


def _draw_vessels(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """Branching vessels from both roots of the lung, thinning outwards."""
    lines: list[tuple[list[tuple[float, float]], float]] = []
    for sign in (-1.0, 1.0):
        for angle in np.linspace(-1.25, 1.3, 9) + rng.normal(0, 0.12, 9):
            lines += _grow_vessel(rng, sign * 3.0, chest.apex + 10.5, sign, float(angle))
    return 1.1 * _draw_lines(grid, lines)


def _grow_vessel(
    rng: np.random.Generator, x: float, y: float, sign: float, angle: float
) -> list[tuple[list[tuple[float, float]], float]]:
    pieces, thick = [], 0.55
    for _ in range(5):
        angle += rng.normal(0, 0.3)
        length = rng.uniform(1.3, 2.3)
        end = x + sign * length * float(np.cos(angle)), y + length * float(np.sin(angle))
        pieces.append(([(x, y), end], thick))
        (x, y), thick = end, thick * 0.72
    return pieces


def _draw_lines(grid: Grid, lines: list[tuple[list[tuple[float, float]], float]]) -> Plane:
    """Polylines in centimetres as a plane of 0..1, smoothed by drawing at twice the size."""
    high, wide = grid.x.shape
    canvas = Image.new("L", (wide * 2, high * 2))
    pen = ImageDraw.Draw(canvas)
    for points, thick in lines:
        path = [(2 * px, 2 * py) for px, py in (grid.pixel(*point) for point in points)]
        breadth = thick * grid.scale * 2
        pen.line(path, fill=int(255 * min(1.0, breadth)), width=max(1, round(breadth)), joint="curve")
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


# --- findings: each drawer changes the lungs or adds water, and returns the box it filled -------------------------


def _draw_effusion(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """Fluid fills the lung from the sulcus up, higher at the chest wall: the meniscus."""
    floor = chest.dome + 4.6
    height = rng.uniform(*EFFUSION_HEIGHT[finding.size])
    from_wall = np.maximum(lungs.lateral - lungs.side, 0)
    surface = floor - height + 0.16 * from_wall - 1.6 * np.exp(-from_wall / 1.0)
    fluid = _step(grid.y - surface, 0.22) * _on_side(grid, finding.side)
    lungs.air *= 1 - 0.95 * fluid
    lungs.vessels *= 1 - fluid
    added += 0.4 * fluid * lungs.shape
    return _side_box(grid, chest, finding.side, floor - height - 1.0, floor)


def _draw_pneumothorax(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """Air between lung and wall: darker, without vessels, bounded by the thin pleural line."""
    collapse = rng.uniform(*COLLAPSE_CM[finding.size])
    t = np.clip((grid.y - chest.apex) / (chest.dome - chest.apex), 0, 1)
    from_wall = np.minimum(lungs.lateral - lungs.side, (grid.y - chest.apex) * 0.8)
    edge = from_wall - collapse * (1.15 - 0.75 * t)
    side = _on_side(grid, finding.side) * lungs.shape
    free = _step(-edge, 0.1) * side
    lungs.air *= 1 + 0.32 * free
    lungs.vessels *= 1 - free
    added += (1.5 * np.exp(-((edge / 0.2) ** 2)) - 1.2 * free) * side
    return _side_box(grid, chest, finding.side, chest.apex, chest.dome)


def _draw_nodule(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    x, y = _pick_place(rng, chest, finding)
    radius = finding.millimetres / 20
    distance = np.hypot(grid.x - x, grid.y - y)
    added += 3.6 * np.clip(1 - (distance / radius) ** 2, 0, 1) ** 0.5
    return grid.box(x - radius, y - radius, x + radius, y + radius)


def _draw_consolidation(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """A cloud with ragged edges in which most of the air is replaced."""
    x, y = _pick_place(rng, chest, finding)
    wide, high = rng.uniform(2.6, 4.0), rng.uniform(2.4, 3.4)
    distance = np.hypot((grid.x - x) / wide, (grid.y - y) / high)
    cloud = _step(1.0 - distance + 0.22 * _make_texture(rng, grid, 1.8), 0.13)
    cloud = cloud * (0.9 + 0.1 * _make_texture(rng, grid, 0.6))
    cloud = np.clip(cloud, 0, 1)
    lungs.air *= 1 - 0.72 * cloud
    return grid.box(x - wide, y - high, x + wide, y + high)


def _draw_atelectasis(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """A plate of collapsed lung: a straight, nearly level band above the diaphragm."""
    sign = SIGN[finding.side]
    x, y = sign * rng.uniform(7.0, 8.5), chest.dome - rng.uniform(1.6, 3.2)
    half, slope = rng.uniform(2.6, 3.6), rng.uniform(-0.25, 0.25)
    band = _step(0.42 - np.abs(grid.y - y - slope * (grid.x - x)), 0.07) * _step(half - np.abs(grid.x - x), 0.2)
    added += 3.4 * band * lungs.shape
    return grid.box(x - half, y - 1.0, x + half, y + 1.0)


def _draw_edema(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """Haze spreading from the roots of both lungs, with short level lines (Kerley B) at the lower wall."""
    middle = chest.apex + 11.5
    reach = np.exp(-(((lungs.side - 4.5) / 4.6) ** 2) - ((grid.y - middle) / 6.5) ** 2)
    haze = HAZE[finding.size] * reach * (1 + 0.25 * _make_texture(rng, grid, 0.9))
    lungs.air *= 1 - np.clip(haze * 1.2, 0, 0.8)
    lines: list[tuple[list[tuple[float, float]], float]] = []
    for sign in (-1.0, 1.0):
        for row in np.arange(chest.dome - 4.0, chest.dome + 1.0, 0.9) + rng.uniform(-0.2, 0.2):
            lines.append(([(sign * (chest.width - 1.8), row), (sign * (chest.width - 0.2), row)], 0.18))
    added += 1.5 * _draw_lines(grid, lines) * lungs.shape
    return grid.box(-chest.width * 0.8, middle - 7, chest.width * 0.8, middle + 7)


FINDING_DRAWERS = {
    "pleural effusion": _draw_effusion,
    "pneumothorax": _draw_pneumothorax,
    "nodule": _draw_nodule,
    "consolidation": _draw_consolidation,
    "atelectasis": _draw_atelectasis,
    "pulmonary edema": _draw_edema,
}


def _on_side(grid: Grid, side: str) -> Plane:
    if side == "bilateral":
        return np.ones_like(grid.x)
    return (grid.x * SIGN[side] > 0).astype(np.float32)


def _side_box(grid: Grid, chest: Chest, side: str, top: float, bottom: float) -> Box:
    if side == "bilateral":
        return grid.box(-chest.width, top, chest.width, bottom)
    edges = sorted((SIGN[side] * 2.0, SIGN[side] * chest.width))
    return grid.box(edges[0], top, edges[1], bottom)


def _pick_place(rng: np.random.Generator, chest: Chest, finding: Finding) -> tuple[float, float]:
    """A spot well inside the lung, in the named third of its height."""
    share = {"upper": (0.22, 0.34), "middle": (0.45, 0.58), "lower": (0.72, 0.86)}[finding.zone]
    y = chest.apex + rng.uniform(*share) * (chest.dome - chest.apex)
    reach = (4.6, 6.8) if finding.zone == "upper" else (5.6, 8.8)
    far = (7.5, 9.5) if finding.zone == "lower" else reach  # clear of the heart
    return SIGN[finding.side] * rng.uniform(*far), float(y)


def _make_texture(rng: np.random.Generator, grid: Grid, grain_cm: float) -> Plane:
    """Smooth noise of unit variance whose grains measure about `grain_cm`."""
    wide, high = (max(2, round(extent / grain_cm)) for extent in grid.film)
    coarse = Image.fromarray(rng.standard_normal((high, wide), dtype=np.float32))
    return np.asarray(coarse.resize(grid.x.shape[::-1], Image.Resampling.BICUBIC), dtype=np.float32)


# --- devices ----------------------------------------------------------------------------------------------------


def _draw_devices(rng: np.random.Generator, chest: Chest, grid: Grid, names: list[str]) -> tuple[Plane, dict[str, Box]]:
    """Metal and plastic as lines; the water they stand for, and a box for each device."""
    lines: list[tuple[list[tuple[float, float]], float]] = []
    boxes: dict[str, Box] = {}
    for name in names:
        if name not in DEVICE_DRAWERS:
            continue
        strokes = DEVICE_DRAWERS[name](rng, chest)
        xs, ys = zip(*(point for points, _ in strokes for point in points), strict=True)
        boxes[name] = grid.box(min(xs) - 0.5, min(ys) - 0.5, max(xs) + 0.5, max(ys) + 0.5)
        lines += strokes
    return (6.5 * _draw_lines(grid, lines) if lines else np.zeros_like(grid.x)), boxes


Strokes = list[tuple[list[tuple[float, float]], float]]


def _draw_pacemaker(rng: np.random.Generator, chest: Chest) -> Strokes:
    """A can under the patient's left collar bone and one lead into the right ventricle."""
    x, y = rng.uniform(7.5, 9.0), chest.apex + rng.uniform(3.6, 5.0)
    vein = [(x - 1.5, y - 0.8), (3.0, chest.apex + 3.0), (-1.6, chest.apex + 7.0)]
    lead = [*vein, (-2.0, chest.dome - 6), (3.0, chest.dome - 1.5)]
    return [([(x - 1.2, y), (x + 1.2, y)], 3.2), (lead, 0.35)]


def _draw_central_line(rng: np.random.Generator, chest: Chest) -> Strokes:
    """From the patient's right collar bone into the superior vena cava."""
    tip = (-1.9, chest.apex + rng.uniform(9, 12))
    return [([(-9.5, chest.apex + 1.0), (-4.5, chest.apex + 2.2), (-2.0, chest.apex + 4.5), tip], 0.4)]


def _draw_endotracheal_tube(rng: np.random.Generator, chest: Chest) -> Strokes:
    return [([(rng.uniform(-0.3, 0.3), -2.0), (0.0, chest.apex + rng.uniform(3.0, 5.0))], 0.7)]


def _draw_enteric_tube(rng: np.random.Generator, chest: Chest) -> Strokes:
    """Down the gullet, through the diaphragm, its tip in the stomach."""
    tip = (rng.uniform(5, 7), chest.dome + 5.0)
    return [([(0.9, -2.0), (0.9, chest.apex + 12), (1.6, chest.dome + 1.0), tip], 0.4)]


def _draw_sternal_wires(rng: np.random.Generator, chest: Chest) -> Strokes:
    rows = chest.apex + 4.5 + np.arange(6) * rng.uniform(2.2, 2.6)
    return [([(-0.6, y), (0.0, y + 0.45), (0.6, y), (0.0, y - 0.45), (-0.6, y)], 0.3) for y in rows.tolist()]


DEVICE_DRAWERS = {
    "pacemaker": _draw_pacemaker,
    "central line": _draw_central_line,
    "endotracheal tube": _draw_endotracheal_tube,
    "enteric tube": _draw_enteric_tube,
    "sternal wires": _draw_sternal_wires,
}


# --- the lateral film and the exposure --------------------------------------------------------------------------


def _draw_lateral(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """A plain lateral view: breastbone to the left, spine to the right, heart low in front. No findings are drawn."""
    t = np.clip((grid.y - chest.apex) / (chest.dome - chest.apex), 0, 1.3)
    half = 7.0 + 4.0 * np.sin(np.clip(t, 0, 1) * 1.9)
    body = 26 * np.clip(1 - (grid.x / (half + chest.skin)) ** 2, 0, 1) ** 0.3
    floor = chest.dome - 1.5 + 0.045 * (grid.x + 3) ** 2
    gap = np.minimum.reduce([half - np.abs(grid.x), floor - grid.y, grid.y - chest.apex])
    heart = np.hypot((grid.x + 3.2) / 5.2, (grid.y - chest.dome + 4.2) / 5.6)
    lung = 17 * _step(gap, 0.2) * np.clip(0.4 + gap / 5, 0.4, 1) * (1 - 0.6 * _step((1 - heart) * 4, 0.25))
    spine = 4.5 * _step(1.7 - np.abs(grid.x - 6.2 - 0.01 * (grid.y - 20) ** 2), 0.25)
    water: Plane = body - (1 - LUNG_DENSITY) * lung + spine * (0.85 + 0.15 * np.sin(grid.y * 2.4))
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
