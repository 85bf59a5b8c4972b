"""Training data in memory: pictures at the model's size as uint8, captions, and light augmentation.

Serving fits every picture with `fit_picture`'s steps (BICUBIC to a square, the aspect ignored, as BLIP does); training
uses this same function, so both see the same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.nn import functional

from training.findings import Truth
from training.phantom_text import caption_truth
from training.radiographs import draw_radiograph
from training.scenes import draw_scene

# Seeds are apart by role, so a film that scores or demonstrates a model was never trained on.
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 0, 5_000_000, 9_000_000
LATERAL_SHARE = 0.04
EQUALISED_SHARE = 0.12  # MIMIC-CXR-JPG pictures are histogram-equalised; a film must read the same either way
# Films arrive in all sizes; a small drawing reduced to the model's size is noisier than a large one.
HEIGHTS, HEIGHT_SHARES = (160, 256, 448), (0.5, 0.35, 0.15)


@dataclass(frozen=True)
class PictureSet:
    """`pixels` uint8 [count, 3, size, size] and the caption of each picture."""

    pixels: torch.Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def digest(self) -> str:
        """sha256 over pixels and captions: two sets with one digest are the same training data."""
        state = hashlib.sha256(self.pixels.numpy().tobytes())
        state.update("\n".join(self.captions).encode())
        return state.hexdigest()


def fit_picture(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Any picture as uint8 [3, size, size]."""
    fitted = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1))


def make_film(size: int, seed: int) -> tuple[NDArray[np.uint8], Truth]:
    """The film of `seed` at the model's size, and what is true of it."""
    rng = np.random.default_rng([3, seed])
    height = int(rng.choice(HEIGHTS, p=HEIGHT_SHARES))
    film = draw_radiograph(seed, height, lateral=bool(rng.random() < LATERAL_SHARE))
    picture = Image.fromarray(film.pixels)
    if rng.random() < EQUALISED_SHARE:
        picture = ImageOps.equalize(picture)
    return fit_picture(picture, size), film.truth


def make_radiograph(size: int, seed: int) -> tuple[NDArray[np.uint8], str]:
    """The film of `seed` at the model's size, and its caption."""
    pixels, truth = make_film(size, seed)
    return pixels, caption_truth(truth)


def make_scene(size: int, seed: int) -> tuple[NDArray[np.uint8], str]:
    """The scene of `seed` at the model's size, and its canonical caption."""
    scene = draw_scene(seed)
    return fit_picture(Image.fromarray(scene.pixels), size), scene.captions[0]


def make_radiographs(count: int, size: int, first_seed: int, processes: int = 1) -> PictureSet:
    """`count` films with the seeds from `first_seed` on."""
    return _make_set(partial(make_radiograph, size), range(first_seed, first_seed + count), processes)


def make_scenes(count: int, size: int, first_seed: int, processes: int = 1) -> PictureSet:
    """`count` scenes with the seeds from `first_seed` on."""
    return _make_set(partial(make_scene, size), range(first_seed, first_seed + count), processes)


def _make_set(make: Callable[[int], tuple[NDArray[np.uint8], str]], seeds: range, processes: int) -> PictureSet:
    if processes == 1:
        return _stack(map(make, seeds))
    # spawn: a forked child would inherit torch's threads in an unknown state
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return _stack(pool.map(make, seeds, chunksize=64))


def _stack(made: Iterable[tuple[NDArray[np.uint8], str]]) -> PictureSet:
    pixels, captions = zip(*made, strict=True)
    return PictureSet(torch.from_numpy(np.stack(pixels)), list(captions))


def augment_pixels(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Float pictures [batch, 3, size, size] in 0..1 with small changes of gamma, contrast, noise, place and scale.

    Never mirrored: left and right are what a report is about.
    """
    count = len(pixels)

    def sample(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = sample(0.95, 1.05).flatten(), sample(0.95, 1.05).flatten()
    theta[:, :, 2] = (torch.rand(count, 2, generator=generator) - 0.5) * 0.08  # 4 % of the width either way
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    toned = moved.clamp(1e-4, 1) ** sample(0.85, 1.18) * sample(0.88, 1.08) + sample(-0.04, 0.04)
    noise = torch.randn(pixels.shape[0], 1, *pixels.shape[2:], generator=generator)
    return (toned + noise * sample(0.0, 0.03)).clamp(0, 1)


def normalise_pixels(pixels: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Float pictures in 0..1, minus `mean` over `std` per channel."""
    return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
