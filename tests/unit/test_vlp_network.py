"""What holds for every VLP, whatever its weights: shown on random ones of several sizes, small enough to try many."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.vlp import decoding
from models.vlp.config import VlpConfig
from models.vlp.decoding import Frames, Searched, SearchOptions, search_captions, trace_back, trace_best
from models.vlp.layout import TASK_NUMBERS, Mode, SpecialIds, decode_types, decode_visible, lay_out, prefix_ids
from models.vlp.network import SeenRegions, VlpModel
from readroom.errors import BadCall
from tests.vlp_oracle import SAFE_MARGIN, Found, Rules, Slot, search_beams, select_best

SPECIAL = SpecialIds(unknown=3, start=1, end=2, mask=4)
SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_region": {"num_regions": 1, "num_attention_heads": 1, "num_hidden_layers": 3},
    "relaxed": {"relax_projection": 4, "num_hidden_layers": 1},
    "old_types": {"type_vocab_size": 2, "vocab_size": 31, "intermediate_size": 6, "num_attention_heads": 8},
    "no_classes": {"region_num_classes": 0, "region_feat_dim": 40, "num_regions": 11},
}


def make_config(**changes: Any) -> VlpConfig:
    sizes = {
        "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "num_regions": 4, "region_feat_dim": 8, "region_num_classes": 5, "num_answers": 3,
        "max_position_embeddings": 32, "max_text_length": 8,
    }  # fmt: skip
    return VlpConfig(**(sizes | changes))


def make_model(config: VlpConfig, seed: int) -> VlpModel:
    """Weights so large that attention chooses, and a [SEP] likely enough that some captions end."""
    torch.manual_seed(seed)
    model = VlpModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.8 if "_embeddings" in name else 2.0 / weight.shape[1] ** 0.5)
        model.cls.predictions.bias.normal_()
        model.cls.predictions.bias[SPECIAL.end] += 1
    return model


def make_regions(config: VlpConfig, count: int) -> SeenRegions:
    shape = (count, config.num_regions)
    return SeenRegions(torch.rand(*shape, config.region_feat_dim) * 3, torch.randn(*shape, config.place_dim))


def draw_texts(config: VlpConfig, lengths: Sequence[int]) -> list[list[int]]:
    return [torch.randint(5, config.vocab_size, (length,)).tolist() for length in lengths]


# --- the forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", TASK_NUMBERS)
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_regions_in_another_order_change_no_text(sizes: str, mode: Mode) -> None:
    config = make_config(**SIZES[sizes])
    model, regions = make_model(config, 0), make_regions(config, 3)
    laid = lay_out(draw_texts(config, (5, 1, 8)), mode, config, SPECIAL)
    order = torch.randperm(config.num_regions)
    hidden = model(regions, laid.ids, laid.types, laid.visible)
    moved = SeenRegions(regions.features[:, order], regions.places[:, order])
    again = model(moved, laid.ids, laid.types, laid.visible)
    places = torch.arange(hidden.shape[1])
    places[1 : 1 + config.num_regions] = 1 + order
    torch.testing.assert_close(again, hidden[:, places], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_features_and_places_of_regions_belong_together() -> None:
    """The order of one of them alone does change the text: the test above compares something."""
    config = make_config()
    model, regions = make_model(config, 0), make_regions(config, 1)
    laid = lay_out(draw_texts(config, (5,)), "s2s", config, SPECIAL)
    moved = SeenRegions(regions.features.flip(1), regions.places)
    hidden, again = (model(seen, laid.ids, laid.types, laid.visible)[:, -1] for seen in (regions, moved))
    assert float((hidden - again).abs().max()) > 0.01


@pytest.mark.parametrize("mode", TASK_NUMBERS)
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_padding_changes_no_real_position(sizes: str, mode: Mode) -> None:
    config = make_config(**SIZES[sizes])
    model, regions = make_model(config, 1), make_regions(config, 3)
    texts, prefix = draw_texts(config, (5, 2, 8)), config.prefix_length
    hidden = [
        model(regions, laid.ids, laid.types, laid.visible)
        for laid in (lay_out(texts, mode, config, SPECIAL, length) for length in (None, prefix + 9, 32))
    ]
    for row, text in enumerate(texts):
        real = prefix + len(text) + 1
        alone = lay_out([text], mode, config, SPECIAL)
        seen = SeenRegions(regions.features[row : row + 1], regions.places[row : row + 1])
        expected = model(seen, alone.ids, alone.types, alone.visible)[0]
        assert len(expected) == real
        for padded in hidden:
            torch.testing.assert_close(padded[row, :real], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_text_sees_back_only_in_s2s_and_all_in_bi() -> None:
    config = make_config()
    model, regions = make_model(config, 2), make_regions(config, 1)
    first = draw_texts(config, (6,))[0]
    other = [*first[:3], (first[3] - 4) % 7 + 5, *first[4:]]
    assert other != first
    changed = {}
    for mode in TASK_NUMBERS:
        laid = [lay_out([text], mode, config, SPECIAL) for text in (first, other)]
        one, two = (model(regions, made.ids, made.types, made.visible)[0] for made in laid)
        changed[mode] = ((one - two).abs().amax(dim=1) > 1e-5).tolist()
    prefix = config.prefix_length
    assert changed["s2s"] == [False] * (prefix + 3) + [True] * 4
    assert changed["bi"] == [True] * (prefix + 7)


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_cached_decoding_equals_a_whole_forward_for_each_token(sizes: str, beams: int) -> None:
    config = make_config(**SIZES[sizes])
    model, regions = make_model(config, 3), make_regions(config, 3)
    options = SearchOptions(beams, 8, min_new_tokens=8)
    found = search_captions(model, regions, SPECIAL, options, whole=True, keep_logits=True)
    assert [len(logits) for logits in found.logits] == [3] + [3 * beams] * 7
    assert float((found.logits[0][0] - found.logits[0][1]).abs().max()) > 0.01  # pictures differ
    compared = 0
    for step, logits in enumerate(found.logits):
        slots = 1 if step == 0 else beams
        for row in range(3 * slots):
            picture, slot = divmod(row, slots)
            text = read_slot(found, picture, step - 1, slot)
            expected = run_whole(model, regions, picture, text)
            torch.testing.assert_close(logits[row], expected, atol=5e-5, rtol=1e-4)
            compared += 1
    assert compared == 3 + 3 * beams * 7


def blind_to_region(seen: Tensor, prefix: int) -> None:
    seen[:prefix, 1] = False


def blind_first_mask(seen: Tensor, prefix: int) -> None:
    seen[prefix, 1] = False


def token_sees_mask(seen: Tensor, prefix: int) -> None:
    seen[prefix, prefix + 1] = True


def mask_misses_token(seen: Tensor, prefix: int) -> None:
    seen[prefix + 2, prefix + 1] = False


@pytest.mark.parametrize(
    ("spoil", "step"), [(blind_to_region, 0), (blind_first_mask, 0), (token_sees_mask, 1), (mask_misses_token, 2)]
)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_a_caption_is_written_by_the_mask_that_is_planned(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor, int], None], step: int, beams: int
) -> None:
    """A change of `decode_visible` changes the logits from the step on that it touches."""

    def spoilt(config: VlpConfig, steps: int) -> Tensor:
        seen = decode_visible(config, steps)
        spoil(seen, config.prefix_length)
        return seen

    config = make_config()
    model, regions = make_model(config, 3), make_regions(config, 2)
    options = SearchOptions(beams, 8, min_new_tokens=8)
    right = search_captions(model, regions, SPECIAL, options, whole=True, keep_logits=True)
    monkeypatch.setattr(decoding, "decode_visible", spoilt)
    wrong = search_captions(model, regions, SPECIAL, options, whole=True, keep_logits=True)
    pairs = zip(right.logits, wrong.logits, strict=True)
    changed = [float((one - other).abs().max()) > 1e-3 for one, other in pairs]
    assert changed[: step + 1] == [False] * step + [True]


def test_more_beams_than_there_are_words_are_refused() -> None:
    config = make_config()
    model, regions = make_model(config, 0), make_regions(config, 2)
    with pytest.raises(BadCall, match="as many beams as the vocabulary has words"):
        search_captions(model, regions, SPECIAL, SearchOptions(config.vocab_size + 1, 4))
    found = search_captions(model, regions, SPECIAL, SearchOptions(config.vocab_size, 4))
    assert all(found.tokens)


def test_a_search_has_a_greatest_number_of_beams() -> None:
    assert SearchOptions(64).num_beams == 64
    for beams in (65, 10**9):
        with pytest.raises(BadCall, match="at most 64 beams"):
            SearchOptions(beams)


def read_slot(found: Searched, picture: int, frame: int, slot: int) -> list[int]:
    if frame < 0:
        return []
    tokens, parents = found.frames.tokens[picture].tolist(), found.frames.parents[picture].tolist()
    return trace_back(tokens, parents, frame, slot)


def run_whole(model: VlpModel, regions: SeenRegions, picture: int, text: Sequence[int]) -> Tensor:
    """Logits of the token behind `text`, with nothing kept from earlier steps."""
    config = model.config
    ids = torch.tensor([[*prefix_ids(config, SPECIAL), *text, SPECIAL.mask]])
    types, visible = decode_types(config, len(text) + 1)[None], decode_visible(config, len(text) + 1)[None]
    seen = SeenRegions(regions.features[picture : picture + 1], regions.places[picture : picture + 1])
    hidden = model(seen, ids, types, visible)
    return model.predict_tokens(hidden[0, -1], TASK_NUMBERS["s2s"])


class TableWriter:
    """In the place of the Writer: logits come from a function of picture and text, exact and without a model."""

    table: Callable[[int, tuple[int, ...]], Tensor]

    def __init__(self, model: VlpModel, regions: SeenRegions, special: SpecialIds, steps: int, slots: int) -> None:
        self.texts: list[list[tuple[int, ...]]] = [[()] for _ in regions.features]

    def start(self) -> Tensor:
        rows = [type(self).table(picture, text) for picture, texts in enumerate(self.texts) for text in texts]
        return torch.stack(rows)

    def write(self, chosen: Tensor, parents: Tensor) -> Tensor:
        grown = zip(self.texts, chosen.tolist(), parents.tolist(), strict=True)
        self.texts = [
            [(*texts[parent], token) for token, parent in zip(tokens, origins, strict=True)]
            for texts, tokens, origins in grown
        ]
        return self.start()


@pytest.fixture
def use_table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let searches look logits up in a table drawn from a seed; `whole_numbers` makes many of them equal."""

    def use(seed: int, words: int, whole_numbers: bool = False) -> None:
        def look_up(picture: int, text: tuple[int, ...]) -> Tensor:
            drawn = np.random.default_rng([seed, picture + 1, *(token + 1 for token in text)]).normal(size=words)
            drawn[SPECIAL.end] += 0.7
            return torch.tensor(np.round(drawn) if whole_numbers else 1.5 * drawn, dtype=torch.float32)

        monkeypatch.setattr(TableWriter, "table", staticmethod(look_up), raising=False)
        monkeypatch.setattr(decoding, "Writer", TableWriter)

    return use


