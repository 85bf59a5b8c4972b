"""A backbone's grid as regions, against a direct run of the backbone; and what a checkpoint may not hold."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BlipVisionConfig,
    BlipVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from models.vlp import backbone, grid
from models.vlp.grid import GridProvider, save_provider_files
from models.vlp.regions import RegionProvider, RegionSpec, open_provider
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.75, 1.25)
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 40], depths=[1, 1, 1, 1], layer_type="basic")


def spec_of(rows: int, width: int, image_size: int) -> RegionSpec:
    return RegionSpec("grid", rows * rows, width, 0, image_size, MEAN, STD)


# class, config, tokens before the grid, spec
NETWORKS: dict[str, tuple[Any, Any, int, RegionSpec]] = {
    "vit": (ViTModel, ViTConfig(**SIZES, image_size=48, patch_size=16), 1, spec_of(3, 32, 48)),
    "blip_vision_model": (
        BlipVisionModel,
        BlipVisionConfig(**SIZES, image_size=48, patch_size=16),
        1,
        spec_of(3, 32, 48),
    ),
    # seen at another size than the one it was made for, which it allows
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES, image_size=56, patch_size=14), 1, spec_of(2, 32, 28)),
    "dinov2_with_registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**SIZES, image_size=28, patch_size=14, num_register_tokens=3),
        4,
        spec_of(2, 32, 28),
    ),
    "resnet": (ResNetModel, RESNET, 0, spec_of(3, 40, 96)),
}
KINDS = list(NETWORKS)


def make_network(kind: str) -> Any:
    """A small network with random weights that are not all near zero, and used statistics where it keeps any."""
    network_class, config, _, _ = NETWORKS[kind]
    torch.manual_seed(3)
    network = network_class(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
        if kind == "resnet":
            network.train()(torch.randn(4, 3, 64, 64))
    return network.eval()


def draw_pictures(size: int, count: int = 3) -> list[np.ndarray]:
    draw = np.random.default_rng(4)
    return [draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def run_directly(network: Any, kind: str, pictures: list[np.ndarray]) -> np.ndarray:
    """Features (N, cells, F) by the plainest way: a picture at a time, a cell at a time."""
    _, _, leading, spec = NETWORKS[kind]
    rows = []
    for picture in pictures:
        shades = (picture / 255 - np.array(MEAN)) / np.array(STD)
        pixels = torch.tensor(shades.transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            hidden = network(pixel_values=pixels).last_hidden_state[0].numpy()
        if hidden.ndim == 3:
            cells = [hidden[:, y, x] for y in range(hidden.shape[1]) for x in range(hidden.shape[2])]
        else:
            cells = list(hidden[leading:])
        rows.append(np.stack(cells))
    assert rows[0].shape == (spec.count, spec.feature_dim)
    return np.stack(rows)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    save_provider_files(make_network(request.param), made)
    return made


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    save_provider_files(make_network("vit"), tmp_path)
    return tmp_path


def kind_of(folder: Path) -> str:
    return str(json.loads((folder / "regions.json").read_text())["model_type"])


def open_grid(folder: Path, spec: RegionSpec | None = None, dtype: torch.dtype = torch.float32) -> RegionProvider:
    return open_provider(folder, spec or NETWORKS[kind_of(folder)][3], CPU, dtype)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "regions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Against the backbone ------------------------------------------------------------------------------------------------


def test_features_are_those_of_a_direct_run(folder: Path) -> None:
    kind = kind_of(folder)
    spec = NETWORKS[kind][3]
    provider = open_grid(folder)
    pictures = draw_pictures(spec.image_size)
    with torch.inference_mode():
        regions = provider.compute(provider.prepare(pictures))
    assert regions.features.shape == (3, spec.count, spec.feature_dim) and regions.features.dtype == torch.float32
    assert regions.classes.shape == (3, spec.count, 0) and regions.boxes.shape == (3, spec.count, 6)
    expected = run_directly(make_network(kind), kind, pictures)
    np.testing.assert_allclose(regions.features.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_same_pictures_give_the_same_regions_alone_and_again(folder: Path) -> None:
    provider = open_grid(folder)
    pictures = draw_pictures(provider.spec.image_size)
    with torch.inference_mode():
        together = provider.compute(provider.prepare(pictures)).features
        again = provider.compute(provider.prepare(pictures)).features
        alone = [provider.compute(provider.prepare([picture])).features[0] for picture in pictures]
    assert torch.equal(together, again)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_half_precision_gives_float32_near_the_exact_features(folder: Path) -> None:
    exact, half = open_grid(folder), open_grid(folder, dtype=torch.bfloat16)
    module = half.module()
    assert module is not None and {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    pictures = draw_pictures(exact.spec.image_size)
    with torch.inference_mode():
        wanted = exact.compute(exact.prepare(pictures)).features
        found = half.compute(half.prepare(pictures)).features
    assert found.dtype == torch.float32
    assert (found - wanted).norm() / wanted.norm() < 0.05


def test_boxes_are_the_cells_of_the_square_picture_row_by_row(folder: Path) -> None:
    provider = open_grid(folder)
    size, rows = provider.spec.image_size, int(provider.spec.count**0.5)
    step = size / rows
    with torch.inference_mode():
        boxes = provider.compute(provider.prepare(draw_pictures(size, 2))).boxes
    expected = [[x * step, y * step, (x + 1) * step, (y + 1) * step, 0, 1] for y in range(rows) for x in range(rows)]
    np.testing.assert_allclose(boxes[0].numpy(), np.array(expected), rtol=1e-6)
    assert torch.equal(boxes[0], boxes[1]) and boxes[0, -1, 2] == boxes[0, -1, 3] == size


def test_a_change_inside_a_cell_changes_the_region_whose_box_holds_it() -> None:
    # Without layers a ViT's patches do not see each other.
    network = ViTModel(ViTConfig(**{**SIZES, "num_hidden_layers": 0}, image_size=48, patch_size=16)).eval()
    provider = GridProvider(network, spec_of(3, 32, 48), CPU)
    grey = np.full((48, 48, 3), 128, np.uint8)
    for x, y in [(0, 0), (47, 0), (20, 40), (47, 47), (5, 17)]:
        dotted = grey.copy()
        dotted[y, x] = 255
        with torch.inference_mode():
            regions = provider.compute(provider.prepare([grey, dotted]))
        changed = (regions.features[0] != regions.features[1]).any(dim=-1).nonzero().flatten().tolist()
        assert len(changed) == 1
        x1, y1, x2, y2 = regions.boxes[0, changed[0], :4].tolist()
        assert x1 <= x < x2 and y1 <= y < y2


def test_a_picture_of_another_size_or_grey_is_sized(vit_folder: Path) -> None:
    provider = open_grid(vit_folder)
    with torch.inference_mode():
        regions = provider.compute(provider.prepare([np.zeros((20, 70), np.uint8), np.zeros((90, 48, 3), np.uint8)]))
    assert regions.features.shape == (2, 9, 32)
    with pytest.raises(BadCall, match="uint8"):
        provider.prepare([np.zeros((48, 48, 3), np.float32)])


# For training --------------------------------------------------------------------------------------------------------


def test_gradients_of_a_look_reach_the_backbone() -> None:
    network = make_network("blip_vision_model").train()
    provider = GridProvider(network, NETWORKS["blip_vision_model"][3], CPU)
    regions = provider.look(torch.randn(2, 3, 48, 48))
    regions.features.square().sum().backward()
    lacking = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not lacking and provider.module() is network


def test_a_provider_leaves_mode_and_statistics_of_its_network_alone() -> None:
    network = make_network("resnet").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    GridProvider(network, NETWORKS["resnet"][3], CPU)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_trained_network_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    network = make_network("resnet")
    previous = os.umask(0o077)
    try:
        save_provider_files(network, tmp_path)
    finally:
        os.umask(previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["regions.json", "regions.safetensors"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}
    module = open_grid(tmp_path).module()
    assert module is not None and not module.training
    loaded = module.state_dict()
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_a_saved_config_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    network = make_network("vit")
    network.config.name_or_path = str(tmp_path)
    save_provider_files(network, tmp_path)
    assert str(tmp_path) not in (tmp_path / "regions.json").read_text()


# What a checkpoint may not hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value", "given"), [("count", 4, 9), ("count", 10, 9), ("feature_dim", 64, 32)])
def test_a_spec_that_is_not_its_networks_names_the_field(vit_folder: Path, field: str, value: int, given: int) -> None:
    document = {**NETWORKS["vit"][3].as_json(), field: value}
    with pytest.raises(CheckpointBroken, match=f"regions: {field} is {value}, and its network gives {given}"):
        open_grid(vit_folder, RegionSpec.from_json(document))


def test_classes_of_a_grid_are_refused() -> None:
    spec = RegionSpec("grid", 9, 32, 5, 48)
    with pytest.raises(CheckpointBroken, match="regions: class_count is 5, and its network gives 0"):
        GridProvider(make_network("vit"), spec, CPU)


def test_a_picture_size_that_the_network_cannot_see_is_refused(vit_folder: Path) -> None:
    with pytest.raises(CheckpointBroken, match="cannot look at a picture of its image_size"):
        open_grid(vit_folder, spec_of(4, 32, 64))


def refuse_call(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be reached")


@pytest.mark.parametrize(("patch_size", "cells"), [(16, 9), (1, 2304), ([16, 8], 18)])
def test_tokens_of_another_number_are_refused_before_a_look(
    monkeypatch: pytest.MonkeyPatch, patch_size: Any, cells: int
) -> None:
    monkeypatch.setattr(grid, "probe_network", refuse_call)
    network = ViTModel(ViTConfig(**SIZES, image_size=48, patch_size=patch_size))
    with pytest.raises(CheckpointBroken, match=f"regions: count is 4, and its network gives {cells}"):
        GridProvider(network, RegionSpec("grid", 4, 32, 0, 48), CPU)


def spoil_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "regions.safetensors")
    change(weights)
    save_file(weights, folder / "regions.safetensors", metadata={"format": "pt"})


KEY = "embeddings.patch_embeddings.projection.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop(KEY), rf"missing: {KEY} \(1 in all\)"),
        (lambda weights: weights.update(extra=torch.zeros(2)), r"unexpected: extra \(1 in all\)"),
        (lambda weights: weights.update({KEY: torch.zeros(32, 3, 8, 8)}), rf"of another shape: {KEY} \(1 in all\)"),
    ],
    ids=["missing", "unexpected", "of another shape"],
)
def test_weights_that_do_not_fit_are_named(vit_folder: Path, change: Any, words: str) -> None:
    spoil_weights(vit_folder, change)
    with pytest.raises(CheckpointBroken, match=words):
        open_grid(vit_folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1_000_000}, "a network of far more parts than regions.safetensors has weights for"),
        ({"num_hidden_layers": 1_000_001}, "num_hidden_layers is beyond 1000000"),
        ({"deeper": [{"sizes": [[3, -(10**400)]]}]}, "sizes is beyond 1000000"),
        ({"intermediate_size": 1_000_000}, r"of another shape: layers\.0\..* \(6 in all\)"),
        ({"hidden_size": 1_000_000}, "of another shape: embeddings.cls_token, "),
        ({"image_size": 1_000_000}, r"of another shape: embeddings.position_embeddings \(1 in all\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_of_any_other_size_is_refused_before_a_weight_is_made(
    vit_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    spec = NETWORKS["vit"][3]
    edit_config(vit_folder, **changes)
    monkeypatch.setattr(backbone, "load_file", refuse_call)
    monkeypatch.setattr(ViTModel, "from_pretrained", refuse_call)
    with pytest.raises(CheckpointBroken, match=words) as caught:
        open_grid(vit_folder, spec)
    assert caught.value.remedy


def test_weights_that_a_deeper_network_lacks_are_named_before_they_are_made(
    vit_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(vit_folder, num_hidden_layers=3)
    with pytest.raises(CheckpointBroken, match=r"missing: .*layers?\.2\."):  # few enough: made, and then named
        open_grid(vit_folder)
    monkeypatch.setattr(backbone, "MAX_COMPUTED", 0)
    monkeypatch.setattr(backbone, "load_file", refuse_call)
    with pytest.raises(CheckpointBroken, match=r"missing: .*layers?\.2\."):
        open_grid(vit_folder)


def test_parts_that_another_thread_builds_meanwhile_are_not_counted() -> None:
    parts = [torch.nn.Identity() for _ in range(20)]
    with ThreadPoolExecutor(1) as threads, backbone.bound_parts(3):
        assert len(threads.submit(torch.nn.Sequential, *parts).result(timeout=60)) == 20
        assert len(torch.nn.Sequential(*parts[:3])) == 3
        with pytest.raises(backbone.TooManyParts):
            torch.nn.Sequential(parts[0])
        assert len(threads.submit(torch.nn.Sequential, *parts).result(timeout=60)) == 20
    assert len(torch.nn.Sequential(*parts)) == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(vit_folder: Path, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[KEY][3, 1, 4, 1] = value

    spoil_weights(vit_folder, spoil)
    with pytest.raises(CheckpointBroken, match=rf"infinite or not a number: {KEY} \(1 in all\)") as caught:
        open_grid(vit_folder)
    assert caught.value.remedy


def test_positions_that_the_class_computes_are_tolerated(vit_folder: Path) -> None:
    spoil_weights(vit_folder, lambda weights: weights.update({"embeddings.position_ids": torch.arange(10)[None]}))
    assert open_grid(vit_folder).spec.count == 9


def test_weights_that_are_none_are_refused(vit_folder: Path) -> None:
    (vit_folder / "regions.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointBroken, match="cannot load these weights as ViTModel"):
        open_grid(vit_folder)
    (vit_folder / "regions.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match=r"holds no regions\.safetensors"):
        open_grid(vit_folder)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another machine, each refused."""
    attempts: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "someone/code--modeling.Model"}),
        ("attn_implementation", "someone/kernel"),
        ("_attn_implementation", "someone/kernel"),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("backbone", "microsoft/resnet-18"),
        ("use_timm_backbone", True),
        ("use_pretrained_backbone", True),
        ("model_type", "timm_wrapper"),
    ],
)
def test_a_config_that_would_fetch_something_is_refused(
    vit_folder: Path, no_network: list[Any], key: str, value: Any
) -> None:
    spec = NETWORKS["vit"][3]
    edit_config(vit_folder, **{key: value})
    with pytest.raises(CheckpointBroken, match=f"{key} names something that is not in the checkpoint"):
        open_grid(vit_folder, spec)
    if key != "model_type":
        edit_config(vit_folder, **{key: None, "deeper": [{"backbone_config": {key: value}}]})
        with pytest.raises(CheckpointBroken, match=f"{key} names something that is not in the checkpoint"):
            open_grid(vit_folder, spec)
    assert not no_network


