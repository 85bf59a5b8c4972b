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
from models.blip import BlipParts, normalise_pixels, stack_pictures
from models.device import translate_device_errors
from models.vlp.backbone import load_network, save_provider_files
from models.vlp.regions import Regions, RegionSpec
from readroom.errors import BadCall, CheckpointBroken, EngineError

__all__ = ["GridProvider", "cell_boxes", "load_grid", "save_provider_files"]

# Tokens before the grid: a class token, a distillation token, registers.
MAX_LEADING = 2


class GridProvider:
    """The cells of a backbone's feature map as regions: no classes, and each cell's own corners for a box."""

    reader = None

    def __init__(self, model: nn.Module, spec: RegionSpec, device: torch.device) -> None:
        """Take a backbone of transformers. Raises CheckpointBroken when its grid is not the spec's."""
        self.model: Any = model.to(device)
        self.spec = spec
        self.device = device
        self.mean = spec.mean
        self.std = spec.std
        rows, columns = self._probe()
        self.boxes = cell_boxes(rows, columns, spec.image_size).to(device)

    def prepare(self, images: Sequence[Picture]) -> Tensor:
        """Stack pictures, sizing those that are not `image_size` square RGB yet: uint8 (N, S, S, 3) on the host."""
        return stack_pictures(images, self.spec.image_size)

    def compute(self, batch: Tensor) -> Regions:
        """The regions of pictures (N, S, S, 3) uint8. Raises OutOfMemory, DeviceBroken."""
        with translate_device_errors():
            return self.look(normalise_pixels(batch, cast(BlipParts, self)))

    def look(self, pixels: Tensor) -> Regions:
        """The regions of normalised pictures (N, 3, S, S); gradients flow to the backbone's weights."""
        features, _ = self._run(pixels)
        number, count = features.shape[:2]
        return Regions(
            features=features.float(),
            classes=features.new_zeros((number, count, 0), dtype=torch.float32),
            boxes=self.boxes.expand(number, -1, -1),
        )

    def module(self) -> nn.Module:
        """The backbone."""
        return cast(nn.Module, self.model)

    def _run(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features [N, h * w, F] and (h, w)."""
        hidden = self.model(pixels).last_hidden_state
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2), (hidden.shape[2], hidden.shape[3])
        rows, columns = read_grid(self.model.config, self.spec.image_size)
        return hidden[:, hidden.shape[1] - rows * columns :], (rows, columns)

    @torch.no_grad()
    def _probe(self) -> tuple[int, int]:
        """Look at one black picture and compare what comes with the spec; the grid's (rows, columns)."""
        was_training = self.model.training
        side = self.spec.image_size
        black = torch.zeros((1, 3, side, side), device=self.device, dtype=self.model.dtype)
        try:
            with translate_device_errors():
                hidden = self.model.eval()(black).last_hidden_state
                features, (rows, columns) = self._run(black)
        except EngineError:
            raise
        except Exception as error:
            # each backbone refuses a picture of another size in its own way
            raise CheckpointBroken(
                f"the backbone cannot look at a picture of image_size ({type(error).__name__})"
            ) from error
        finally:
            self.model.train(was_training)
        return rows, columns
