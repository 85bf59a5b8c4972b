"""Our VLP against recorded outputs of the original, and against a slow VLP of other sizes.

The recorded set lies in the folder READROOM_PARITY_VLP names (tests/vlp_reference.py says what a set is). Everything
holds for any set of its format: tests/vlp_oracle.py makes two with other sizes, special ids and rules.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.vlp.config import VlpConfig
from models.vlp.network import VlpModel
from tests.vlp_oracle import ANSWER_PARTS, PLANS, list_shapes, make_set, masked_loss, plan_sizes
from tests.vlp_reference import (
    RECORDED,
    SMOOTHED_BUFFER,
    Case,
    Diverged,
    ReferenceSet,
    check_case,
    compare_case,
    list_cases,
    make_config,
    read_case,
    read_set,
)

ROOT = Path(__file__).resolve().parents[2]
FULL_SIZE = plan_sizes(
    vocab_size=28996, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, len_vis_input=100, region_feat_dim=2048, region_num_classes=1601,
    vqa_num_answers=3129, max_len_b=20,
)  # fmt: skip


@pytest.fixture(scope="module", params=PLANS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a set made by the slow VLP."""
    return make_set(tmp_path_factory.mktemp("sets") / request.param, PLANS[request.param])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ReferenceSet:
    """A made set in memory; renew it before it is spoilt."""
    return ReferenceSet(make_set(tmp_path_factory.mktemp("small") / "set", PLANS["other_sizes"]))


# --- the sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case_id", list_cases(RECORDED))
def test_recorded_case_is_met(case_id: str) -> None:
    reference = read_set(RECORDED)
    compared = check_case(reference, case_id)
    assert compared or case_id == "tokenizer"


def test_recorded_set_has_no_tensor_without_a_case() -> None:
    reference = read_set(RECORDED)
    named = {name for case in reference.cases.values() for name in case.names}
    assert reference.expected.keys() <= named
    assert named - reference.expected.keys() <= reference.inputs.keys()
    assert "core" in {case.tier for case in reference.cases.values()}


def test_made_set_is_met(made: Path) -> None:
    reference = ReferenceSet(made)
    compared = frozenset[str]().union(*(check_case(reference, case_id) for case_id in reference.cases))
    assert compared >= reference.expected.keys()
    assert len(compared) == sum(len(case.names) for case in reference.cases.values()) > 50


def test_made_sets_differ_from_each_other_in_every_size() -> None:
    same = {"hidden_act", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"}
    varied = {name for name in plan_sizes() if len({repr(plan.sizes[name]) for plan in PLANS.values()}) == len(PLANS)}
    assert varied >= plan_sizes().keys() - same - {"region_geometry_dim"}
    assert len({repr(plan.special) for plan in PLANS.values()}) == len(PLANS)


@pytest.mark.timeout(600)
def test_set_is_found_through_its_variable(small: ReferenceSet) -> None:
    done = run_recorded_tests(small.folder)
    assert done.returncode == 0, done.stdout
    assert re.search(rf"\b{len(small.cases) + 2} passed", done.stdout), done.stdout


@pytest.mark.timeout(600)
def test_missing_set_fails_and_says_how_to_name_it(tmp_path: Path) -> None:
    done = run_recorded_tests(tmp_path / "nowhere")
    assert done.returncode == 1, done.stdout
    assert "READROOM_PARITY_VLP must name" in done.stdout
    assert "skipped" not in done.stdout and "passed" not in done.stdout


def run_recorded_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "test_recorded"]
    environment = os.environ | {"READROOM_PARITY_VLP": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)


# --- the weights ------------------------------------------------------------------------------------------------------


