"""Writing captions: each next token is read off one [MASK] behind the tokens known so far, greedily or by beams.

Keys and values of prefix and tokens are kept, those of the [MASK] are written over by the next step. The rules are the
release's (BeamSearch in pytorch_pretrained_bert/modeling.py; SPEC sections 10 and 11), a beam of 1 is its greedy
search. It always runs to the greatest length; we stop once no hypothesis can overtake the best finished one, which
changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.vlp.layout import TASK_NUMBERS, SpecialIds, decode_types, decode_visible, prefix_ids
from models.vlp.network import LayerCache, SeenRegions, VlpModel
from readroom.errors import BadCall

FORBIDDEN = -10000.0  # the release's; hypotheses below half of it are no candidates of anything
SMALLEST_NGRAM = 2
MOST_BEAMS = 64  # each is another row of everything; nobody gains from more, and a manifest may say any number


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How captions are searched. Lengths in tokens, the greatest counts the final [SEP].

    `length_bonus` is added to a hypothesis' log-probability for each token. `ngram_size` 0: repetitions are allowed;
    else no n-gram comes twice in a caption, except through the tokens `free_ids`.
    """

    num_beams: int = 1
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    length_bonus: float = 0.0
    ngram_size: int = 0
    free_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Raise BadCall for what cannot be searched."""
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise BadCall("a search needs at least one beam and one token")
        if self.num_beams > MOST_BEAMS:
            raise BadCall(f"a search has at most {MOST_BEAMS} beams")
        if self.ngram_size < 0 or 0 < self.ngram_size < SMALLEST_NGRAM:
            raise BadCall(f"repeated n-grams are found from n = {SMALLEST_NGRAM} on")


@dataclass(frozen=True, slots=True)
class Frames:
    """Every step of a search: [N, T, K] scores (cumulative log-probability), tokens, and which slot each continues."""

    scores: Tensor
    tokens: Tensor
    parents: Tensor

    def find_last(self, end: int) -> Tensor:
        """[N]: the first frame whose slots all hold `end`, else the last; later ones mean nothing."""
        finished = (self.tokens == end).all(dim=2)
        last = torch.full_like(finished[:, 0], self.tokens.shape[1] - 1, dtype=torch.long)
        return torch.where(finished.any(dim=1), finished.int().argmax(dim=1), last)


@dataclass(frozen=True, slots=True)
class Searched:
    """Token ids of each caption, its end included, and its score: log-probability plus bonus.

    `logits` holds [N * K, V] for each step (N at the first), only where they were asked for.
    """

    tokens: tuple[list[int], ...]
    scores: tuple[float, ...]
    frames: Frames
    logits: tuple[Tensor, ...] = ()

    def mean_scores(self, options: SearchOptions) -> tuple[float, ...]:
        """Mean log-probability of a caption's tokens, its end included."""
        pairs = zip(self.scores, self.tokens, strict=True)
        return tuple(score / len(tokens) - options.length_bonus for score, tokens in pairs)


