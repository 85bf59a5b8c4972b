"""The peer of benchmarks/vlp.py: VLP's search written plainly, with the whole sequence run again for every token.

    [CLS]  regions  [SEP]  y_0 .. y_t-1  [MASK]

goes through the model for each hypothesis at each step, and nothing is kept. Hypotheses are plain values in a list. The
rules are the release's: one that ended is never extended, each other one proposes its K best tokens, and of all that
ended or are left over the best sum of log-probabilities wins. The weights are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.vlp.layout import TASK_NUMBERS, SpecialIds, decode_types, decode_visible, prefix_ids
from models.vlp.network import SeenRegions, VlpModel

FORBIDDEN = -10000.0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What was written about a picture so far, and the sum of its log-probabilities."""

    picture: int
    tokens: tuple[int, ...] = ()
    score: float = 0.0


def caption_plainly(
    model: VlpModel, regions: SeenRegions, special: SpecialIds, beams: int, longest: int, shortest: int = 0
) -> tuple[list[int], ...]:
    """Token ids of N captions, the end included; no end comes before `shortest` tokens are written."""
    count = len(regions.features)
    live = [Hypothesis(picture) for picture in range(count)]
    ended: list[Hypothesis] = []
    for step in range(longest):
        if not live:
            break
        steps = torch.log_softmax(run_everything(model, regions, special, live), dim=-1)
        if step < shortest:
            steps[:, special.end] = FORBIDDEN
        kept = keep_best(extend_all(live, steps, beams), count, beams)
        ended += [one for one in kept if one.tokens[-1] == special.end]
        live = [one for one in kept if one.tokens[-1] != special.end]
    return tuple(list(one.tokens) for one in keep_best(ended + live, count, 1))


def run_everything(
    model: VlpModel, regions: SeenRegions, special: SpecialIds, live: Sequence[Hypothesis]
) -> torch.Tensor:
    """LM logits [rows, V] of the [MASK] behind each hypothesis; all are equally long."""
    pictures, written = [one.picture for one in live], len(live[0].tokens) + 1
    ids = torch.tensor([[*prefix_ids(model.config, special), *one.tokens, special.mask] for one in live])
    types = decode_types(model.config, written).expand(len(live), -1)
    visible = decode_visible(model.config, written).expand(len(live), -1, -1)
    hidden = model(SeenRegions(regions.features[pictures], regions.places[pictures]), ids, types, visible)
    return model.predict_tokens(hidden[:, -1], TASK_NUMBERS["s2s"])


def extend_all(live: Sequence[Hypothesis], steps: torch.Tensor, beams: int) -> list[Hypothesis]:
    """Each hypothesis with each of its `beams` best tokens; `steps` [rows, V] are log-probabilities."""
    rows = zip(live, *(found.tolist() for found in steps.topk(beams, dim=-1)), strict=True)
    return [
        Hypothesis(one.picture, (*one.tokens, token), one.score + value)
        for one, values, tokens in rows
        for value, token in zip(values, tokens, strict=True)
    ]


def keep_best(found: Sequence[Hypothesis], pictures: int, count: int) -> list[Hypothesis]:
    """The `count` best of each picture, picture by picture."""
    ranked = sorted(found, key=lambda one: -one.score)
    return [one for picture in range(pictures) for one in [o for o in ranked if o.picture == picture][:count]]