def test_full_size_model_has_the_original_names_and_shapes() -> None:
    """211 tensors, the tied copy among them; 215 with the answer head (SPEC section 12)."""
    for answers, count, millions in ((0, 211, 115.9), (3129, 215, 121.9)):
        sizes = FULL_SIZE | {"vqa_num_answers": answers}
        with torch.device("meta"):
            model = VlpModel(VlpConfig(num_answers=answers))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert shapes == list_shapes(sizes)
        assert len(shapes) == count
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_default_sizes_are_the_full_ones() -> None:
    """The eps of a set is the set's; that of a checkpoint without a word about it is ours."""
    assert VlpConfig(num_answers=3129) == make_config(FULL_SIZE, has_answers=True)
    assert VlpConfig().layer_norm_eps == 1e-5


def test_recorded_weights_are_tied_and_complete() -> None:
    reference = read_set(RECORDED)
    model = reference.model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    sizes = reference.meta["config"] | {"vqa_num_answers": reference.config.num_answers}
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.weights.items() if name != SMOOTHED_BUFFER}
    assert shapes == list_shapes(sizes)


@pytest.mark.parametrize("change", ["missing", "unexpected", "untied", "short"])
def test_wrong_weights_are_refused(small: ReferenceSet, change: str) -> None:
    spoilt = small.renew()
    name = "bert.encoder.layer.1.output.dense.weight"
    spoilt.weights = dict(small.weights)
    if change == "missing":
        del spoilt.weights[name]
    elif change == "unexpected":
        spoilt.weights["cls.seq_relationship.weight"] = torch.zeros(2, 24)
    elif change == "untied":
        spoilt.weights["cls.predictions.decoder.weight"] = small.weights["cls.predictions.decoder.weight"] + 1
    else:
        spoilt.weights[name] = small.weights[name][1:]
    with pytest.raises((RuntimeError, AssertionError), match=r"Error\(s\) in loading|tied copy"):
        _ = spoilt.model


def test_captioning_set_needs_no_answer_head(small: ReferenceSet, tmp_path: Path) -> None:
    """And the buffer of label smoothing is no weight."""
    captioning = small.renew()
    captioning.weights = {key: tensor for key, tensor in small.weights.items() if not key.startswith(ANSWER_PARTS)}
    captioning.weights[SMOOTHED_BUFFER] = torch.zeros(1, small.config.vocab_size)
    captioning.config = make_config(small.meta["config"], has_answers=False)
    assert len(check_case(captioning, "mlm_s2s")) == 2
    assert len(captioning.model.state_dict()) == len(small.model.state_dict()) - 4


# --- the checks themselves --------------------------------------------------------------------------------------------


def test_every_tensor_of_a_set_matters(small: ReferenceSet) -> None:
    """One value of each tensor is changed; the check of its case must notice, or it compares nothing."""
    noticed = 0
    for case in small.cases.values():
        for name in case.names:
            spoilt = small.renew()
            kept = small.inputs if name in case.named_inputs else small.expected
            changed = kept | {name: change_one(kept[name])}
            if name in case.named_inputs:
                spoilt.inputs = changed
            else:
                spoilt.expected = changed
            with pytest.raises(Diverged) as caught:
                list(compare_case(spoilt, replace(case, names=(name,))))
            assert caught.value.tensor == name
            noticed += 1
    assert noticed == sum(len(case.names) for case in small.cases.values()) >= 100


def change_one(tensor: torch.Tensor) -> torch.Tensor:
    """The first value differs by a little more than the tolerance allows, or by one."""
    changed = tensor.clone()
    first = changed.view(-1)[:1]
    first += 3e-4 + 3e-4 * first.abs() if tensor.is_floating_point() else 1
    return changed


@pytest.mark.parametrize("what", ["captions", "text", "special"])
def test_wrong_words_of_a_set_are_noticed(small: ReferenceSet, what: str) -> None:
    spoilt = small.renew()
    case_id = "beam4" if what == "captions" else "tokenizer"
    if what == "captions":
        captions = spoilt.cases["beam4"].captions
        assert captions is not None
        spoilt.cases = small.cases | {"beam4": replace(small.cases["beam4"], captions=(*captions[:-1], "other"))}
    elif what == "text":
        examples = [small.meta["tokenizer_examples"][0] | {"ids": [1]}]
        spoilt.meta = small.meta | {"tokenizer_examples": examples}
    else:
        spoilt.meta = small.meta | {"special_tokens": small.meta["special_tokens"] | {"[MASK]": 1}}
    with pytest.raises(Diverged):
        check_case(spoilt, case_id)