class Writer:
    """The incremental decoder: prefix once, then two positions a step for each slot, its last token and a fresh [MASK].

    The K slots of a picture stand in one row, so that its prefix is kept once and read once. Who may look at whom is
    `decode_visible`'s, with each text position's column K times; of those a slot sees its own past only: `seen`
    [N, K, positions]. To go on from another slot's text changes that, and no key or value.
    """

    def __init__(self, model: VlpModel, regions: SeenRegions, special: SpecialIds, steps: int, slots: int) -> None:
        """Read the regions of N pictures and make room for `steps` tokens a slot. Raises BadCall when too many."""
        if model.config.prefix_length + steps > model.config.max_position_embeddings:
            raise BadCall("more tokens are asked for than the model has positions")
        self.model, self.special = model, special
        self.prefix = model.config.prefix_length
        self.types = decode_types(model.config, steps).to(model.device)
        self.rows = len(regions.features)
        self.seen = torch.ones(self.rows, 1, self.prefix, dtype=torch.bool, device=model.device)
        self.caches = [self._make_cache(self.prefix + steps * slots) for _ in range(model.config.num_hidden_layers)]
        plan = decode_visible(model.config, steps)
        copies = torch.tensor([1] * self.prefix + [slots] * steps)
        self.plan = plan.repeat_interleave(copies, dim=1).to(model.device)
        self.first = self._drop_full(plan[self.prefix : self.prefix + 1, : self.prefix + 1])
        ids = torch.tensor([prefix_ids(model.config, special)], device=model.device).expand(self.rows, -1)
        types = self.types[: self.prefix].expand(self.rows, -1)
        visible = self._drop_full(plan[: self.prefix, : self.prefix])
        model.bert.encoder(model.embed(regions, ids, types), visible, self.caches)
        self._keep_seen()

    def start(self) -> Tensor:
        """LM logits [N, V] of the first token."""
        masks = torch.full((self.rows, 1), self.special.mask, device=self.model.device)
        return self._read_masks(masks, torch.tensor([self.prefix], device=masks.device), self.first, 1)

    def write(self, chosen: Tensor, parents: Tensor) -> Tensor:
        """LM logits [N * K, V] of the next token: slot k writes `chosen[:, k]` behind slot `parents[:, k]`'s text."""
        slots = chosen.shape[1]
        past = self.seen.gather(1, parents[:, :, None].expand(-1, -1, self.seen.shape[2]))
        own = torch.eye(slots, dtype=torch.bool, device=chosen.device).expand(self.rows, -1, -1)
        mine = torch.cat([past, own, own], dim=2)  # the tokens just chosen, the [MASK]s behind them
        self.seen = mine[:, :, :-slots]
        place = self.prefix + (self.seen.shape[2] - self.prefix) // slots  # of the [MASK]s
        positions = torch.arange(place - 1, place + 1, device=chosen.device).repeat_interleave(slots)
        ids = torch.cat([chosen, torch.full_like(chosen, self.special.mask)], dim=1)
        planned = self.plan[place - 1 : place + 1, : mine.shape[2]]
        visible = (mine[:, None] & planned[:, None]).flatten(1, 2)
        return self._read_masks(ids, positions, visible[:, None], slots)

    def _drop_full(self, visible: Tensor) -> Tensor | None:
        """None for a mask that hides nothing: attention is faster without."""
        return None if bool(visible.all()) else visible.to(self.model.device)

    def _read_masks(self, ids: Tensor, positions: Tensor, visible: Tensor | None, masks: int) -> Tensor:
        """LM logits of the [MASK]s, which are the last `masks` of `ids` [N, L]; what stands before them is kept."""
        hidden = self.model.bert.embeddings(ids, self.types[positions].expand(self.rows, -1), positions)
        hidden = self.model.bert.encoder(hidden, visible, self.caches)
        self._keep_seen()
        return self.model.predict_tokens(hidden[:, -masks:], TASK_NUMBERS["s2s"]).float().flatten(0, 1)

    def _make_cache(self, room: int) -> LayerCache:
        config = self.model.config
        size = config.hidden_size // config.num_attention_heads
        shape = (self.rows, config.num_attention_heads, room, size)
        keys = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        return LayerCache(keys, torch.empty_like(keys), 0)

    def _keep_seen(self) -> None:
        for cache in self.caches:
            cache.length = self.seen.shape[2]


