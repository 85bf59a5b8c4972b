"""Reference sets of VLP: a folder of recorded inputs and outputs, and the checks of our VLP against it.

A set is meta.json (sizes, cases, tolerances, tokenizer examples), vocab.txt, and three safetensors files (weights under
the release's names, inputs, expected outputs). Sizes, special ids and tolerances are the set's own; nothing here knows
those of a particular one. A case, a parameter or a tensor that no check knows fails.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoint import VLP_ANSWER
from models.vlp import captioner, layout
from models.vlp.captioner import VlpParts
from models.vlp.config import VlpConfig
from models.vlp.decoding import Searched, SearchOptions, search_captions
from models.vlp.layout import TASK_NUMBERS, Mode, SpecialIds
from models.vlp.network import SeenRegions, VlpModel
from models.vlp.regions import Regions
from models.vlp.tokenizer import CasedTokenizer, read_vocabulary
from training.vlp_objective import masked_lm_loss, vqa_loss

# Looked up while this is imported: during a test the environment holds no READROOM_ variable (tests/conftest.py).
RECORDED = Path(
    os.environ.get("READROOM_PARITY_VLP") or Path(__file__).resolve().parents[2] / "shared" / "parity" / "vlp"
).resolve()
FORMAT = 1
FILES = ("weights", "inputs", "expected")
TIERS = ("core", "extra", "debug")
CASE_KEYS = {
    *("id", "tier", "what", "inputs", "params", "captions", "shapes", "key_rule"),
    *("expected", "debug_expected", "expected_in_inputs"),
}
SMOOTHED_BUFFER = "crit_mask_lm_smoothed.one_hot"  # no weight: the release's, where label smoothing is on
CONSIDERED = -5000.0  # beam scores below belong to hypotheses that ended and are followed no more
NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
LOSS = re.compile(rf"loss(?:_drop_worst_{NUMBER})?(?:_label_smoothing_{NUMBER})?")


class Diverged(AssertionError):
    """What our VLP computes is not what the set holds. `excess`: the greatest difference in tolerances."""

    def __init__(self, tensor: str, what: str, excess: float = float("inf")) -> None:
        super().__init__(f"{tensor}: {what}")
        self.tensor, self.what, self.excess = tensor, what, excess


@dataclass(frozen=True)
class Case:
    """One case of a meta.json. `names` are all tensors it wants compared, `named_inputs` those that inputs hold."""

    id: str
    tier: str
    params: Mapping[str, Any]
    names: tuple[str, ...]
    named_inputs: frozenset[str]
    captions: tuple[str, ...] | None


@dataclass(frozen=True)
class Actual:
    """What we computed, and `where` it means something (None: everywhere)."""

    values: Tensor
    where: Tensor | None = None


class ReferenceSet:
    """A set in memory; `model` holds its weights."""

    def __init__(self, folder: Path) -> None:
        """Raise AssertionError when the folder holds no set of this format."""
        path = folder / "meta.json"
        assert path.is_file(), (
            f"no reference set in {folder}: READROOM_PARITY_VLP must name the folder of its meta.json"
        )
        self.folder = folder
        self.meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert self.meta["format_version"] == FORMAT, "a reference set of another format"
        assert set(self.meta["files"]) == {*FILES, "vocab"}
        self.weights, self.inputs, self.expected = (self._load(name) for name in FILES)
        self.cases = {case.id: case for case in map(read_case, self.meta["cases"])}
        assert len(self.cases) == len(self.meta["cases"]), "two cases have one id"
        self.tolerances = (self.meta["tolerances"]["float_atol"], self.meta["tolerances"]["float_rtol"])
        self.config = make_config(self.meta["config"], has_answers="ans_classifier.0.weight" in self.weights)

    def _load(self, name: str) -> dict[str, Tensor]:
        scales = self.meta["loading"]["int8_scales"].get(name, {})
        stored = load_file(self.folder / self.meta["files"][name])
        return {key: widen_tensor(tensor, scales.get(key)) for key, tensor in stored.items()}

    @cached_property
    def tokenizer(self) -> CasedTokenizer:
        return read_vocabulary(self.folder / self.meta["files"]["vocab"])

    @property
    def special(self) -> SpecialIds:
        """The special ids meta.json names, not those the tokenizer found."""
        return SpecialIds(*(self.meta["special_tokens"][f"[{name}]"] for name in ("UNK", "CLS", "SEP", "MASK")))

    @cached_property
    def model(self) -> VlpModel:
        model = VlpModel(self.config).eval()
        weights = {name: tensor for name, tensor in self.weights.items() if name != SMOOTHED_BUFFER}
        tied = weights["cls.predictions.decoder.weight"], weights["bert.embeddings.word_embeddings.weight"]
        assert torch.equal(*tied), "the tied copy of the word embeddings differs from them"
        model.load_state_dict(weights, strict=True)
        return model

    @property
    def parts(self) -> VlpParts:
        """What the answerer looks into: no provider is asked, regions are given."""
        nobody: Any = None
        return VlpParts(self.model, nobody, self.tokenizer, (), "", "", VLP_ANSWER)

    def renew(self) -> ReferenceSet:
        """The same set with a model of its own, to be spoilt."""
        other = ReferenceSet.__new__(ReferenceSet)
        other.__dict__.update({key: value for key, value in self.__dict__.items() if key != "model"})
        return other

    def read_input(self, name: str) -> Tensor:
        """An input; whole numbers as int64."""
        tensor = self.inputs[name]
        return tensor if tensor.is_floating_point() else tensor.long()

    def read_images(self) -> Regions:
        """The detector's outputs for all images."""
        numbers = range(self.meta["n_images"])
        names = ("region_feat", "cls_prob", "bbox")
        return Regions(*(torch.stack([self.inputs[f"image.{number}.{name}"] for number in numbers]) for name in names))

    def pick_images(self, owner: str) -> Regions:
        """The detector's outputs for a case's samples."""
        images, index = self.read_images(), self.read_input(f"{owner}.image_index")
        return Regions(images.features[index], images.classes[index], images.boxes[index])

    def see(self, owner: str) -> SeenRegions:
        """The regions of a case's samples, through our own pre-processing."""
        return captioner.see_regions(self.pick_images(owner))


