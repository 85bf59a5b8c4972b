"""Coloured shapes in relations, for the role that COCO plays: one or two objects, five captions each, seeded."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

GENERATOR_VERSION = "scene-2"
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 210),
    "green": (40, 160, 70),
    "yellow": (240, 210, 40),
    "purple": (135, 50, 165),
    "orange": (245, 135, 25),
    "black": (25, 25, 25),
}
BACKGROUNDS = ((250, 250, 250), (225, 225, 230), (205, 220, 235), (235, 225, 205), (215, 235, 215))
# relation -> (its opposite, another wording, where the first object stands from the second: right, down).
# The canonical caption starts with the upper or the left thing, so that a picture has one right first word.
RELATIONS: dict[str, tuple[str, str, tuple[int, int]]] = {
    "above": ("below", "over", (0, -1)),
    "left of": ("right of", "to the left of", (-1, 0)),
}


@dataclass(frozen=True)
class Thing:
    """One object and the words for it."""

    shape: str
    colour: str

    @property
    def words(self) -> str:
        """`an orange circle`."""
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One picture: `pixels` uint8 [height, width, 3]; `relation` is empty when it shows one thing."""

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    relation: str
    captions: tuple[str, ...]


def draw_scene(seed: int, height: int = 160) -> Scene:
    """Draw the scene of `seed`, `height` pixels high, at one of COCO's usual aspects."""
    rng = np.random.default_rng([2, seed])
    things = _sample_things(rng)
    relation = str(rng.choice(list(RELATIONS))) if len(things) == 2 else ""
    width = round(height * float(rng.choice([0.75, 1.0, 4 / 3])))
    # Drawn at twice the size and reduced, for smooth edges.
    canvas = Image.new("RGB", (width * 2, height * 2), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])
    pen = ImageDraw.Draw(canvas)
    for thing, spot in zip(things, _place_things(rng, relation), strict=True):
        _draw_thing(pen, rng, thing, spot, canvas.size)
    pixels = np.asarray(canvas.reduce(2), dtype=np.float32)
    noisy = pixels * rng.uniform(0.85, 1.05) + rng.normal(0, rng.uniform(1, 6), pixels.shape)
    return Scene(np.clip(noisy, 0, 255).astype(np.uint8), things, relation, _describe(things, relation))


def _sample_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    count = 1 if rng.random() < 0.3 else 2
    colours = rng.choice(list(COLOURS), size=count, replace=False)  # two colours: "the red one" stays unambiguous
    return tuple(Thing(str(rng.choice(SHAPES)), str(colour)) for colour in colours)


def _place_things(rng: np.random.Generator, relation: str) -> list[tuple[float, float]]:
    """Centres in fractions of width and height."""
    if not relation:
        return [(rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))]
    right, down = RELATIONS[relation][2]
    apart, drift = rng.uniform(0.22, 0.27), rng.uniform(-0.06, 0.06, 4)
    return [
        (0.5 + right * apart + drift[0], 0.5 + down * apart + drift[1]),
        (0.5 - right * apart + drift[2], 0.5 - down * apart + drift[3]),
    ]


def _draw_thing(
    pen: ImageDraw.ImageDraw, rng: np.random.Generator, thing: Thing, spot: tuple[float, float], size: tuple[int, int]
) -> None:
    radius = rng.uniform(0.15, 0.21) * min(size)
    x, y = spot[0] * size[0], spot[1] * size[1]
    shade = rng.uniform(0.9, 1.08)
    red, green, blue = (min(255, int(value * shade)) for value in COLOURS[thing.colour])
    if thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(red, green, blue))
        return
    turn = rng.uniform(-0.15, 0.15)
    pen.polygon(_outline(thing.shape, x, y, radius, turn), fill=(red, green, blue))


def _outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners around the centre: a triangle points up, a square stands on its side."""
    corners = {"square": 4, "triangle": 3}[shape]
    start = turn - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
    angles = start + 2 * np.pi * np.arange(corners) / corners
    return [(x + 1.25 * radius * float(np.cos(a)), y + 1.25 * radius * float(np.sin(a))) for a in angles]


def _describe(things: tuple[Thing, ...], relation: str) -> tuple[str, ...]:
    """Five captions; the first is the canonical one that the captioner learns."""
    first = things[0].words
    if len(things) == 1:
        bare = first.split(" ", 1)[1]
        return first, f"there is {first}", f"{first} on a plain background", f"a picture of {first}", f"one {bare}"
    second = things[1].words
    opposite, wording, _ = RELATIONS[relation]
    return (
        f"{first} {relation} {second}",
        f"{second} {opposite} {first}",
        f"there is {first} {wording} {second}",
        f"{first} {wording} {second}",
        f"a picture of {first} {relation} {second}",
    )


def every_word() -> list[str]:
    """All words these captions can hold, for the tokenizer's vocabulary."""
    stock = "a an there is on plain background picture of one over under above below to the left right and two shapes"
    return [stock, *SHAPES, *COLOURS]
