"""Regions: what VLP sees of an image. A provider makes them; this file says what they are and finds the provider.

    precomputed   a detector's arrays, read from the original's HDF5 files        models/vlp/precomputed.py
    detector      the queries of a transformers object detector                   models/vlp/detector.py
    grid          the cells of a vision backbone's last feature map               models/vlp/grid.py

Which one belongs to a checkpoint stands in its RegionSpec, and it never runs with another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from models.base import ItemReader, Picture
from models.checkpoint import CLIP_MEAN, CLIP_STD, Floats, is_triple
from readroom.errors import CheckpointBroken, CheckpointMissing

PROVIDERS = ("precomputed", "detector", "grid")
# Of a spec, which is foreign input: far above any detector's, low enough that no size made of them fills a memory.
MAX_REGIONS = 4096
MAX_WIDTH = 65_536
# Pixels. A backbone's work grows with its square at least, and the checkpoint's network is tried at this size.
MAX_IMAGE_SIZE = 2048
# What a precomputed spec may name: the data set whose names are the defaults, its shards' prefix, its box file.
LAYOUT_KEYS = frozenset({"dataset", "prefix", "boxes"})
DATASETS = ("coco", "cc", "flickr30k")
# Of the normalisation of boxes and of both LayerNorms (SPEC section 3); the same number by the original's choice.
EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """Which provider a checkpoint was trained with, and the sizes of what it gives.

    `class_count` has the background at index 0, and is 0 where there are no classes (grid). `image_size` is the side in
    pixels of the square picture, normalised by `mean` and `std`; 0 where no picture is seen (precomputed). `layout`
    names files of precomputed features: `dataset` one of DATASETS, `prefix` and `boxes` where they differ from it.
    """

    provider: str
    count: int
    feature_dim: int
    class_count: int
    image_size: int = 0
    mean: Floats = CLIP_MEAN
    std: Floats = CLIP_STD
    layout: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What config.json and the manifest hold; equal to what JSON gives back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, document: Any) -> RegionSpec:
        """Read and check each field. Raises CheckpointBroken naming the wrong one."""
        _require("regions", isinstance(document, dict))
        known = {item.name for item in fields(cls)}
        for name in sorted(document.keys() - known, key=str):
            _require(str(name), False)
        for name in ("provider", "count", "feature_dim", "class_count"):
            _require(name, name in document)
        checked = {name: _check_field(name, value) for name, value in document.items()}
        spec = cls(**checked)
        _check_together(spec)
        return spec


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of a batch of images, float32 on the device.

    features [N, R, F]; classes [N, R, C], probabilities with the background first; boxes [N, R, 6]: x1, y1, x2, y2 in
    pixels, class index, confidence.
    """

    features: Tensor
    classes: Tensor
    boxes: Tensor


class RegionProvider(Protocol):
    """Makes regions of images; belongs to one checkpoint."""

    @property
    def spec(self) -> RegionSpec: ...  # noqa: D102
    @property
    def reader(self) -> ItemReader | None:
        """What reads an image's arrays by its name; None where pictures come as pixels."""
        ...

    def prepare(self, images: Sequence[Picture]) -> Any:
        """uint8 pictures, or what `reader.read` gave, to a batch on the host. Any thread."""
        ...

    def compute(self, batch: Any) -> Regions:
        """The regions of a batch, on the device. The caller holds the inference mode."""
        ...

    def module(self) -> nn.Module | None:
        """What can be trained; None for precomputed features."""
        ...


def locate_regions(boxes: Tensor, classes: Tensor) -> Tensor:
    """Where regions are and what they show, [N, R, 6 + C]: LN(geometry) || LN(classes), without weights.

    boxes [N, R, 6] in pixels, classes [N, R, C]; C of 0 leaves the geometry alone. Geometry is x1, y1, x2, y2, area
    and confidence, lengths as parts of the image's size. That size is taken from the boxes' own maxima (VLP, AAAI 2020,
    as its code does): it depends on all boxes of an image, and a picture's true size is never asked for.
    """
    x1, y1, x2, y2, _, confidence = boxes.unbind(dim=-1)
    width = torch.maximum(x1, x2).amax(dim=1, keepdim=True) + EPSILON
    height = torch.maximum(y1, y2).amax(dim=1, keepdim=True) + EPSILON
    x1, x2, y1, y2 = x1 / width, x2 / width, y1 / height, y2 / height
    area = ((y2 - y1) * (x2 - x1)).clamp(min=0)
    geometry = torch.stack((x1, y1, x2, y2, area, confidence), dim=-1)
    normed = layer_norm(geometry, geometry.shape[-1:], eps=EPSILON)
    if not classes.shape[-1]:
        return normed
    return torch.cat((normed, layer_norm(classes, classes.shape[-1:], eps=EPSILON)), dim=-1)


def open_provider(
    folder: Path, spec: RegionSpec, device: torch.device, dtype: torch.dtype, region_dir: Path | None = None
) -> RegionProvider:
    """The provider of a checkpoint folder. Raises CheckpointMissing, CheckpointBroken.

    `region_dir` is the folder of precomputed features; the others read regions.json and regions.safetensors.
    """
    if spec.provider == "precomputed":
        try:
            from models.vlp.precomputed import open_precomputed
        except ImportError:  # h5py, which nobody else needs
            raise CheckpointMissing(
                "precomputed regions are HDF5 files, and h5py is missing", "pip install 'readroom[regions]'"
            ) from None
        return open_precomputed(spec, device, region_dir)
    if spec.provider == "detector":
        from models.vlp.detector import load_detector

        return load_detector(folder, spec, device, dtype)
    from models.vlp.grid import load_grid

    return load_grid(folder, spec, device, dtype)


# Checks, one a field -------------------------------------------------------------------------------------------------


def _check_field(name: str, value: Any) -> Any:
    if name in ("mean", "std"):
        return _check_floats(name, value)
    if name == "layout":
        return _check_layout(value)
    if name == "provider":
        _require(name, value in PROVIDERS)
        return value
    least, most = {
        "count": (1, MAX_REGIONS),
        "feature_dim": (1, MAX_WIDTH),
        "class_count": (0, MAX_WIDTH),
        "image_size": (0, MAX_IMAGE_SIZE),
    }[name]
    _require(name, isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)
    return value


def _check_floats(name: str, value: Any) -> Floats:
    _require(name, is_triple(name, value))
    return float(value[0]), float(value[1]), float(value[2])


def _check_layout(value: Any) -> dict[str, str]:
    _require("layout", isinstance(value, Mapping) and value.keys() <= LAYOUT_KEYS)
    for key, name in value.items():
        _require(f"layout.{key}", isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable())
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name
        _require(f"layout.{key}", name in DATASETS if key == "dataset" else inside)
    return dict(value)


def _check_together(spec: RegionSpec) -> None:
    sees_pixels = spec.provider != "precomputed"
    _require("image_size", (spec.image_size > 0) == sees_pixels)
    _require("class_count", spec.class_count == 0 if spec.provider == "grid" else spec.class_count >= 2)
    _require("layout", not (spec.layout and sees_pixels))


def _require(name: str, sound: bool) -> None:
    if not sound:
        raise CheckpointBroken(f"regions: {name} is not usable", "Correct config.json or fetch the checkpoint again.")
