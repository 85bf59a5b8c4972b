"""Sizes of a VLP: the full-size ones are the defaults, a checkpoint's config.json carries its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from models.checkpoint import read_json
from readroom.errors import CheckpointBroken

MODEL_TYPE = "vlp"
LAYER_NORM_EPS = 1e-5  # of every LayerNorm, those of the regions' places too; BERT's 1e-12 is another model
ZERO_IS_SOUND = frozenset({"relax_projection", "region_num_classes", "num_answers"})


@dataclass(frozen=True, slots=True)
class VlpConfig:
    """What a VLP is made of; the defaults are bert-base-cased's and the release's (Zhou et al., AAAI 2020).

    `relax_projection` R > 0: the LM head's transform has R slices, one a task. `num_answers` 0: no VQA head.
    `max_text_length` is the longest text in tokens, without the final [SEP].
    """

    vocab_size: int = 28996
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 6
    layer_norm_eps: float = LAYER_NORM_EPS
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    relax_projection: int = 0
    num_regions: int = 100
    region_feat_dim: int = 2048
    region_geometry_dim: int = 6
    region_num_classes: int = 1601
    num_answers: int = 0
    max_text_length: int = 20

    def __post_init__(self) -> None:
        """Raise CheckpointBroken naming a field that no VLP can have."""
        for item in fields(self):
            _check_number(item.name, getattr(self, item.name))
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointBroken("hidden_size is no multiple of num_attention_heads")
        if self.prefix_length + self.max_text_length + 1 > self.max_position_embeddings:
            raise CheckpointBroken("max_position_embeddings is too small for the regions and the text")

    @property
    def prefix_length(self) -> int:
        """[CLS], the regions, [SEP]: the position of the first text token."""
        return self.num_regions + 2

    @property
    def place_dim(self) -> int:
        """Values that stand in for a region's position: geometry and class probabilities."""
        return self.region_geometry_dim + self.region_num_classes

    @property
    def has_new_types(self) -> bool:
        """Whether seq2seq sequences have token types of their own, 4 and 5 (`new_segment_ids` of the release)."""
        return self.type_vocab_size >= 6

    def as_json(self) -> dict[str, Any]:
        """The document config.json holds, without the regions' part."""
        return {"model_type": MODEL_TYPE, **asdict(self)}


def read_config(folder: Path) -> VlpConfig:
    """The sizes in a checkpoint's config.json. Raises CheckpointBroken."""
    return parse_config(read_json(folder / "config.json"))


def parse_config(document: dict[str, Any]) -> VlpConfig:
    """Sizes from a JSON object; other fields in it are no business of ours. Raises CheckpointBroken."""
    if document.get("model_type") != MODEL_TYPE:
        raise CheckpointBroken("config.json: model_type is not vlp")
    names = {item.name for item in fields(VlpConfig)}
    try:
        return VlpConfig(**{name: value for name, value in document.items() if name in names})
    except CheckpointBroken as error:
        raise CheckpointBroken(f"config.json: {error}") from None


def _check_number(name: str, value: Any) -> None:
    is_share = name.endswith(("_prob", "_eps"))
    if isinstance(value, bool) or not isinstance(value, int | float if is_share else int):
        raise CheckpointBroken(f"{name} is no number")
    sound = 0 <= value < 1 if is_share else (value > 0 or (value == 0 and name in ZERO_IS_SOUND))
    if not sound or value > 10_000_000:
        raise CheckpointBroken(f"{name} is out of range")
