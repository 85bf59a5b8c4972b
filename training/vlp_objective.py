"""What VLP is taught: to fill in masked words of captions, seeing back only ("s2s") or all ("bi"), and to answer.

Zhou et al., AAAI 2020, and the release's code where the two differ (seq2seq_loader.py, modeling.py; SPEC section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.vlp.config import VlpConfig
from models.vlp.layout import PAD, TASK_NUMBERS, Mode, SpecialIds, lay_out
from models.vlp.network import SeenRegions, VlpModel

MASKED, RANDOM = 0.8, 0.1  # what becomes of a target; the rest stays as it is
TINY = 1e-5  # keeps a batch without targets from dividing by nothing
# "Drop worst" starts after this many epochs in the release.
DROP_WORST_AFTER = 6


@dataclass(frozen=True, slots=True)
class MaskingPlan:
    """How texts are masked: `share` of a text's tokens, at most `most`; `s2s` is the share of seq2seq samples."""

    share: float = 0.15
    most: int = 3
    s2s: float = 0.75


# One question token is masked while answers are learned, which the release found helpful.
QUESTION_MASKING = MaskingPlan(share=0.0, most=1, s2s=0.0)


@dataclass(frozen=True, slots=True)
class MaskedTexts:
    """A batch of masked sequences: `ids`, `types` [N, L], `visible` [N, L, L], targets [N, P], `modes` of the rows."""

    ids: Tensor
    types: Tensor
    visible: Tensor
    places: Tensor
    labels: Tensor
    weights: Tensor
    modes: tuple[Mode, ...]


def mask_texts(
    texts: Sequence[Sequence[int]],
    plan: MaskingPlan,
    config: VlpConfig,
    special: SpecialIds,
    rng: np.random.Generator,
    length: int | None = None,
) -> MaskedTexts:
    """Lay texts out, each in a mode drawn by `plan`, and mask some of their tokens, the final [SEP] among them."""
    modes: tuple[Mode, ...] = tuple("s2s" if rng.random() < plan.s2s else "bi" for _ in texts)
    total = length or config.prefix_length + min(max(map(len, texts)), config.max_text_length) + 1
    rows = [lay_out([text], mode, config, special, total) for text, mode in zip(texts, modes, strict=True)]
    ids = torch.cat([row.ids for row in rows])
    places, labels, weights = (torch.zeros(len(texts), plan.most, dtype=torch.long) for _ in range(3))
    for number, row in enumerate(rows):
        targets = choose_targets(row.lengths[0], plan, rng)
        for slot, target in enumerate(targets):
            place = config.prefix_length + target
            places[number, slot], labels[number, slot], weights[number, slot] = place, ids[number, place], 1
            ids[number, place] = disguise(int(ids[number, place]), config, special, rng)
    types, visible = torch.cat([row.types for row in rows]), torch.cat([row.visible for row in rows])
    return MaskedTexts(ids, types, visible, places, labels, weights, modes)


def choose_targets(length: int, plan: MaskingPlan, rng: np.random.Generator) -> list[int]:
    """Which of a text's tokens are to be guessed, from 0; number `length` is its final [SEP]."""
    count = min(plan.most, max(1, round(length * plan.share)))
    return [int(target) for target in rng.permutation(length + 1)[:count]]


def disguise(token: int, config: VlpConfig, special: SpecialIds, rng: np.random.Generator) -> int:
    """What stands in a target's place: [MASK], some token of the vocabulary, or the token itself."""
    draw = rng.random()
    if draw < MASKED:
        return special.mask
    return int(rng.integers(config.vocab_size)) if draw < MASKED + RANDOM else token


def masked_lm_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, drop_worst: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Loss of masked tokens: `logits` [N, P, V], `labels` and `weights` [N, P]; a scalar.

    `drop_worst` leaves out that share of the samples, those with the greatest loss; one is always left, where the
    release would learn from none. `smoothing` > 0 spreads that share
    of each target over the vocabulary.
    """
    losses = token_losses(logits.float(), labels, smoothing) * weights
    samples, counts = losses.sum(dim=1), weights.sum(dim=1)
    if drop_worst > 0:
        kept = samples.topk(max(1, int(len(samples) * (1 - drop_worst))), largest=False).indices
        samples, counts = samples[kept], counts[kept]
    return samples.sum() / (counts.sum() + TINY)


def token_losses(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Loss [N, P] of each token: cross entropy, or with smoothing the divergence from the smoothed target.

    The smoothed target has nothing on token 0, and a label 0 costs nothing.
    """
    if smoothing <= 0:
        return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    vocabulary = logits.shape[-1]
    target = torch.full_like(logits, smoothing / (vocabulary - 2))
    target[..., PAD] = 0.0
    target.scatter_(-1, labels[..., None], 1.0 - smoothing)
    divergence = functional.kl_div(torch.log_softmax(logits, dim=-1), target, reduction="none").sum(dim=-1)
    return divergence * (labels != PAD)


def vqa_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross entropy of `logits` [N, A] against soft scores, summed over answers; a scalar."""
    return functional.binary_cross_entropy_with_logits(logits.float(), scores, reduction="sum") / len(logits)


def caption_loss(
    model: VlpModel, regions: SeenRegions, masked: MaskedTexts, drop_worst: float = 0.0, smoothing: float = 0.0
) -> Tensor:
    """Masked-LM loss of N samples of both modes; a scalar."""
    hidden = model(regions, masked.ids, masked.types, masked.visible)
    if not model.config.relax_projection:
        logits = model.predict_masked(hidden, masked.places, TASK_NUMBERS["s2s"])
        return masked_lm_loss(logits, masked.labels, masked.weights, drop_worst, smoothing)
    by_task = {mode: model.predict_masked(hidden, masked.places, TASK_NUMBERS[mode]) for mode in set(masked.modes)}
    logits = torch.stack([by_task[mode][row] for row, mode in enumerate(masked.modes)])
    return masked_lm_loss(logits, masked.labels, masked.weights, drop_worst, smoothing)


def answer_logits(model: VlpModel, regions: SeenRegions, masked: MaskedTexts) -> Tensor:
    """Logits [N, A] of N questions."""
    return model.predict_answers(model(regions, masked.ids, masked.types, masked.visible))


@torch.no_grad()
def answer_accuracy(logits: Tensor, scores: Tensor) -> Tensor:
    """Mean soft score of the likeliest answers, number 0 ("<unk>") left out; a scalar."""
    best = logits[:, 1:].argmax(dim=1, keepdim=True) + 1
    return scores.gather(1, best).mean()
