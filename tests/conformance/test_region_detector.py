"""A detector's queries as regions, against a direct computation from the detector's outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from models.vlp import detector
from models.vlp.detector import DetectorProvider, read_probabilities, save_provider_files, turn_boxes
from models.vlp.regions import RegionProvider, Regions, RegionSpec, locate_regions, open_provider
from readroom.errors import CheckpointBroken

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.75, 1.25)
LABELS, QUERIES, SIZE = 5, 9, 64
STAGES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
LAYERS: dict[str, Any] = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2,
                          "decoder_layers": 2, "decoder_ffn_dim": 16, "decoder_attention_heads": 2}  # fmt: skip
ALL: dict[str, Any] = {"num_labels": LABELS, "num_queries": QUERIES}


def resnet(*stages: str) -> ResNetConfig:
    return ResNetConfig(**STAGES, layer_type="basic", out_features=list(stages))


def detr_like(config_class: Any, **more: Any) -> Any:
    sizes = {**ALL, **LAYERS, "d_model": 16, "backbone_config": resnet("stage4"), **more}
    return config_class(use_timm_backbone=False, use_pretrained_backbone=False, **sizes)


def deformable(**more: Any) -> DeformableDetrConfig:
    backbone = resnet("stage2", "stage3", "stage4")
    sizes = {**ALL, **LAYERS, "d_model": 64, "num_feature_levels": 4, "backbone_config": backbone, **more}
    return DeformableDetrConfig(use_timm_backbone=False, **sizes)


def rt_detr() -> RTDetrConfig:
    backbone = RTDetrResNetConfig(**STAGES, layer_type="basic", out_features=["stage2", "stage3", "stage4"])
    widths: dict[str, Any] = {"encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32], "d_model": 32}
    return RTDetrConfig(**ALL, **LAYERS, **widths, backbone_config=backbone, encoder_hidden_dim=32)


def yolos() -> YolosConfig:
    widths: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return YolosConfig(
        **widths, intermediate_size=16, image_size=[SIZE, SIZE], patch_size=16, num_detection_tokens=QUERIES,
        num_labels=LABELS,
    )  # fmt: skip


# class, config, width of a query, whether its classes come from a softmax
DETECTORS: dict[str, tuple[Any, Any, int, bool]] = {
    "detr": (DetrForObjectDetection, detr_like(DetrConfig), 16, True),
    "yolos": (YolosForObjectDetection, yolos(), 16, True),
    "rt_detr": (RTDetrForObjectDetection, rt_detr(), 32, False),
    "deformable_detr": (DeformableDetrForObjectDetection, deformable(), 64, False),
    # boxes refined layer by layer: heads of their own, shared with the decoder
    "deformable_detr, two stages": (
        DeformableDetrForObjectDetection,
        deformable(two_stage=True, with_box_refine=True, two_stage_num_proposals=QUERIES),
        64,
        False,
    ),
    "conditional_detr": (ConditionalDetrForObjectDetection, detr_like(ConditionalDetrConfig), 16, False),
}
KINDS = list(DETECTORS)


def make_network(kind: str) -> Any:
    """A small detector with random weights, spread enough that its queries differ."""
    network_class, config, _, _ = DETECTORS[kind]
    torch.manual_seed(11)
    network = network_class(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.3)
    return network


def spec_of(kind: str, count: int = 6) -> RegionSpec:
    return RegionSpec("detector", count, DETECTORS[kind][2], LABELS + 1, SIZE, MEAN, STD)


def draw_pictures(count: int = 3) -> list[np.ndarray]:
    draw = np.random.default_rng(4)
    return [draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("detector")
    save_provider_files(make_network(kind), made)
    return made


def look_at(provider: RegionProvider, pictures: list[np.ndarray]) -> Regions:
    with torch.inference_mode():
        return provider.compute(provider.prepare(pictures))


def look_directly(network: Any, kind: str, picture: np.ndarray, count: int) -> list[np.ndarray]:
    """Features, classes and boxes of the surest queries of one picture, a query at a time in float64."""
    shades = (picture / 255 - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        out = network(pixel_values=torch.tensor(shades.transpose(2, 0, 1)[None], dtype=torch.float32))
    hidden, logits, centres = (part[0].double().numpy() for part in (out.last_hidden_state, out.logits, out.pred_boxes))
    assert len(logits) == QUERIES
    found = []
    for feature, scores, (x, y, w, h) in zip(hidden[-QUERIES:], logits, centres, strict=True):
        if DETECTORS[kind][3]:
            raised = np.exp(scores - scores.max())
            row = np.array([raised[-1], *raised[:-1]]) / raised.sum()
        else:
            likely = 1 / (1 + np.exp(-scores))
            row = np.array([1 - likely.max(), *likely])
            row /= row.sum()
        best = 1 + int(np.argmax(row[1:]))
        corners = [(x - w / 2) * SIZE, (y - h / 2) * SIZE, (x + w / 2) * SIZE, (y + h / 2) * SIZE]
        found.append((feature, row, np.array([*corners, best, row[best]])))
    found.sort(key=lambda query: -query[2][5])
    return [np.stack([query[part] for query in found[:count]]) for part in range(3)]


def test_regions_are_those_of_a_direct_computation(kind: str, folder: Path) -> None:
    provider = open_provider(folder, spec_of(kind), CPU, torch.float32)
    network, pictures = make_network(kind), draw_pictures()
    regions = look_at(provider, pictures)
    assert regions.features.shape == (3, 6, DETECTORS[kind][2])
    assert regions.classes.shape == (3, 6, LABELS + 1) and regions.boxes.shape == (3, 6, 6)
    for row, picture in enumerate(pictures):
        expected = look_directly(network, kind, picture, 6)
        for found, wanted in zip((regions.features, regions.classes, regions.boxes), expected, strict=True):
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_regions_are_in_descending_order_of_confidence(kind: str, folder: Path) -> None:
    regions = look_at(open_provider(folder, spec_of(kind), CPU, torch.float32), draw_pictures())
    confidence, index = regions.boxes[..., 5], regions.boxes[..., 4].long()
    assert (confidence.diff(dim=1) <= 0).all() and (index >= 1).all() and (index <= LABELS).all()
    assert torch.equal(regions.classes.gather(2, index[..., None])[..., 0], confidence)
    torch.testing.assert_close(regions.classes.sum(dim=-1), torch.ones(3, 6))


def test_the_surest_few_are_the_first_of_all(kind: str, folder: Path) -> None:
    every = look_at(open_provider(folder, spec_of(kind, QUERIES), CPU, torch.float32), draw_pictures())
    few = look_at(open_provider(folder, spec_of(kind, 2), CPU, torch.float32), draw_pictures())
    assert every.features.shape[1] == QUERIES
    for whole, part in [
        (every.features, few.features),
        (every.classes, few.classes),
        (every.boxes, few.boxes),
    ]:
        assert torch.equal(whole[:, :2], part)


def test_the_same_pictures_give_the_same_regions_again_and_elsewhere(kind: str, folder: Path) -> None:
    first, second = (open_provider(folder, spec_of(kind), CPU, torch.float32) for _ in range(2))
    pictures = draw_pictures()
    wanted = look_at(first, pictures)
    for other in (look_at(first, pictures), look_at(second, pictures)):
        assert torch.equal(wanted.features, other.features) and torch.equal(wanted.boxes, other.boxes)


def test_more_regions_than_queries_are_refused_at_loading(kind: str, folder: Path) -> None:
    with pytest.raises(CheckpointBroken, match=f"regions: count is {QUERIES + 1}, and the detector has {QUERIES}"):
        open_provider(folder, spec_of(kind, QUERIES + 1), CPU, torch.float32)


def refuse_call(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be reached")


def test_too_few_queries_are_refused_before_a_look(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "probe_network", refuse_call)
    with pytest.raises(CheckpointBroken, match=f"regions: count is {QUERIES + 1}, and the detector has {QUERIES}"):
        DetectorProvider(make_network(kind), spec_of(kind, QUERIES + 1), CPU)


def test_too_many_patches_are_refused_before_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "probe_network", refuse_call)
    network = make_network("yolos")
    network.config.patch_size = 8
    spec = replace(spec_of("yolos"), image_size=2048)
    with pytest.raises(CheckpointBroken, match="the detector would see 65536 patches of a picture"):
        DetectorProvider(network, spec, CPU)


@pytest.mark.parametrize("field", ["feature_dim", "class_count"])
def test_a_spec_that_is_not_its_detectors_names_the_field(kind: str, folder: Path, field: str) -> None:
    spec = spec_of(kind)
    with pytest.raises(CheckpointBroken, match=f"regions: {field} is {getattr(spec, field) + 1}, and its network"):
        open_provider(folder, replace(spec, **{field: getattr(spec, field) + 1}), CPU, torch.float32)


def test_gradients_of_a_look_reach_the_detector(kind: str) -> None:
    network = make_network(kind)
    regions = DetectorProvider(network, spec_of(kind), CPU).look(torch.randn(2, 3, SIZE, SIZE))
    (regions.features.square().sum() + locate_regions(regions.boxes, regions.classes).square().sum()).backward()
    reached = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert any("class" in name for name in reached) and any("bbox" in name for name in reached)


# Scores and boxes ----------------------------------------------------------------------------------------------------


def test_no_object_of_a_softmax_becomes_the_background() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0]]]).log()
    torch.testing.assert_close(read_probabilities(logits, "detr"), torch.tensor([[[3.0, 1.0, 2.0]]]) / 6)


def test_what_the_likeliest_sigmoid_leaves_becomes_the_background() -> None:
    logits = torch.tensor([[[0.8, 0.5]]]).logit()
    expected = torch.tensor([[[0.2, 0.8, 0.5]]]) / 1.5
    torch.testing.assert_close(read_probabilities(logits, "rt_detr"), expected)


def test_sure_scores_stay_finite_and_sum_to_one() -> None:
    for model_type in ("detr", "rt_detr"):
        for size in (-200.0, 0.0, 200.0):
            row = read_probabilities(torch.full((1, 1, 4), size), model_type)
            assert row.isfinite().all() and row.sum().item() == pytest.approx(1)


def test_boxes_are_turned_into_corners_also_without_a_size() -> None:
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.1, 0.2, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    expected = torch.tensor([[25.0, 0.0, 75.0, 50.0], [10.0, 20.0, 10.0, 20.0], [-50.0, -50.0, 50.0, 50.0]])
    torch.testing.assert_close(turn_boxes(boxes, 100), expected)


# What a checkpoint may not hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    ({"use_timm_backbone": True}, "use_timm_backbone names something"),
    ({"backbone": "resnet50"}, "backbone names something"),
    ({"backbone_config": None}, "backbone_config is missing"),
    ({"backbone_config": "microsoft/resnet-18"}, "backbone_config is missing"),
    ({"backbone_config": {"model_type": "timm_backbone"}}, "model_type names something"),
    ({"model_type": "owlvit"}, "a owlvit cannot be this checkpoint's provider"),
    ({"decoder_layers": 1_000_000}, "a network of far more parts than"),
    ({"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1_000_000]}}, "a network of far more parts than"),
    ({"d_model": 1_000_000}, "of another shape: "),
    ({"model_type": "resnet"}, "a resnet cannot be this checkpoint's provider"),
])  # fmt: skip
def test_a_detector_that_cannot_be_run_from_its_folder_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    save_provider_files(make_network("detr"), tmp_path)
    path = tmp_path / "regions.json"
    document = {**json.loads(path.read_text()), **change}
    if document["model_type"] != "detr":
        del document["backbone_config"]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointBroken, match=words):
        open_provider(tmp_path, spec_of("detr"), CPU, torch.float32)


def test_a_grid_of_anchors_of_a_size_of_its_own_is_refused(tmp_path: Path) -> None:
    save_provider_files(make_network("rt_detr"), tmp_path)
    path = tmp_path / "regions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "anchor_image_size": [1_000_000, 1_000_000]}))
    with pytest.raises(CheckpointBroken, match="anchor_image_size is not usable"):
        open_provider(tmp_path, spec_of("rt_detr"), CPU, torch.float32)