def draw_options(rng: random.Random, words: int, steps: int) -> SearchOptions:
    """Any mixture of the rules."""
    return SearchOptions(
        num_beams=rng.randint(1, 5),
        max_new_tokens=steps,
        min_new_tokens=rng.choice([0, 0, 2, steps]),
        length_bonus=rng.choice([0.0, 0.0, 0.6, 2.5, -0.8]),
        ngram_size=rng.choice([0, 0, 2, 3]),
        free_ids=frozenset(rng.sample(range(words), rng.randint(0, 2))),
    )


def make_rules(options: SearchOptions) -> Rules:
    return Rules(
        options.num_beams,
        options.max_new_tokens,
        SPECIAL.end,
        options.min_new_tokens,
        options.length_bonus,
        options.ngram_size,
        options.free_ids,
    )


def test_search_equals_plain_lists_on_tables(use_table: Callable[..., None]) -> None:
    """300 searches of two pictures. The few with a decision too near to call in float32 are left out."""
    config, words, steps = make_config(), 7, 7
    model, regions = make_model(config, 0), make_regions(config, 2)
    compared, lengths, blocked = 0, set(), 0
    for seed in range(300):
        use_table(seed, words)
        options = draw_options(random.Random(seed), words, steps)
        ours = search_captions(model, regions, SPECIAL, options, whole=True)
        for picture in range(2):
            theirs = search_beams(lambda text, picture=picture: TableWriter.table(picture, text), make_rules(options))
            if theirs.margin < SAFE_MARGIN:
                continue
            compare_searches(ours, picture, theirs)
            compared, blocked = compared + 1, blocked + bool(options.ngram_size)
            lengths.add(len(theirs.text))
    assert compared > 400 and blocked > 150
    assert lengths == set(range(1, steps + 1))


