"""A small BLIP with random weights, saved exactly as the hub lays a BLIP out. It talks nonsense, each image its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipForQuestionAnswering
from transformers.utils.logging import disable_progress_bar

torch.set_num_threads(1)  # with matrices this small a second thread only waits

SIZE = 48
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"{first}{last}" for first in ("ba", "ce", "di", "fo", "gu", "ha", "ki", "lo", "mu", "ne")
         for last in ("nar", "pel", "rix", "sol", "tum", "vek")]  # fmt: skip
VOCABULARY = [*SPECIAL, *WORDS, "a", "picture", "of", "what", "is", "this", "where", "the", "?", "##s", "##ly"]


def small_config() -> BlipConfig:
    """Two layers a tower. The vision tower's own initializer range of 1e-10 would make all images look the same."""
    return BlipConfig(
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": SIZE, "patch_size": 16, "initializer_range": 0.02,
        },
        text_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": len(VOCABULARY) + 2, "max_position_embeddings": 40, "bos_token_id": len(VOCABULARY),
            "sep_token_id": SPECIAL.index("[SEP]"), "eos_token_id": SPECIAL.index("[SEP]"), "pad_token_id": 0,
        },
    )  # fmt: skip


def small_model(kind: Any = BlipForConditionalGeneration, seed: int = 0, gain: float = 6.0) -> Any:
    """Random weights, `gain` times those of a fresh model: at its own scale every token is about as likely.

    The output layer is the word embedding. Ten times its size parts the best token from the next.
    """
    torch.manual_seed(seed)
    model = kind(small_config()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embeddings" not in name:
                weight.mul_(gain)
            if name.endswith("word_embeddings.weight"):
                weight.mul_(10.0)
            if name.endswith("predictions.bias"):
                weight[SPECIAL.index("[SEP]")] = 4.7  # so that some texts end by themselves
    model.tie_weights()
    return model


def save_tokenizer(folder: Path) -> None:
    """The tokenizer's files as on the hub: vocab.txt, tokenizer.json, tokenizer_config.json."""
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def save_hub_folder(folder: Path, model: Any | None = None, pickled: bool = False) -> Path:
    """A folder as `Salesforce/blip-image-captioning-base` is one; `pickled` keeps only a pytorch_model.bin."""
    model = model or small_model()
    folder.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(dict(model.state_dict()), folder / "pytorch_model.bin")
    save_tokenizer(folder)
    processor = {
        "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"height": SIZE, "width": SIZE},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    (folder / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    return folder


def save_answerer(folder: Path, seed: int = 0) -> Path:
    """A folder as `Salesforce/blip-vqa-base` is one."""
    return save_hub_folder(folder, small_model(BlipForQuestionAnswering, seed))


def mixed_images(count: int = 7, seed: int = 5) -> list[np.ndarray]:
    """Grey and colour pictures of different sizes: noise at different scales, gradients, bars."""
    random = np.random.default_rng(seed)
    images = []
    for number in range(count):
        height, width = int(random.integers(20, 90)), int(random.integers(20, 90))
        coarse = random.integers(0, 256, (2 + number, 3 + number, 3), dtype=np.uint8)
        image = np.kron(coarse, np.ones((height // 2 + 1, width // 3 + 1, 1), dtype=np.uint8))[:height, :width]
        images.append(np.ascontiguousarray(image[..., 0] if number % 3 == 2 else image))
    return images
