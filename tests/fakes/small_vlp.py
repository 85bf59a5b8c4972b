"""A small VLP with random weights for each provider of regions. It talks nonsense, each image its own."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTModel, YolosConfig, YolosForObjectDetection

from models.vlp.config import VlpConfig
from models.vlp.folder import save_checkpoint
from models.vlp.network import VlpModel
from models.vlp.precomputed import LAYOUTS
from models.vlp.regions import RegionSpec
from readroom.records import ImageRef
from tests.fakes.small_blip import SPECIAL, VOCABULARY, mixed_images

torch.set_num_threads(1)  # with matrices this small a second thread only waits

SIZE = 48
SEP_BIAS = 2.5
ANSWERS = ["<unk>", "yes", "no", "left", "right", *(f"{number}" for number in range(20))]
SPECS = {
    "grid": RegionSpec("grid", count=9, feature_dim=32, class_count=0, image_size=SIZE),
    "detector": RegionSpec("detector", count=8, feature_dim=32, class_count=6, image_size=SIZE),
    "precomputed": RegionSpec("precomputed", count=10, feature_dim=24, class_count=7, layout={"dataset": "coco"}),
}
# As the original names its images; the last three characters choose the shard.
NAMES = [f"COCO_val2014_{number:012d}.jpg" for number in (391895, 522418, 1391895, 7, 58, 74, 133)]


def small_config(spec: RegionSpec, **changes: Any) -> VlpConfig:
    """Two layers, two heads, texts of up to 12 tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 40, "num_regions": spec.count,
        "region_feat_dim": spec.feature_dim, "region_num_classes": spec.class_count, "num_answers": len(ANSWERS),
        "max_text_length": 12,
    }  # fmt: skip
    return VlpConfig(**(sizes | changes))


def small_model(config: VlpConfig, seed: int = 0, gain: float = 16.0) -> VlpModel:
    """Random weights, `gain` times those of a fresh model: at its own scale every token is about as likely.

    The output layer is the word embedding. Ten times its size parts the best token from the next.
    """
    torch.manual_seed(seed)
    model = VlpModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embeddings" not in name:
                weight.mul_(gain)
            if name.endswith("word_embeddings.weight"):
                weight.mul_(10.0)
            if name.endswith("position_embeddings.weight"):
                weight.mul_(15.0)  # else every [MASK] says the same again
            if name == "cls.predictions.bias":
                weight[: len(SPECIAL)] = -9.0
                weight[SPECIAL.index("[SEP]")] = SEP_BIAS  # so that some texts end by themselves
    return model


def small_network(spec: RegionSpec, seed: int = 0) -> nn.Module | None:
    """The network behind the regions; None for precomputed ones."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": spec.feature_dim, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "patch_size": 16, "initializer_range": 0.2,
    }  # fmt: skip
    if spec.provider == "grid":
        return ViTModel(ViTConfig(image_size=SIZE, **sizes)).eval()
    if spec.provider == "detector":
        labels = {number: f"thing {number}" for number in range(spec.class_count - 1)}
        config = YolosConfig(image_size=[SIZE, SIZE], num_detection_tokens=11, id2label=labels, **sizes)
        return YolosForObjectDetection(config).eval()
    return None


def save_vlp(folder: Path, provider: str = "grid", seed: int = 0, **described: Any) -> Path:
    """A checkpoint folder that captions and answers, with its manifest."""
    spec = SPECS[provider]
    model = small_model(small_config(spec), seed)
    named = {"name": f"small {provider}", "generation": {"num_beams": 3, "max_new_tokens": 12, "min_new_tokens": 1}}
    save_checkpoint(folder, model, spec, VOCABULARY, small_network(spec, seed), ANSWERS, **(named | described))
    return folder


def write_regions(root: Path, spec: RegionSpec = SPECS["precomputed"], names: list[str] = NAMES) -> Path:
    """HDF5 files in the original's layout: float16 features and classes, float32 boxes."""
    prefix, boxes = LAYOUTS["coco"]
    for name in names:
        image_id = Path(name).stem
        draw = np.random.default_rng(zlib.crc32(image_id.encode()))
        corners = np.sort(draw.uniform(0, 640, (spec.count, 2, 2)), axis=1).reshape(spec.count, 4)
        sure = np.sort(draw.uniform(0.2, 1, (spec.count, 1)), axis=0)[::-1]
        classes = draw.integers(1, spec.class_count, (spec.count, 1))
        arrays = {
            f"{prefix}_feat{image_id[-3:]}.h5": draw.standard_normal((spec.count, spec.feature_dim), np.float32),
            f"{prefix}_cls{image_id[-3:]}.h5": draw.dirichlet(np.full(spec.class_count, 0.2), spec.count),
            boxes: np.hstack([corners, classes, sure]),
        }
        for file_name, values in arrays.items():
            (root / file_name).parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(root / file_name, "a") as file:
                file.create_dataset(image_id, data=values.astype("float32" if file_name == boxes else "float16"))
    return root


def show_images(model: Any, count: int = 7) -> list[Any]:
    """What a model is shown: pictures, or what its reader reads of as many images."""
    if model.reader is None:
        return mixed_images(count)
    return [model.reader.read(ImageRef(f"/images/{name}")) for name in NAMES[:count]]
