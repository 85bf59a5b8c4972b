"""How regions and text share one sequence: ids, token types, and who may look at whom.

    position   0      1 .. R   R + 1   R + 2 ..            padding
    holds      [CLS]  regions  [SEP]   text, final [SEP]   [PAD]
    s2s type   4      4        4       5                   0
    bi type    0      0        0       1                   0

"s2s" (captioning): every position sees the whole prefix, the text sees itself from left to right. "bi" (understanding):
everything sees everything but the padding. SPEC sections 5 and 10 name the release's seq2seq_loader.py as the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from models.vlp.config import VlpConfig

Mode = Literal["s2s", "bi"]

PAD = 0  # every VLP's vocabulary starts with it
# The release's task numbers, which pick a slice of a relaxed LM head.
TASK_NUMBERS: dict[Mode, int] = {"s2s": 3, "bi": 0}


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Numbers of the special tokens in a vocabulary."""

    unknown: int
    start: int
    end: int
    mask: int


@dataclass(frozen=True, slots=True)
class Sequences:
    """A batch: `ids` and `types` int64 [N, L], `visible` bool [N, L, L] (query, key), `lengths` of the texts."""

    ids: torch.Tensor
    types: torch.Tensor
    visible: torch.Tensor
    lengths: tuple[int, ...]


def choose_types(mode: Mode, config: VlpConfig) -> tuple[int, int]:
    """Token types of prefix and text."""
    return (4, 5) if mode == "s2s" and config.has_new_types else (0, 1)


def lay_out(
    texts: Sequence[Sequence[int]], mode: Mode, config: VlpConfig, special: SpecialIds, length: int | None = None
) -> Sequences:
    """Texts (token ids, no special tokens) behind the regions of their pictures, cut and padded.

    `length` None means as long as the longest needs; the release pads to prefix + max_text_length + 1.
    """
    cut = [list(text[: config.max_text_length]) for text in texts]
    prefix = config.prefix_length
    total = length or prefix + max(map(len, cut)) + 1
    first, second = choose_types(mode, config)
    ids = torch.full((len(cut), total), PAD)
    types = torch.zeros_like(ids)
    ids[:, :prefix] = torch.tensor(prefix_ids(config, special))
    types[:, :prefix] = first
    for row, text in enumerate(cut):
        last = prefix + len(text) + 1
        ids[row, prefix:last] = torch.tensor([*text, special.end])
        types[row, prefix:last] = second
    lengths = tuple(map(len, cut))
    return Sequences(ids, types, make_visible(lengths, total, mode, config), lengths)


def prefix_ids(config: VlpConfig, special: SpecialIds) -> list[int]:
    """[CLS], [UNK] for each region (without influence), [SEP]."""
    return [special.start, *[special.unknown] * config.num_regions, special.end]


def make_visible(lengths: Sequence[int], total: int, mode: Mode, config: VlpConfig) -> torch.Tensor:
    """Who sees whom, bool [N, total, total]; padding rows see what the rows of the prefix see."""
    prefix = config.prefix_length
    ends = torch.tensor(lengths)[:, None, None] + prefix + 1
    columns = torch.arange(total)
    if mode == "bi":
        return (columns < ends).expand(len(lengths), total, total).clone()
    rows = columns[:, None]
    looks_back = (rows >= prefix) & (columns <= rows) & (rows < ends)
    return (columns < prefix) | looks_back


def decode_types(config: VlpConfig, steps: int) -> torch.Tensor:
    """Token types int64 [prefix + steps] of a caption that is being written."""
    first, second = choose_types("s2s", config)
    return torch.tensor([first] * config.prefix_length + [second] * steps)


def decode_visible(config: VlpConfig, steps: int) -> torch.Tensor:
    """Who sees whom while `steps` tokens are written, bool [prefix + steps, prefix + steps]."""
    return make_visible([steps - 1], config.prefix_length + steps, "s2s", config)[0]