UNKNOWN: dict[str, Callable[[Case], Case]] = {
    "case": lambda case: replace(case, id="scst"),
    "parameter": lambda case: replace(case, params={**case.params, "temperature": 1.0}),
    "tensor": lambda case: replace(case, names=(*case.names, f"{case.id}.surprise")),
}


@pytest.mark.parametrize("case_id", list_cases(RECORDED))
@pytest.mark.parametrize("what", UNKNOWN)
def test_what_no_check_knows_fails(case_id: str, what: str) -> None:
    reference = read_set(RECORDED).renew()
    case = UNKNOWN[what](reference.cases[case_id])
    reference.cases = reference.cases | {case.id: case}
    with pytest.raises(AssertionError, match=r"no check knows") as caught:
        check_case(reference, case.id)
    assert not isinstance(caught.value, Diverged)


@pytest.mark.parametrize(
    "change",
    [{"tier": "new"}, {"expected_in_weights": ["x"]}, {"expected_captions": []}],
    ids=["tier", "field", "captions"],
)
def test_unknown_fields_of_a_case_fail(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=r"unknown tier|no check knows"):
        read_case({"id": "prep", "tier": "core", "expected": []} | change)


def test_missing_parameter_fails(small: ReferenceSet) -> None:
    spoilt = small.renew()
    spoilt.cases = small.cases | {"beam2": replace(small.cases["beam2"], params={"beam_size": 2})}
    with pytest.raises(KeyError):
        check_case(spoilt, "beam2")


def test_loss_of_both_kinds_is_read_off_its_name(small: ReferenceSet) -> None:
    """Numbers in names are parameters: the smoothed loss of a half kept batch is no smoothed loss of all."""
    spoilt = small.renew()
    name = "mlm_s2s.loss_drop_worst_0.5_label_smoothing_0.125"
    spoilt.expected = small.expected | {name: small.expected["mlm_s2s.loss_label_smoothing_0.25"]}
    case = small.cases["mlm_s2s.loss_variants"]
    spoilt.cases = small.cases | {case.id: replace(case, names=(name,))}
    with pytest.raises(Diverged, match="loss_drop_worst"):
        check_case(spoilt, case.id)
    spoilt.expected = small.expected | {name: torch.tensor([compute_both(small)])}
    assert check_case(spoilt, case.id) == {name}


def compute_both(reference: ReferenceSet) -> float:
    """What the slow path gives for a loss of both kinds."""
    logits = reference.expected["mlm_s2s.masked_logits"].double()
    labels, weights = (reference.read_input(f"mlm_s2s.{what}") for what in ("labels", "masked_weights"))
    return float(masked_loss(logits, labels, weights, 0.5, 0.125))


def test_divergence_names_the_first_tensor_that_differs(small: ReferenceSet) -> None:
    spoilt = small.renew()
    with torch.no_grad():
        spoilt.model.bert.encoder.layer[1].output.dense.bias[3] += 0.5
    with pytest.raises(Diverged, match=r"first tensor to diverge is mlm_s2s\.sequence_output") as caught:
        check_case(spoilt, "greedy")
    assert caught.value.tensor.startswith("greedy.")
    with torch.no_grad():
        spoilt.model.vis_embed[2].bias += 0.5
    with pytest.raises(Diverged, match=r"first tensor to diverge is mlm_s2s\.embedding_output"):
        check_case(spoilt, "mlm_bi")


def test_set_of_another_format_is_refused(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    meta = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(meta.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(AssertionError, match="another format"):
        ReferenceSet(folder)
