"""The chest of a phantom film: its measures, its outline on the film's grid, and its organs as centimetres of water.

x counts from the midline, positive towards the right of the picture (the patient's left), y from the upper film edge,
both in centimetres. Planes are floating arrays [height, width].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training.findings import Box

Plane = NDArray[Any]
Strokes = list[tuple[list[tuple[float, float]], float]]  # polylines and their thickness

# Film sizes in centimetres, width x height: portrait 5:6 and 35x43, square, landscape.
FILM_SIZES = ((36.0, 43.0), (35.0, 43.0), (42.0, 42.0), (43.0, 39.0))


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


def sample_chest(rng: np.random.Generator, view: str) -> Chest:
    """Invent a patient's measures."""
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


def make_grid(rng: np.random.Generator, height: int) -> Grid:
    """A film of one of the usual sizes, `height` pixels high, not quite centred on the patient."""
    wide, high = FILM_SIZES[int(rng.integers(len(FILM_SIZES)))]
    zoom = rng.uniform(0.88, 0.99)
    wide, high = wide * zoom, high * zoom
    scale = height / high
    left, top = rng.uniform(-1.2, 1.2) - wide / 2, rng.uniform(-1.5, 1.5)
    columns = (np.arange(round(wide * scale), dtype=np.float32) + 0.5) / scale + left
    rows = (np.arange(height, dtype=np.float32) + 0.5) / scale + top
    x, y = np.meshgrid(columns, rows)
    return Grid(x, y, scale, float(left), float(top), (wide, high))


def step(distance: Plane, softness: float) -> Plane:
    """0 outside, 1 inside, with an edge about four `softness` centimetres wide."""
    return (0.5 + 0.5 * np.tanh(distance / (2 * softness))).astype(np.float32)


def make_lungs(rng: np.random.Generator, chest: Chest, grid: Grid) -> Lungs:
    """Both lungs, with domed diaphragms and deep costophrenic angles."""
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
    shape = step(gap, 0.16)
    air = shape * (0.62 * chest.depth) * np.clip(0.3 + gap / 3.0, 0.3, 1) ** 0.6
    return Lungs(side, lateral.astype(np.float32), sulcus, gap, shape, air, _draw_vessels(rng, chest, grid) * shape)


def draw_body(chest: Chest, grid: Grid) -> Plane:
    """Neck, shoulders and trunk without their organs."""
    y = grid.y
    shoulders = 0.5 + 0.5 * np.tanh((y - (chest.apex - 2.4)) / 1.1)
    half = 6.2 + (chest.width + chest.skin + 4.5 - 6.2) * shoulders - 4.5 * step(y - (chest.apex + 6), 1.6)
    inside = np.clip(1 - (grid.x / half) ** 2, 0, 1)
    return (chest.depth * inside**0.32 * (0.72 + 0.28 * shoulders)).astype(np.float32)


def draw_heart(rng: np.random.Generator, chest: Chest, grid: Grid, ctr: float) -> tuple[Plane, Box]:
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
    return step((1 - radius) * half * 0.8, 0.2), box