def list_cases(folder: Path) -> list[str]:
    """The ids of a set's cases, to name tests by; of a missing set one that fails."""
    path = folder / "meta.json"
    if not path.is_file():
        return ["no-reference-set"]
    return [case["id"] for case in json.loads(path.read_text(encoding="utf-8"))["cases"]]


@cache
def read_set(folder: Path) -> ReferenceSet:
    """A set, read once; to be left as it is."""
    return ReferenceSet(folder)


def read_case(document: Mapping[str, Any]) -> Case:
    unknown = document.keys() - CASE_KEYS
    assert not unknown, f"case {document['id']} has fields that no check knows: {sorted(unknown)}"
    assert document["tier"] in TIERS, f"case {document['id']} is of an unknown tier"
    named_inputs = tuple(document.get("expected_in_inputs", ()))
    names = (*document["expected"], *document.get("debug_expected", ()), *named_inputs)
    captions = tuple(document["captions"]) if "captions" in document else None
    return Case(document["id"], document["tier"], document.get("params", {}), names, frozenset(named_inputs), captions)


def make_config(sizes: Mapping[str, Any], has_answers: bool) -> VlpConfig:
    """Our config of a meta.json's; what has another name there is named here."""
    assert sizes["hidden_act"] == "gelu"
    renamed = {
        "num_regions": sizes["len_vis_input"],
        "num_answers": sizes["vqa_num_answers"] if has_answers else 0,
        "max_text_length": sizes["max_len_b"],
    }
    same = {name for name in VlpConfig.__dataclass_fields__ if name not in renamed}
    config = VlpConfig(**{name: sizes[name] for name in same}, **renamed)
    assert config.has_new_types == sizes["new_segment_ids"]
    assert sizes["max_seq_length"] == config.prefix_length + config.max_text_length + 1
    return config


