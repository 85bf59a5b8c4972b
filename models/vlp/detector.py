"""Regions from an object detector of transformers: its queries, looked at online instead of read from files.

A region is a query: its last hidden state for a feature, its class probabilities with the background first, its box in
pixels of the square picture, its best class and that class's probability for a confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING

from models.base import Picture
from models.device import translate_device_errors
from models.tensors import normalise_pixels, stack_pictures
from models.vlp.backbone import SPEC_REMEDY, load_network, probe_network, require_size, save_provider_files
from models.vlp.grid import count_tokens
from models.vlp.regions import Regions, RegionSpec
from readroom.errors import CheckpointBroken

__all__ = ["DetectorProvider", "load_detector", "read_probabilities", "save_provider_files", "turn_boxes"]

# How a detector's class scores are meant, by model_type; the two kinds cannot be told apart by their shapes.
SOFTMAX_TYPES = ("detr", "table-transformer", "yolos")
SIGMOID_TYPES = ("conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2")
# Of a picture, in a detector that looks at patches of it: a side of 2048 pixels in patches of 16.
MAX_PATCHES = 16_384


@dataclass(frozen=True, slots=True)
class Queries:
    """What a detector says of Q queries, float32: features [N, Q, F], classes [N, Q, C], corners [N, Q, 4] pixels."""

    features: Tensor
    classes: Tensor
    corners: Tensor


class DetectorProvider:
    """The most confident queries of an object detector as regions, in descending order of confidence."""

    reader = None

    def __init__(self, model: nn.Module, spec: RegionSpec, device: torch.device) -> None:
        """Take a detector of transformers. Raises CheckpointBroken when its sizes are not the spec's."""
        self.model: Any = model.to(device)
        self.spec = spec
        check_queries(self.model.config, spec)
        seen = probe_network(self.model, spec.image_size, self._run)
        require_queries(spec, seen.features.shape[1])
        require_size("feature_dim", spec.feature_dim, seen.features.shape[2])
        require_size("class_count", spec.class_count, seen.classes.shape[2])

    def prepare(self, images: Sequence[Picture]) -> Tensor:
        """Stack pictures, sizing those that are not `image_size` square RGB yet: uint8 (N, S, S, 3) on the host."""
        return stack_pictures(images, self.spec.image_size)

    def compute(self, batch: Tensor) -> Regions:
        """The regions of pictures (N, S, S, 3) uint8. Raises OutOfMemory, DeviceBroken."""
        with translate_device_errors():
            return self.look(normalise_pixels(batch, self.spec.mean, self.spec.std, self.model))

    def look(self, pixels: Tensor) -> Regions:
        """The regions of normalised pictures (N, 3, S, S); gradients flow to the detector's weights."""
        seen = self._run(pixels)
        best, index = seen.classes[..., 1:].max(dim=-1)
        # a stable order: queries that are equally sure stay as the detector has them
        chosen = best.argsort(dim=1, descending=True, stable=True)[:, : self.spec.count]
        boxes = torch.cat((seen.corners, (index + 1).float()[..., None], best[..., None]), dim=-1)
        return Regions(*(take_rows(part, chosen) for part in (seen.features, seen.classes, boxes)))

    def module(self) -> nn.Module:
        """The detector."""
        return cast(nn.Module, self.model)

    def _run(self, pixels: Tensor) -> Queries:
        out = self.model(pixels)
        return Queries(
            # YOLOS has its queries behind the tokens of the picture, the others have nothing else
            features=out.last_hidden_state[:, -out.logits.shape[1] :].float(),
            classes=read_probabilities(out.logits.float(), self.model.config.model_type),
            corners=turn_boxes(out.pred_boxes.float(), self.spec.image_size),
        )


def check_queries(config: Any, spec: RegionSpec) -> None:
    """Raise CheckpointBroken for a detector whose config says that it has too few queries, or too many patches.

    Said before a look, which patches of a pixel each would take all memory for.
    """
    queries = getattr(config, "num_detection_tokens", None) or getattr(config, "num_queries", None)
    if queries is not None:
        require_queries(spec, int(queries))
    patches = count_tokens(config, spec.image_size)
    if patches is not None and patches > MAX_PATCHES:
        raise CheckpointBroken(f"regions: the detector would see {patches} patches of a picture", SPEC_REMEDY)


def require_queries(spec: RegionSpec, queries: int) -> None:
    """Raise CheckpointBroken when a spec names more regions than its detector has queries."""
    if queries < spec.count:
        raise CheckpointBroken(f"regions: count is {spec.count}, and the detector has {queries}", SPEC_REMEDY)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """values [N, Q, D] at rows [N, R] of each: [N, R, D]."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def read_probabilities(logits: Tensor, model_type: str) -> Tensor:
    """Class probabilities [N, Q, C] with the background first, each row summing to 1. Raises CheckpointBroken.

    Detectors trained with a softmax have "no object" as their last class; it moves to the front. Those trained with a
    sigmoid a class say nothing of the background: it gets what the likeliest class leaves, 1 - max, and the row is then
    divided by its sum. The order of the classes stays; a probability is smaller than the sigmoid's where several
    classes are likely at once.
    """
    if model_type in SOFTMAX_TYPES:
        return logits.softmax(dim=-1).roll(1, dims=-1)
    if model_type not in SIGMOID_TYPES:
        raise CheckpointBroken("the class scores of this kind of detector are not known", "Name another detector.")
    likely = logits.sigmoid()
    row = torch.cat((1 - likely.amax(dim=-1, keepdim=True), likely), dim=-1)
    return row / row.sum(dim=-1, keepdim=True)


def turn_boxes(boxes: Tensor, image_size: int) -> Tensor:
    """Corners [..., 4] in pixels from centre and size [..., 4] as parts of the square picture."""
    x, y, width, height = boxes.unbind(dim=-1)
    corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    return torch.stack(corners, dim=-1) * image_size


def load_detector(folder: Path, spec: RegionSpec, device: torch.device, dtype: torch.dtype) -> DetectorProvider:
    """The detector of a checkpoint folder. Raises CheckpointMissing, CheckpointBroken."""
    with translate_device_errors():
        return DetectorProvider(load_network(folder, find_detector, dtype), spec, device)


def find_detector(config: Any) -> Any:
    """transformers' class for a detector's config, None where its class scores are not known."""
    known = config.model_type in SOFTMAX_TYPES + SIGMOID_TYPES
    return MODEL_FOR_OBJECT_DETECTION_MAPPING.get(type(config), None) if known else None