def draw_middle(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """Spine, great vessels with the aortic knob, and the windpipe."""
    side = np.abs(grid.x)
    spine = 2.3 * step(1.9 - side, 0.25) * (0.9 + 0.1 * np.sin(grid.y * 2 * np.pi / 2.6))
    upper = step(chest.dome - 3 - grid.y, 1.5)
    vessels = 1.9 * step(2.6 - np.abs(grid.x - 0.2), 0.3) * upper
    knob_y, knob = chest.apex + rng.uniform(5.0, 6.5), rng.uniform(1.3, 1.9)
    knob_plane = 1.8 * step(knob - np.hypot(grid.x - 2.3, grid.y - knob_y), 0.2)
    windpipe = 2.4 * step(0.85 - side, 0.12) * step(chest.apex + 7.5 - grid.y, 0.5)
    return (spine + vessels + knob_plane - windpipe).astype(np.float32)


def draw_bones(rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs) -> Plane:
    """Ribs as two periodic bands (rear parts fall gently, front arcs rise to the breastbone), and collar bones."""
    side, strength = lungs.side, rng.uniform(0.7, 1.15)
    cage = step(lungs.lateral + 0.5 - side, 0.2) * step(side - 2.0, 0.3) * step(grid.y - chest.apex + 0.5, 0.4)
    cage = cage * step(chest.dome + 4.5 - grid.y, 1.0)
    rear = grid.y - chest.apex - 0.30 * side - 0.055 * np.maximum(side - 6, 0) ** 2
    front = grid.y - chest.apex - 6 + 0.55 * (chest.width - side) - 0.05 * np.maximum(side - 8, 0) ** 2
    ribs = _band(rear, chest.rib_gap, 0.20) * 1.15 + _band(front, chest.rib_gap * 1.15, 0.17) * 0.5 * (side > 4)
    rise = rng.uniform(0.16, 0.26)
    line = grid.y - (chest.apex + 2.6 - rise * (side - 1.5) + 0.012 * (side - 7) ** 2)
    collar = step(0.6 - np.abs(line), 0.12) * step(side - 1.6, 0.2)
    bones: Plane = strength * (ribs * cage + 1.5 * collar)
    return bones.astype(np.float32)


def _band(height: Plane, period: float, half: float) -> Plane:
    """1 on bands of 2*`half` of each `period`, soft at their edges."""
    phase = np.abs(height / period - np.round(height / period))
    return np.clip((half - phase) / 0.08 + 0.5, 0, 1)


def draw_soft_parts(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """Breasts, and gas in the stomach under the patient's left dome."""
    low = chest.dome - rng.uniform(0.5, 3.0)
    breast = np.clip(1 - ((np.abs(grid.x) - 7.5) / 5.2) ** 2 - ((grid.y - low) / 4.6) ** 2, 0, 1) ** 0.5
    across, down = rng.uniform(2.2, 3.4), rng.uniform(1.1, 1.8)
    gas = ((grid.x - rng.uniform(5, 7)) / across) ** 2 + ((grid.y - chest.dome - 4.2) / down) ** 2
    return (chest.breast * breast - chest.bubble * np.clip((1 - gas) * 1.8, 0, 1)).astype(np.float32)


def _draw_vessels(rng: np.random.Generator, chest: Chest, grid: Grid) -> Plane:
    """Branching vessels from both roots of the lung, thinning outwards."""
    lines: Strokes = []
    for sign in (-1.0, 1.0):
        for angle in np.linspace(-1.25, 1.3, 9) + rng.normal(0, 0.12, 9):
            lines += _grow_vessel(rng, sign * 3.0, chest.apex + 10.5, sign, float(angle))
    return 1.1 * draw_lines(grid, lines)


def _grow_vessel(rng: np.random.Generator, x: float, y: float, sign: float, angle: float) -> Strokes:
    pieces, thick = [], 0.55
    for _ in range(5):
        angle += rng.normal(0, 0.3)
        length = rng.uniform(1.3, 2.3)
        end = x + sign * length * float(np.cos(angle)), y + length * float(np.sin(angle))
        pieces.append(([(x, y), end], thick))
        (x, y), thick = end, thick * 0.72
    return pieces


def draw_lines(grid: Grid, lines: Strokes) -> Plane:
    """Polylines in centimetres as a plane of 0..1, smoothed by drawing at twice the size."""
    high, wide = grid.x.shape
    canvas = Image.new("L", (wide * 2, high * 2))
    pen = ImageDraw.Draw(canvas)
    for points, thick in lines:
        path = [(2 * px, 2 * py) for px, py in (grid.pixel(*point) for point in points)]
        breadth = thick * grid.scale * 2
        pen.line(path, fill=int(255 * min(1.0, breadth)), width=max(1, round(breadth)), joint="curve")
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def make_texture(rng: np.random.Generator, grid: Grid, grain_cm: float) -> Plane:
    """Smooth noise of unit variance whose grains measure about `grain_cm`."""
    wide, high = (max(2, round(extent / grain_cm)) for extent in grid.film)
    coarse = Image.fromarray(rng.standard_normal((high, wide), dtype=np.float32))
    return np.asarray(coarse.resize(grid.x.shape[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