def compare_searches(ours: Searched, picture: int, theirs: Found) -> None:
    assert tuple(ours.tokens[picture]) == theirs.text
    assert ours.scores[picture] == pytest.approx(theirs.score, abs=1e-3)
    assert int(ours.frames.find_last(SPECIAL.end)[picture]) == theirs.last
    for number, frame in enumerate(theirs.frames):
        for place, slot in enumerate(frame):
            if slot.score > decoding.FORBIDDEN / 2:
                assert tuple(read_slot(ours, picture, number, place)) == slot.text
                assert int(ours.frames.parents[picture, number, place]) == slot.parent


@torch.no_grad()
def test_search_equals_plain_lists_on_random_models() -> None:
    """The network's own logits, a whole forward for each hypothesis in float64."""
    compared, lengths = 0, set()
    for seed in range(24):
        config = make_config(num_hidden_layers=1, vocab_size=9, **({"relax_projection": 4} if seed % 3 else {}))
        model, regions = make_model(config, seed), make_regions(config, 2)
        options = draw_options(random.Random(seed), config.vocab_size, 6)
        ours = search_captions(model, regions, SPECIAL, options)
        exact = make_model(config, seed).double()
        for picture in range(2):
            known: dict[tuple[int, ...], Tensor] = {}
            theirs = search_beams(lambda text: remember(known, exact, regions, picture, text), make_rules(options))  # noqa: B023
            if theirs.margin > SAFE_MARGIN:
                assert tuple(ours.tokens[picture]) == theirs.text
                assert ours.scores[picture] == pytest.approx(theirs.score, abs=1e-3)
                compared += 1
                lengths.add(len(theirs.text))
    assert compared > 30
    assert len(lengths) >= 4


