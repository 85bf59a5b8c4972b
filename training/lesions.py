"""Findings drawn into a chest: each drawer changes the lungs or adds water, and returns the box it filled."""

import numpy as np

from training.anatomy import Chest, Grid, Lungs, Plane, Strokes, draw_lines, make_texture, step
from training.findings import Box, Finding

EFFUSION_HEIGHT = {"small": (3.8, 5.6), "moderate": (8.5, 11.5), "large": (15.0, 19.0)}
COLLAPSE_CM = {"small": (1.7, 2.6), "large": (4.5, 7.0)}
HAZE = {"mild": 0.34, "moderate": 0.5}
SIGN = {"right": -1.0, "left": 1.0}


def _draw_effusion(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """Fluid fills the lung from the sulcus up, higher at the chest wall: the meniscus."""
    floor = chest.dome + 4.6
    height = rng.uniform(*EFFUSION_HEIGHT[finding.size])
    from_wall = np.maximum(lungs.lateral - lungs.side, 0)
    surface = floor - height + 0.16 * from_wall - 1.6 * np.exp(-from_wall / 1.0)
    fluid = step(grid.y - surface, 0.22) * _on_side(grid, finding.side)
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
    free = step(-edge, 0.1) * side
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
    added += 4.2 * np.clip(1 - (distance / radius) ** 2, 0, 1) ** 0.5
    return grid.box(x - radius, y - radius, x + radius, y + radius)


def _draw_consolidation(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """A cloud with ragged edges in which most of the air is replaced."""
    x, y = _pick_place(rng, chest, finding)
    wide, high = rng.uniform(2.6, 4.0), rng.uniform(2.4, 3.4)
    distance = np.hypot((grid.x - x) / wide, (grid.y - y) / high)
    cloud = step(1.0 - distance + 0.22 * make_texture(rng, grid, 1.8), 0.13)
    cloud = cloud * (0.9 + 0.1 * make_texture(rng, grid, 0.6))
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
    band = step(0.5 - np.abs(grid.y - y - slope * (grid.x - x)), 0.07) * step(half - np.abs(grid.x - x), 0.2)
    added += 3.4 * band * lungs.shape
    return grid.box(x - half, y - 1.0, x + half, y + 1.0)


def _draw_edema(
    rng: np.random.Generator, chest: Chest, grid: Grid, lungs: Lungs, added: Plane, finding: Finding
) -> Box:
    """Haze spreading from the roots of both lungs, with short level lines (Kerley B) at the lower wall."""
    middle = chest.apex + 11.5
    reach = np.exp(-(((lungs.side - 4.5) / 4.6) ** 2) - ((grid.y - middle) / 6.5) ** 2)
    haze = HAZE[finding.size] * reach * (1 + 0.25 * make_texture(rng, grid, 0.9))
    lungs.air *= 1 - np.clip(haze * 1.2, 0, 0.8)
    lines: Strokes = []
    for sign in (-1.0, 1.0):
        for row in np.arange(chest.dome - 4.0, chest.dome + 1.0, 0.9) + rng.uniform(-0.2, 0.2):
            lines.append(([(sign * (chest.width - 1.8), row), (sign * (chest.width - 0.2), row)], 0.18))
    added += 1.5 * draw_lines(grid, lines) * lungs.shape
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
