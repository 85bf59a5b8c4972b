"""Devices on a phantom film: metal and plastic as lines, each with a box."""

import numpy as np

from training.anatomy import Chest, Grid, Plane, Strokes, draw_lines
from training.findings import Box


def draw_devices(rng: np.random.Generator, chest: Chest, grid: Grid, names: list[str]) -> tuple[Plane, dict[str, Box]]:
    """Metal and plastic as lines; the water they stand for, and a box for each device."""
    lines: Strokes = []
    boxes: dict[str, Box] = {}
    for name in names:
        if name not in DEVICE_DRAWERS:
            continue
        strokes = DEVICE_DRAWERS[name](rng, chest)
        xs, ys = zip(*(point for points, _ in strokes for point in points), strict=True)
        boxes[name] = grid.box(min(xs) - 0.5, min(ys) - 0.5, max(xs) + 0.5, max(ys) + 0.5)
        lines += strokes
    return (6.5 * draw_lines(grid, lines) if lines else np.zeros_like(grid.x)), boxes


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
