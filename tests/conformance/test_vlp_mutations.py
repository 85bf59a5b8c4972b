"""Deliberate mistakes, each put into our real VLP: the parity checks must catch every one, or they check too little.

Each mistake is one a port of VLP makes (SPEC section 12). The checks pass before it, and must fail with it: by a value
that differs, and well above the tolerance.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.vlp import captioner, decoding, layout, regions
from models.vlp.captioner import AnswerRaw, VlpParts
from models.vlp.decoding import Frames, Writer
from models.vlp.layout import lay_out
from models.vlp.network import Embeddings, Encoder, VlpModel
from models.vlp.regions import Regions
from tests.vlp_oracle import PLANS, make_set
from tests.vlp_reference import RECORDED, Diverged, ReferenceSet, compare_case, find_first_divergence, read_set

Patch = pytest.MonkeyPatch
CLEARLY = 2.0  # tolerances by which a mistake must be seen
BERTS_EPS = 1e-12


@dataclass(frozen=True)
class Mistake:
    """What is done wrong, the cases that notice, and the first tensor to diverge.

    `is_one` says for which sets it is a mistake at all. Its first case must notice it in any of them; the others see
    less of some, and must in the made set.
    """

    spoil: Callable[[Patch, ReferenceSet], None]
    caught_by: tuple[str, ...]
    first: str
    is_one: Callable[[ReferenceSet], bool] = lambda reference: True


def spoil_layer_norms(patch: Patch, reference: ReferenceSet) -> None:
    """BERT's eps in the model."""
    norms = [module for module in reference.model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 + 2 * reference.config.num_hidden_layers
    for norm in norms:
        patch.setattr(norm, "eps", BERTS_EPS)


def spoil_region_norms(patch: Patch, _: ReferenceSet) -> None:
    """BERT's eps in the regions' places."""
    patch.setattr(regions, "EPSILON", BERTS_EPS)


def spoil_types(patch: Patch, _: ReferenceSet) -> None:
    """Captions are written with the types of understanding."""
    patch.setattr(layout, "choose_types", lambda mode, config: (0, 1))


def swap_types(patch: Patch, _: ReferenceSet) -> None:
    """Regions get the text's type, the text the regions'."""
    choose = layout.choose_types
    patch.setattr(layout, "choose_types", lambda mode, config: choose(mode, config)[::-1])


def add_positions(patch: Patch, _: ReferenceSet) -> None:
    """Regions get the position embedding of where they stand in the sequence."""
    embed = Embeddings.forward

    def forward(self: Embeddings, ids: Tensor, types: Tensor, positions: Tensor, seen: Tensor | None = None) -> Tensor:
        if seen is not None:
            seen = seen + self.position_embeddings(positions[1 : 1 + seen.shape[1]])
        return embed(self, ids, types, positions, seen)

    patch.setattr(Embeddings, "forward", forward)


def approximate_gelu(patch: Patch, _: ReferenceSet) -> None:
    """GELU by tanh, as in GPT."""
    exact = functional.gelu
    patch.setattr(functional, "gelu", lambda values: exact(values, approximate="tanh"))


def sum_instead_of_product(patch: Patch, _: ReferenceSet) -> None:
    """[CLS] and [SEP] are added."""

    def predict(self: VlpModel, hidden: Tensor) -> Tensor:
        answers: Tensor = self.ans_classifier(hidden[:, 0] + hidden[:, self.config.prefix_length - 1])
        return answers

    patch.setattr(VlpModel, "predict_answers", predict)


def use_last_sep(patch: Patch, _: ReferenceSet) -> None:
    """The [SEP] behind the question takes the place of the one before it: here, the last position of each row."""

    def predict(self: VlpModel, hidden: Tensor) -> Tensor:
        answers: Tensor = self.ans_classifier(hidden[:, 0] * hidden[:, -1])
        return answers

    patch.setattr(VlpModel, "predict_answers", predict)


def allow_unknown_answer(patch: Patch, _: ReferenceSet) -> None:
    """Answer 0, "<unk>", may be given."""

    def pick(parts: VlpParts, seen: Regions, questions: Any) -> AnswerRaw:
        model = parts.model
        asked = lay_out(questions, "bi", model.config, parts.tokenizer.special)
        best = model.predict_answers(model(captioner.see_regions(seen), asked.ids, asked.types, asked.visible)).max(1)
        return AnswerRaw(tuple(best.indices.tolist()), tuple(best.values.tolist()))

    patch.setattr(captioner, "pick_answers", pick)


def put_classes_first(patch: Patch, reference: ReferenceSet) -> None:
    """Places are classes, then geometry."""
    locate, width = captioner.locate_regions, reference.config.region_geometry_dim

    def swapped(boxes: Tensor, classes: Tensor) -> Tensor:
        places = locate(boxes, classes)
        return torch.cat([places[..., width:], places[..., :width]], dim=-1)

    patch.setattr(captioner, "locate_regions", swapped)


def keep_class_index(patch: Patch, _: ReferenceSet) -> None:
    """The fifth column of a box, its class, goes for the confidence."""
    locate = captioner.locate_regions
    patch.setattr(captioner, "locate_regions", lambda boxes, classes: locate(boxes[..., [0, 1, 2, 3, 5, 4]], classes))


def drop_second_relu(patch: Patch, reference: ReferenceSet) -> None:
    """Features end with a linear layer."""
    assert isinstance(reference.model.vis_embed[3], nn.ReLU)
    patch.setitem(reference.model.vis_embed._modules, "3", nn.Identity())


def show_mask_to_token(patch: Patch, _: ReferenceSet) -> None:
    """While a caption is written, the token just chosen sees the [MASK] behind it."""
    encode = Encoder.forward

    def forward(self: Encoder, hidden: Tensor, visible: Tensor | None, caches: Any = None) -> Tensor:
        if caches is not None and visible is not None:
            slots = visible.shape[-2] // 2  # their tokens, then their [MASK]s
            visible = visible.clone()
            visible[..., :slots, -slots:] |= torch.eye(slots, dtype=torch.bool)
        return encode(self, hidden, visible, caches)

    patch.setattr(Encoder, "forward", forward)


def forget_parents(patch: Patch, _: ReferenceSet) -> None:
    """Each slot of a beam goes on from what stood in the same slot, whatever text it continues."""
    write = Writer.write

    def write_on(self: Writer, chosen: Tensor, parents: Tensor) -> Tensor:
        same = torch.arange(chosen.shape[1]).clamp(max=self.seen.shape[1] - 1)
        return write(self, chosen, same.expand_as(parents))

    patch.setattr(Writer, "write", write_on)


def divide_by_length(patch: Patch, _: ReferenceSet) -> None:
    """The best caption is the one with the best mean, as in BLIP, and not the best sum."""
    trace = decoding.trace_best

    def trace_mean(frames: Frames, bonus: float, end: int) -> Any:
        lengths = torch.arange(1, frames.scores.shape[1] + 1)[None, :, None]
        return trace(replace(frames, scores=frames.scores / lengths), bonus, end)

    patch.setattr(decoding, "trace_best", trace_mean)


def has_new_types(reference: ReferenceSet) -> bool:
    return reference.config.has_new_types


def has_two_layers(reference: ReferenceSet) -> bool:
    """In a single layer nothing is made of what the token sees."""
    return reference.config.num_hidden_layers > 1


def likes_unknown_answer(reference: ReferenceSet) -> bool:
    return bool((reference.expected["vqa.logits"].argmax(dim=1) == 0).any())


FORWARDS = ("mlm_s2s", "mlm_bi", "vqa", "greedy")
MISTAKES = {
    # The five every port is tried with.
    "layer_norm_eps": Mistake(spoil_layer_norms, FORWARDS, "mlm_s2s.embedding_output"),
    "types_of_understanding": Mistake(
        spoil_types, ("layout_s2s", "layout_decode", "greedy", "beam*"), "layout_s2s.segment_ids", has_new_types
    ),
    "positions_of_regions": Mistake(add_positions, FORWARDS, "mlm_s2s.embedding_output"),
    "gelu_by_tanh": Mistake(approximate_gelu, FORWARDS, "mlm_s2s.sequence_output"),
    "sum_for_product": Mistake(sum_instead_of_product, ("vqa",), "vqa.logits"),
    # And others.
    "layer_norm_eps_of_regions": Mistake(spoil_region_norms, ("prep", *FORWARDS), "prep."),
    "types_swapped": Mistake(swap_types, ("layout_*", "greedy", "beam*"), "layout_s2s.segment_ids"),
    "last_sep": Mistake(use_last_sep, ("vqa",), "vqa.logits"),
    "unknown_answer": Mistake(allow_unknown_answer, ("vqa",), "vqa.answer_index", likes_unknown_answer),
    "classes_first": Mistake(put_classes_first, ("prep", *FORWARDS), "prep.vis_pe_geometry"),
    "class_index_for_confidence": Mistake(keep_class_index, ("prep", *FORWARDS), "prep.vis_pe_geometry"),
    "no_second_relu": Mistake(drop_second_relu, FORWARDS, "mlm_s2s.embedding_output"),
    "token_sees_mask": Mistake(show_mask_to_token, ("greedy", "beam*"), "greedy.", has_two_layers),
    "parents_forgotten": Mistake(forget_parents, ("beam*",), "beam"),
    "mean_for_sum": Mistake(divide_by_length, ("beam*",), "beam"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ReferenceSet:
    return ReferenceSet(make_set(tmp_path_factory.mktemp("sets") / "made", PLANS["other_sizes"]))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught_by_the_recorded_set(name: str) -> None:
    reference, mistake = read_set(RECORDED), MISTAKES[name]
    case_id = list_caught_by(reference, mistake)[0]
    assert list_diverging(reference, [case_id]) == {}
    with spoil_set(reference, mistake) as spoilt:
        assert (case_id in list_diverging(spoilt, [case_id])) == mistake.is_one(reference)
    assert list_diverging(reference.renew(), [case_id]) == {}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught_by_every_case_it_touches(made: ReferenceSet, name: str) -> None:
    """Clearly, and at the tensor where it happens. A case it does not touch still passes."""
    mistake = MISTAKES[name]
    assert mistake.is_one(made)
    cases = list_caught_by(made, mistake)
    assert list_diverging(made, [*cases, "tokenizer"]) == {}
    with spoil_set(made, mistake) as spoilt:
        caught = list_diverging(spoilt, [*cases, "tokenizer"])
        first = find_first_divergence(spoilt)
    assert list(caught) == cases
    assert max(found.excess for found in caught.values()) > CLEARLY
    assert first.startswith(mistake.first)


def test_five_named_mistakes_and_others_are_tried() -> None:
    assert len(MISTAKES) == 15
    assert len({mistake.spoil for mistake in MISTAKES.values()}) == 15


def list_caught_by(reference: ReferenceSet, mistake: Mistake) -> list[str]:
    """The set's cases that must notice."""
    cases = [case for form in mistake.caught_by for case in fnmatch.filter(reference.cases, form)]
    assert len(cases) >= len(mistake.caught_by)
    return cases


@contextmanager
def spoil_set(reference: ReferenceSet, mistake: Mistake) -> Iterator[ReferenceSet]:
    """The set with a model of its own, and the mistake in our code as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        spoilt = reference.renew()
        mistake.spoil(patch, spoilt)
        yield spoilt


def list_diverging(reference: ReferenceSet, cases: Sequence[str]) -> dict[str, Diverged]:
    """Which of the cases diverge, and how. Any other failure is one of this test."""
    caught: dict[str, Diverged] = {}
    for case_id in cases:
        try:
            list(compare_case(reference, reference.cases[case_id]))
        except Diverged as found:
            caught[case_id] = found
    return caught
