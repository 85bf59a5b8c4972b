"""Regions without a detector: the cells of a vision backbone's last feature map, row by row.

Any backbone of transformers whose output is a grid: ViT and its kin, BLIP's vision tower (tokens), ResNet (a map).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, BlipVisionConfig, BlipVisionModel

from models.base import Picture
from models.device import translate_device_errors
from models.tensors import normalise_pixels, stack_pictures
from models.vlp.backbone import load_network, probe_network, require_size, save_provider_files
from models.vlp.regions import Regions, RegionSpec
from readroom.errors import CheckpointBroken

__all__ = ["GridProvider", "cell_boxes", "load_grid", "save_provider_files"]

# Tokens before the grid, registers aside: a class token and a distillation token.
MAX_LEADING = 2


class GridProvider:
    """The cells of a backbone's feature map as regions: no classes, and each cell's own corners for a box."""

    reader = None

    def __init__(self, model: nn.Module, spec: RegionSpec, device: torch.device) -> None:
        """Take a backbone of transformers. Raises CheckpointBroken when its grid is not the spec's."""
        self.model: Any = model.to(device)
        self.spec = spec
        cells = count_tokens(self.model.config, spec.image_size)
        if cells is not None:  # before a look, which tokens beyond number would take all memory for
            require_size("count", spec.count, cells)
        features, (rows, columns) = probe_network(self.model, spec.image_size, self._run)
        require_size("count", spec.count, features.shape[1])
        require_size("feature_dim", spec.feature_dim, features.shape[2])
        require_size("class_count", spec.class_count, 0)
        self.boxes = cell_boxes(rows, columns, spec.image_size).to(device)

    def prepare(self, images: Sequence[Picture]) -> Tensor:
        """Stack pictures, sizing those that are not `image_size` square RGB yet: uint8 (N, S, S, 3) on the host."""
        return stack_pictures(images, self.spec.image_size)

    def compute(self, batch: Tensor) -> Regions:
        """The regions of pictures (N, S, S, 3) uint8. Raises OutOfMemory, DeviceBroken."""
        with translate_device_errors():
            return self.look(normalise_pixels(batch, self.spec.mean, self.spec.std, self.model))

    def look(self, pixels: Tensor) -> Regions:
        """The regions of normalised pictures (N, 3, S, S); gradients flow to the backbone's weights."""
        features = self._run(pixels)[0].float()
        number, count = features.shape[:2]
        return Regions(features, features.new_zeros((number, count, 0)), self.boxes.expand(number, -1, -1))

    def module(self) -> nn.Module:
        """The backbone."""
        return cast(nn.Module, self.model)

    def _run(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features [N, h * w, F] and the grid's (h, w)."""
        hidden = self.model(pixels).last_hidden_state
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2), (hidden.shape[2], hidden.shape[3])
        rows, columns = read_grid(self.model.config, self.spec.image_size)
        leading = hidden.shape[1] - rows * columns
        registers = int(getattr(self.model.config, "num_register_tokens", 0))
        if not 0 <= leading <= MAX_LEADING + registers:
            raise CheckpointBroken("the backbone's tokens are no grid of its patches", "Name another backbone.")
        return hidden[:, leading:], (rows, columns)


def read_grid(config: Any, image_size: int) -> tuple[int, int]:
    """Rows and columns of patches in a square picture, from a config that says how large a patch is, pixels."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise CheckpointBroken(
            "the backbone's config names no patch_size, so its tokens cannot be laid out", "Name another one."
        )
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    if min(int(height), int(width)) < 1:
        raise CheckpointBroken("the backbone's patch_size is not usable", "Name another one.")
    return image_size // int(height), image_size // int(width)


def count_tokens(config: Any, image_size: int) -> int | None:
    """How many patches a network of tokens makes of a square picture; None for one of maps that shrink by stages."""
    one_width = isinstance(getattr(config, "hidden_size", None), int) and not getattr(config, "depths", None)
    if not one_width or getattr(config, "patch_size", None) is None:
        return None
    rows, columns = read_grid(config, image_size)
    return rows * columns


def cell_boxes(rows: int, columns: int, image_size: int) -> Tensor:
    """The cells of a square picture, row by row: [1, rows * columns, 6], class index 0 and confidence 1."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    high, wide = image_size / rows, image_size / columns
    corners = (x * wide, y * high, (x + 1) * wide, (y + 1) * high, torch.zeros_like(x), torch.ones_like(x))
    return torch.stack([corner.to(torch.float32).flatten() for corner in corners], dim=-1)[None]


def load_grid(folder: Path, spec: RegionSpec, device: torch.device, dtype: torch.dtype) -> GridProvider:
    """The grid provider of a checkpoint folder. Raises CheckpointMissing, CheckpointBroken."""
    with translate_device_errors():
        return GridProvider(load_network(folder, find_backbone, dtype), spec, device)


def find_backbone(config: Any) -> Any:
    """transformers' class for a backbone's config, None where there is none."""
    # the one vision tower that has no place among the automatic classes
    return BlipVisionModel if isinstance(config, BlipVisionConfig) else MODEL_MAPPING.get(type(config), None)