def remember(
    known: dict[tuple[int, ...], Tensor], model: VlpModel, regions: SeenRegions, picture: int, text: tuple[int, ...]
) -> Tensor:
    if text not in known:
        known[text] = run_whole(model, regions, picture, text)
    return known[text]


@torch.no_grad()
def test_early_stop_equals_the_whole_search_on_200_random_models() -> None:
    stopped, ended = 0, 0
    for seed in range(200):
        config = make_config(num_hidden_layers=1)
        model, regions = make_model(config, seed), make_regions(config, 2)
        options = draw_options(random.Random(seed), config.vocab_size, 8)
        whole, early = (search_captions(model, regions, SPECIAL, options, whole=whole) for whole in (True, False))
        assert (early.tokens, early.scores) == (whole.tokens, whole.scores)
        stopped += early.frames.tokens.shape[1] < 8
        ended += any(len(text) < 8 for text in whole.tokens)
    assert stopped > 30 and ended > 60


def test_early_stop_equals_the_whole_search_where_scores_tie(use_table: Callable[..., None]) -> None:
    """Whole numbers as logits: an unfinished caption may be as likely as the best finished one, to the last bit."""
    config, words = make_config(), 6
    model, regions = make_model(config, 0), make_regions(config, 1)
    tied = 0
    for seed in range(300):
        use_table(seed, words, whole_numbers=True)
        rng = random.Random(seed)
        options = SearchOptions(rng.randint(1, 4), 5, length_bonus=rng.choice([0.0, 0.0, 0.5, -0.5]))
        whole, early = (search_captions(model, regions, SPECIAL, options, whole=whole) for whole in (True, False))
        assert (early.tokens, early.scores) == (whole.tokens, whole.scores), seed
        first = whole.frames.scores[0, 0]
        tied += len(first.unique()) < len(first)
    assert tied > 50


def test_best_caption_is_the_first_of_equals() -> None:
    """Whole numbers as scores, so that many tie: frame by frame, then slot by slot."""
    ties = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shape = (1, 4, 3)
        scores = torch.tensor(-rng.integers(0, 4, shape), dtype=torch.float32)
        tokens, parents = torch.tensor(rng.choice([SPECIAL.end, 5, 6], shape)), torch.tensor(rng.integers(0, 3, shape))
        bonus = float(rng.choice([0.0, 0.5, -0.5]))
        frames = Frames(scores, tokens, parents)
        theirs = Found(last=int(frames.find_last(SPECIAL.end)))
        ours = Searched((), (), frames)
        for number in range(theirs.last + 1):
            texts = [tuple(read_slot(ours, 0, number, slot)) for slot in range(3)]
            theirs.frames.append([Slot(float(scores[0, number, slot]), texts[slot], 0) for slot in range(3)])
        select_best(theirs, Rules(3, 4, SPECIAL.end, bonus=bonus))
        texts, totals = trace_best(frames, bonus, SPECIAL.end)
        assert (tuple(texts[0]), totals[0]) == (theirs.text, theirs.score), seed
        ties += theirs.margin == 0.0
    assert ties > 80