class Search:
    """What a search of N pictures has found so far: a frame a step, and each picture's best finished score."""

    def __init__(self, count: int, options: SearchOptions, end: int, device: torch.device) -> None:
        self.count, self.options, self.end = count, options, end
        self.scores: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.texts: list[list[int]] = [[] for _ in range(count)]
        self.best = torch.full((count,), -torch.inf, device=device)

    def add_frame(self, logits: Tensor) -> None:
        """Choose the K best of what `logits` [rows, V] let each slot go on with."""
        options, end, step = self.options, self.end, len(self.tokens)
        steps = torch.log_softmax(logits, dim=-1)
        forbid_tokens(steps, self.texts, step, options, end)
        scores, tokens, parents = rank_slots(steps, self.scores, self.tokens, self.count, options.num_beams, end)
        self.scores.append(scores)
        self.tokens.append(tokens)
        self.parents.append(parents)
        self.best = torch.maximum(self.best, best_finished(scores, tokens, step, options, end))
        if options.ngram_size:
            self.texts = extend_texts(self.texts, tokens, parents, len(self.texts) // self.count)

    def is_settled(self) -> bool:
        """Whether further frames change no caption."""
        return is_settled(self.scores[-1], self.tokens[-1], self.best, self.options, self.end)

    def collect(self) -> Frames:
        """All frames."""
        return Frames(torch.stack(self.scores, 1), torch.stack(self.tokens, 1), torch.stack(self.parents, 1))


def search_captions(
    model: VlpModel,
    regions: SeenRegions,
    special: SpecialIds,
    options: SearchOptions,
    whole: bool = False,
    keep_logits: bool = False,
) -> Searched:
    """Captions of N pictures. `whole` runs to the greatest length as the release does; the captions are the same.

    Raises BadCall for more beams than the vocabulary has words, or more tokens than the model has positions.
    """
    if options.num_beams > model.config.vocab_size:
        raise BadCall("a search has at most as many beams as the vocabulary has words")
    writer = Writer(model, regions, special, options.max_new_tokens, options.num_beams)
    search = Search(len(regions.features), options, special.end, model.device)
    kept: list[Tensor] = []
    for step in range(options.max_new_tokens):
        logits = writer.write(search.tokens[-1], search.parents[-1]) if step else writer.start()
        if keep_logits:
            kept.append(logits)
        search.add_frame(logits)
        if not whole and search.is_settled():
            break
    frames = search.collect()
    found, totals = trace_best(frames, options.length_bonus, special.end)
    return Searched(found, totals, frames, tuple(kept))


# Rules ---------------------------------------------------------------------------------------------------------------


def forbid_tokens(steps: Tensor, texts: Sequence[Sequence[int]], step: int, options: SearchOptions, end: int) -> None:
    """Lower in place what may not come next in `steps` [rows, V]: a repeated n-gram, an end too early."""
    if options.ngram_size:
        for row, text in enumerate(texts):
            repeated = find_repeated(text, options.ngram_size, options.free_ids)
            steps[row, repeated] += FORBIDDEN
    if step + 1 <= options.min_new_tokens:
        steps[:, end] = FORBIDDEN


def find_repeated(text: Sequence[int], size: int, free: frozenset[int]) -> list[int]:
    """The tokens that would complete an n-gram which `text` holds already."""
    tail = list(text[len(text) - size + 1 :])
    if len(text) < size or any(token in free for token in tail):
        return []
    starts = range(len(text) - size + 1)
    found = {text[start + size - 1] for start in starts if list(text[start : start + size - 1]) == tail}
    return sorted(found - free)


def rank_slots(
    steps: Tensor, scores: Sequence[Tensor], tokens: Sequence[Tensor], count: int, beams: int, end: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Totals, tokens and parents [N, K] of the next frame, best first.

    Each slot proposes its K best tokens; one that ended falls out by a great malus.
    """
    proposed, proposals = steps.topk(beams, dim=-1)
    if not scores:
        return proposed, proposals, torch.zeros_like(proposals)
    ended = (tokens[-1] == end).flatten()[:, None]
    totals = proposed + (ended * FORBIDDEN + scores[-1].flatten()[:, None])
    best, places = totals.view(count, beams * beams).topk(beams, dim=-1)
    return best, proposals.view(count, beams * beams).gather(1, places), places // beams


def extend_texts(texts: Sequence[Sequence[int]], tokens: Tensor, parents: Tensor, beams: int) -> list[list[int]]:
    """What each of the N * K rows holds after a frame."""
    rows = zip(tokens.tolist(), parents.tolist(), strict=True)
    return [
        [*texts[picture * beams + parent], token]
        for picture, (chosen, origins) in enumerate(rows)
        for token, parent in zip(chosen, origins, strict=True)
    ]


def best_finished(scores: Tensor, tokens: Tensor, step: int, options: SearchOptions, end: int) -> Tensor:
    """[N]: the best score of a hypothesis that ends in this frame, minus infinity where none does."""
    ended = torch.where(tokens == end, scores + options.length_bonus * (step + 1), -torch.inf)
    return ended.max(dim=1).values


def is_settled(scores: Tensor, tokens: Tensor, best: Tensor, options: SearchOptions, end: int) -> bool:
    """Whether no slot can still reach its picture's best: totals only fall, and the bonus has a greatest value.

    A slot level with the best goes on: left as the last frame's, it could come before the best one and win the tie.
    """
    reach = scores + max(0.0, options.length_bonus) * options.max_new_tokens
    return bool((torch.where(tokens == end, -torch.inf, reach) < best[:, None]).all())


def trace_best(frames: Frames, bonus: float, end: int) -> tuple[tuple[list[int], ...], tuple[float, ...]]:
    """The best caption of each picture and its score: of all that ended, and of the last valid frame's slots.

    On ties the first wins, frame by frame, then slot by slot.
    """
    _, length, beams = frames.tokens.shape
    last = frames.find_last(end).cpu()[:, None, None]
    scores, tokens = frames.scores.cpu(), frames.tokens.cpu()
    numbers = torch.arange(length)[None, :, None]
    candidate = ((tokens == end) & (numbers <= last)) | (numbers == last)
    rated = torch.where(candidate, scores + bonus * (numbers + 1), -torch.inf).flatten(1)
    best = rated.argmax(dim=1)
    found = [
        trace_back(tokens[row].tolist(), frames.parents[row].tolist(), int(place) // beams, int(place) % beams)
        for row, place in enumerate(best)
    ]
    return tuple(found), tuple(rated.gather(1, best[:, None])[:, 0].tolist())


def trace_back(tokens: list[list[int]], parents: list[list[int]], frame: int, slot: int) -> list[int]:
    """The tokens that lead to a slot of a frame."""
    text = [tokens[frame][slot]]
    while frame > 0:
        slot = parents[frame][slot]
        frame -= 1
        text.append(tokens[frame][slot])
    return text[::-1]