@pytest.mark.parametrize("model_type", ["", "nothing", None, ["vit"], 7])
def test_a_config_of_no_known_type_is_refused(vit_folder: Path, model_type: Any) -> None:
    edit_config(vit_folder, model_type=model_type)
    with pytest.raises(CheckpointBroken, match="model_type is not one that can be run here"):
        open_grid(vit_folder, NETWORKS["vit"][3])


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 5}, {"patch_size": 0}])
def test_a_config_of_nonsense_is_refused(vit_folder: Path, changes: dict[str, Any]) -> None:
    edit_config(vit_folder, **changes)
    with pytest.raises(CheckpointBroken):
        open_grid(vit_folder)


@pytest.mark.parametrize("depth", [500, 900, 960, 990, 5000])
def test_a_config_nested_without_end_is_refused(vit_folder: Path, depth: int) -> None:
    path = vit_folder / "regions.json"
    path.write_text(f'{{"model_type": "nothing", "deep": {"[" * depth}{"]" * depth}}}')
    with pytest.raises(CheckpointBroken, match=r"is not JSON|nested too deeply|model_type is not one"):
        open_grid(vit_folder, NETWORKS["vit"][3])


def test_a_config_that_is_no_json_is_refused(vit_folder: Path) -> None:
    (vit_folder / "regions.json").write_text("{")
    with pytest.raises(CheckpointBroken, match=r"regions\.json is not JSON"):
        open_grid(vit_folder, NETWORKS["vit"][3])


@pytest.mark.parametrize(
    "network",
    [
        BertModel(BertConfig(**SIZES, vocab_size=11)),
        # its tokens are cells of several patches, in an order of their own
        SwinModel(SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)),
    ],
    ids=["bert", "swin"],
)
def test_a_network_without_a_grid_of_patches_is_refused(tmp_path: Path, network: Any) -> None:
    save_provider_files(network, tmp_path)
    with pytest.raises(CheckpointBroken):
        open_grid(tmp_path, RegionSpec("grid", 64, 16, 0, 64))


def test_a_folder_copied_elsewhere_gives_the_same_regions(vit_folder: Path, tmp_path_factory: Any) -> None:
    copy = Path(shutil.copytree(vit_folder, tmp_path_factory.mktemp("elsewhere") / "copy"))
    here, there = open_grid(vit_folder), open_grid(copy)
    pictures = draw_pictures(48)
    with torch.inference_mode():
        assert torch.equal(
            here.compute(here.prepare(pictures)).features, there.compute(there.prepare(pictures)).features
        )
