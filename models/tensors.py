"""Pictures as tensors: uint8 to the device, normalised there in float32. A quarter of the bytes travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from models.base import Picture
from models.checkpoint import Floats
from models.pixels import to_model_input
from readroom.errors import BadCall


def stack_pictures(images: Sequence[Picture], size: int) -> torch.Tensor:
    """uint8 (N, size, size, 3) on the host. Raises BadCall for other types and shapes, and for no picture at all."""
    if len(images) == 0:
        raise BadCall("at least one picture is needed")
    if not all(map(_is_picture, images)):
        raise BadCall("a picture must be a uint8 array, H x W or H x W x 3")
    ready = [image if image.shape == (size, size, 3) else to_model_input(image, size) for image in images]
    return torch.from_numpy(np.stack(ready))


def _is_picture(image: Picture) -> bool:
    return image.dtype == np.uint8 and image.size > 0 and (image.ndim == 2 or image.shape[2:] == (3,))


def normalise_pixels(pixels: torch.Tensor, mean: Floats, std: Floats, model: Any) -> torch.Tensor:
    """(x / 255 - mean) / std as (N, 3, S, S) in a model's number format, on its device; computed in float32."""
    shades = pixels.to(model.device).permute(0, 3, 1, 2).to(torch.float32) / 255
    centre = torch.tensor(mean, device=model.device).view(1, 3, 1, 1)
    spread = torch.tensor(std, device=model.device).view(1, 3, 1, 1)
    return ((shades - centre) / spread).to(model.dtype).contiguous()
