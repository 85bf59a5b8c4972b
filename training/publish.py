"""Write a trained captioner as a checkpoint folder: weights, tokenizer, processor, and the manifest that vouches."""

from __future__ import annotations

import json
from pathlib import Path


def write_preprocessor(folder: Path, size: int, mean: list[float], std: list[float]) -> None:
    """The preprocessor_config.json that transformers' BLIP image processors read; resample 3 is BICUBIC."""
    config = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