def widen_tensor(stored: Tensor, scale: float | None) -> Tensor:
    """The loading rule of a set: 8-bit numbers times their scale, every other fraction as float32."""
    if scale is not None:
        assert stored.dtype == torch.int8
        return stored.float() * scale
    return stored.float() if stored.is_floating_point() else stored


# Comparing ----------------------------------------------------------------------------------------------------------


def check_case(reference: ReferenceSet, case_id: str) -> frozenset[str]:
    """Compare every tensor of a case, and give their names. Raises Diverged naming the first tensor that differs."""
    case = reference.cases[case_id]
    try:
        compared = frozenset(compare_case(reference, case))
    except Diverged as found:
        first = find_first_divergence(reference)
        what = f"{found.what}; the first tensor to diverge is {first or 'this one'}"
        raise Diverged(found.tensor, what, found.excess) from None
    assert compared == set(case.names), "a tensor was left out"
    return compared


def compare_case(reference: ReferenceSet, case: Case) -> Iterator[str]:
    actual = compute_case(reference, case)
    for name in case.names:
        assert name in actual, f"no check knows the tensor {name} of case {case.id}"
        expected = reference.inputs[name] if name in case.named_inputs else reference.expected[name]
        compare_tensor(name, actual[name], expected, reference.tolerances)
        yield name


def compare_tensor(name: str, actual: Actual, expected: Tensor, tolerances: tuple[float, float]) -> None:
    """Whole numbers must be equal, fractions within atol + rtol * |expected|. Raises Diverged."""
    if actual.values.shape != expected.shape:
        raise Diverged(name, f"shape {tuple(actual.values.shape)}, expected {tuple(expected.shape)}")
    ours, theirs = actual.values.detach().double(), expected.double()
    if expected.is_floating_point():
        allowed = tolerances[0] + tolerances[1] * theirs.abs()
        assert actual.values.is_floating_point()
    else:
        allowed = torch.full_like(theirs, 0.5)
        assert not actual.values.is_floating_point()
    excess = (ours - theirs).abs() / allowed
    if actual.where is not None:
        excess = excess.where(actual.where.expand_as(excess), torch.zeros(()))
    if bool((excess <= 1).all()):
        return
    worst = excess.nan_to_num(nan=torch.inf).flatten().argmax()
    place = [int(index) for index in torch.unravel_index(worst, excess.shape)]
    count = int((~(excess <= 1)).sum())
    values = f"{ours.flatten()[worst]:.7g} and not {theirs.flatten()[worst]:.7g}"
    raise Diverged(name, f"{count} of {excess.numel()} differ, most at {place}: {values}", float(excess.max()))


def find_first_divergence(reference: ReferenceSet) -> str:
    """The first tensor of a set that diverges, from pre-processing on; empty where none does."""
    order = (r"prep", r"tokenizer", r"layout_.*", r".*\.internals", r"mlm_[^.]*", r".*")
    rank = {name: next(i for i, form in enumerate(order) if re.fullmatch(form, name)) for name in reference.cases}
    for case_id in sorted(reference.cases, key=lambda name: rank[name]):
        case = reference.cases[case_id]
        stages = sorted(case.names, key=lambda name: not name.endswith(".embedding_output"))
        try:
            list(compare_case(reference, replace(case, names=tuple(stages))))
        except Diverged as found:
            return found.tensor
    return ""


# Computing ----------------------------------------------------------------------------------------------------------


def compute_case(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    """What our VLP gives for a case, by the tensors' names."""
    for form, compute in COMPUTES.items():
        if re.fullmatch(form, case.id):
            return compute(reference, case)
    raise AssertionError(f"no check knows the case {case.id}")


def take_params(case: Case, *names: str) -> list[Any]:
    """The values of a case's parameters; it may have no others."""
    unknown = case.params.keys() - set(names)
    assert not unknown, f"case {case.id} has parameters that no check knows: {sorted(unknown)}"
    return [case.params[name] for name in names]


def find_owner(reference: ReferenceSet, case: Case) -> Case:
    """The case whose forward this one looks at: of `mlm_s2s.internals` and of `grad_mlm_s2s` it is `mlm_s2s`."""
    return reference.cases[case.id.removeprefix("grad_").split(".")[0]]


def compute_places(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    take_params(case)
    places, width = captioner.see_regions(reference.read_images()).places, reference.config.region_geometry_dim
    found = {"prep.vis_pe_geometry": Actual(places[..., :width])}
    for name in case.names:
        if match := re.fullmatch(r"prep\.vis_pe_class_first(\d+)", name):
            found[name] = Actual(places[:, : int(match[1]), width:])
    return found


def check_tokenizer(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    take_params(case)
    examples = reference.meta["tokenizer_examples"]
    assert len(examples) > 0
    if reference.tokenizer.special != reference.special or reference.meta["special_tokens"]["[PAD]"] != layout.PAD:
        raise Diverged("tokenizer", f"special ids {reference.tokenizer.special}")
    for example in examples:
        pieces, ids = reference.tokenizer.split(example["text"]), reference.tokenizer.encode(example["text"])
        if (pieces, ids) != (example["tokens"], example["ids"]):
            raise Diverged("tokenizer", f"{example['text']!r} became {pieces} {ids}")
    return {}


def compute_layout(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    mode, longest, total = take_params(case, "mode", "max_len_b", "max_seq_length")
    rows = reference.inputs[f"{case.id}.text_ids"].tolist()
    texts = [[token for token in row if token >= 0] for row in rows]
    made = layout.lay_out(texts, mode, replace(reference.config, max_text_length=longest), reference.special, total)
    found = {f"{case.id}.input_ids": Actual(made.ids), f"{case.id}.segment_ids": Actual(made.types)}
    return found | {name: Actual(made.visible.to(torch.uint8)) for name in case.named_inputs}


def compute_decode_layout(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    """The prefix, types, positions and mask of decoding.

    Ids, types and positions are those the embeddings were really asked for while captions were written.
    """
    (steps,) = take_params(case, "max_tgt_length")
    asked: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = reference.model.bert.embeddings.register_forward_pre_hook(lambda _, given: asked.append(given[:3]))
    try:
        seen = reference.see("decode")
        search(reference, seen, SearchOptions(max_new_tokens=steps), whole=True)
    finally:
        hook.remove()
    count, total = len(seen.features), reference.config.prefix_length + steps
    types, positions = torch.full((count, total), -1), torch.full((count, total), -1)
    for _, used, places in asked:
        types[:, places] = used
        positions[:, places] = places.expand(count, -1)
    planned = layout.decode_types(reference.config, steps).expand(count, -1)
    assert torch.equal(types, planned), "types are planned otherwise than used"
    visible = layout.decode_visible(reference.config, steps).to(torch.uint8)
    return {
        "layout_decode.input_ids": Actual(asked[0][0]),
        "layout_decode.segment_ids": Actual(types),
        "layout_decode.position_ids": Actual(positions),
        "layout_decode.attention_mask": Actual(visible.expand(count, -1, -1)),
    }


def compute_masked_lm(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    """All of a masked-LM forward: states, logits, and each loss that the case names."""
    owner = find_owner(reference, case)
    if case.id != owner.id:
        take_params(case)
    with torch.no_grad():
        hidden, logits = run_masked_lm(reference, owner)
        embedded = reference.model.embed(*read_forward(reference, owner.id)[:3])
        pooled = reference.model.bert.pooler(hidden)
        losses = {name: Actual(compute_loss(reference, owner, name, logits)) for name in case.names if ".loss" in name}
    visible = reference.read_input(f"{owner.id}.attention_mask")
    real = visible.diagonal(dim1=1, dim2=2).bool()[..., None]  # padding sees the prefix only, not itself
    return losses | {
        f"{owner.id}.masked_logits": Actual(logits),
        f"{owner.id}.embedding_output": Actual(embedded, real),
        f"{owner.id}.sequence_output": Actual(hidden, real),
        f"{owner.id}.pooled_output": Actual(pooled),
    }


def read_forward(reference: ReferenceSet, owner: str) -> tuple[SeenRegions, Tensor, Tensor, Tensor]:
    """What a forward of the set takes: regions, ids, types, mask."""
    ids, types, visible = (reference.read_input(f"{owner}.{name}") for name in INPUT_NAMES)
    return reference.see(owner), ids, types, visible.bool()


INPUT_NAMES = ("input_ids", "segment_ids", "attention_mask")


def run_masked_lm(reference: ReferenceSet, owner: Case) -> tuple[Tensor, Tensor]:
    """Final states and logits of the masked positions."""
    task, _ = take_params(owner, "task_idx", "drop_worst_ratio")
    assert name_mode(task)
    hidden = reference.model(*read_forward(reference, owner.id))
    return hidden, reference.model.predict_masked(hidden, reference.read_input(f"{owner.id}.masked_pos"), task)


def name_mode(task: int) -> Mode:
    """The mode a task number of the release stands for."""
    modes: list[Mode] = [mode for mode, number in TASK_NUMBERS.items() if number == task]
    assert modes, f"no mode has the task number {task}"
    return modes[0]


def compute_loss(reference: ReferenceSet, owner: Case, name: str, logits: Tensor) -> Tensor:
    """The loss a tensor's name asks for, [1]: `loss`, `loss_drop_worst_0.5`, `loss_label_smoothing_0.1`."""
    match = LOSS.fullmatch(name.removeprefix(f"{owner.id}."))
    assert match, f"no check knows the loss {name}"
    drop_worst = owner.params["drop_worst_ratio"] if match[1] is None else float(match[1])
    labels, weights = (reference.read_input(f"{owner.id}.{what}") for what in ("labels", "masked_weights"))
    return masked_lm_loss(logits, labels, weights, drop_worst, float(match[2] or 0)).reshape(1)


def compute_gradients(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    take_params(case)
    owner = find_owner(reference, case)
    parameters = dict(reference.model.named_parameters())
    unknown = {name for name in case.names if name.removeprefix(f"{case.id}.") not in parameters}
    assert not unknown, f"no check knows the tensors {unknown}"
    wanted = {name: parameters[name.removeprefix(f"{case.id}.")] for name in case.names}
    _, logits = run_masked_lm(reference, owner)
    loss = compute_loss(reference, owner, f"{owner.id}.loss", logits)
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {name: Actual(gradient) for name, gradient in zip(wanted, gradients, strict=True)}


def compute_answers(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    (task,) = take_params(case, "task_idx")
    assert name_mode(task) == "bi"
    given = read_forward(reference, "vqa")
    ends = given[3].diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
    questions = [
        row[reference.config.prefix_length : end - 1].tolist() for row, end in zip(given[1], ends, strict=True)
    ]
    with torch.no_grad():
        logits = reference.model.predict_answers(reference.model(*given))
        answers = captioner.pick_answers(reference.parts, reference.pick_images("vqa"), questions)
    return {
        "vqa.logits": Actual(logits),
        "vqa.answer_index": Actual(torch.tensor(answers.classes)),
        "vqa.loss": Actual(vqa_loss(logits, reference.read_input("vqa.answer_scores")).reshape(1)),
    }


def search(reference: ReferenceSet, seen: SeenRegions, options: SearchOptions, whole: bool) -> Searched:
    with torch.no_grad():
        return search_captions(reference.model, seen, reference.special, options, whole=whole, keep_logits=True)


def check_captions(reference: ReferenceSet, case: Case, texts: Sequence[Sequence[int]]) -> None:
    decoded = tuple(map(reference.tokenizer.decode, texts))
    if case.captions is not None and decoded != case.captions:
        raise Diverged(f"{case.id}.captions", f"{decoded} and not {case.captions}")


def compute_greedy(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    """Greedy ids run on behind [SEP], as in the release; the search that stops must agree up to it."""
    width, steps = take_params(case, "beam_size", "max_tgt_length")
    assert width == 1
    seen, options = reference.see("decode"), SearchOptions(max_new_tokens=steps)
    found, early = (search(reference, seen, options, whole) for whole in (True, False))
    ids, logits = found.frames.tokens[..., 0], torch.stack(found.logits, dim=1)
    end = reference.special.end
    cut = tuple(row[: row.index(end) + 1] if end in row else row for row in ids.tolist())
    if not cut == early.tokens == found.tokens:
        raise Diverged(f"{case.id}.ids", f"the search that stops early gives {early.tokens} and not {cut}")
    check_captions(reference, case, ids.tolist())
    return {
        f"{case.id}.ids": Actual(ids),
        f"{case.id}.max_logit": Actual(logits.gather(2, ids[..., None])[..., 0]),
        f"{case.id}.step_logits": Actual(logits),
    }


def compute_beams(reference: ReferenceSet, case: Case) -> dict[str, Actual]:
    """The whole search as in the release, and the one that stops early: captions and their scores are the same."""
    options, seen = read_options(case), reference.see("decode")
    found, early = (search(reference, seen, options, whole) for whole in (True, False))
    if (found.tokens, found.scores) != (early.tokens, early.scores):
        raise Diverged(
            f"{case.id}.pred_seq", f"the search that stops early gives {early.tokens} and not {found.tokens}"
        )
    check_captions(reference, case, list(found.tokens))
    steps, last = options.max_new_tokens, found.frames.find_last(reference.special.end)
    theirs = reference.expected[f"{case.id}.scores"] if f"{case.id}.scores" in case.names else found.frames.scores
    valid = (torch.arange(steps)[None, :, None] <= last[:, None, None]) & (theirs > CONSIDERED)
    padded = [[*tokens, *[layout.PAD] * (steps - len(tokens))] for tokens in found.tokens]
    return {
        f"{case.id}.pred_seq": Actual(torch.tensor(padded)),
        f"{case.id}.pred_len": Actual(torch.tensor([len(tokens) for tokens in found.tokens])),
        f"{case.id}.best_score": Actual(torch.tensor(found.scores)),
        f"{case.id}.last_valid_frame": Actual(last),
        f"{case.id}.scores": Actual(found.frames.scores, valid),
        f"{case.id}.wids": Actual(found.frames.tokens, valid),
        f"{case.id}.ptrs": Actual(found.frames.parents, valid),
    }


def read_options(case: Case) -> SearchOptions:
    names = ("beam_size", "max_tgt_length", "min_len", "length_penalty")
    width, steps, least, bonus, blocks, size, free = take_params(
        case, *names, "forbid_duplicate_ngrams", "ngram_size", "forbid_ignore_ids"
    )
    return SearchOptions(width, steps, least, bonus, size if blocks else 0, frozenset(free))


COMPUTES: dict[str, Callable[[ReferenceSet, Case], dict[str, Actual]]] = {
    r"prep": compute_places,
    r"tokenizer": check_tokenizer,
    r"layout_decode": compute_decode_layout,
    r"layout_\w+": compute_layout,
    r"mlm_\w+(\.internals|\.loss_variants)?": compute_masked_lm,
    r"grad_mlm_\w+": compute_gradients,
    r"vqa": compute_answers,
    r"greedy": compute_greedy,
    r"beam\w+": compute_beams,
}
