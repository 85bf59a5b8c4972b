"""Where a training of a VLP starts: a VLP, a BERT over a vision network, a small model over any provider."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining

from models.checkpoint import resolve_checkpoint
from models.vlp.config import VlpConfig
from models.vlp.folder import load_network, read_sizes
from models.vlp.network import VlpModel
from models.vlp.tokenizer import SPECIAL_TOKENS
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing
from tests.fakes import small_vlp
from training.vlp_recipe import FreshPlan, Recipe, RegionPlan
from training.vlp_start import add_answers, start_fresh, start_from

CPU = torch.device("cpu")
WORDS = [*SPECIAL_TOKENS, "a", "red", "thing"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture
def bert(tmp_path, vocabulary):
    """A BERT as the hub has it, its LayerNorms named as TensorFlow did."""
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    BertForPreTraining(BertConfig(vocab_size=len(WORDS), **SIZES)).save_pretrained(folder)
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocab.txt").write_text(vocabulary.read_text())
    return folder


def save_network(folder, provider):
    small_vlp.small_network(small_vlp.SPECS[provider]).save_pretrained(folder)
    return str(folder)


def plan_fresh(tmp_path, vocabulary, provider, **changes):
    table = {"network": save_network(tmp_path / "network", provider), "image_size": small_vlp.SIZE, "count": 8}
    if provider == "grid":
        del table["count"]
    model = FreshPlan(vocabulary=str(vocabulary), sizes=SIZES | changes)
    return Recipe(model=model, regions=RegionPlan(provider=provider, **{provider: table}))


@pytest.mark.parametrize("provider", ["grid", "detector"])
def test_sizes_of_the_regions_are_read_off_the_network(tmp_path, vocabulary, provider):
    start = start_fresh(plan_fresh(tmp_path, vocabulary, provider), CPU, None)
    assert start.provider.spec.as_json()["count"] == small_vlp.SPECS[provider].count
    assert start.provider.spec.class_count == small_vlp.SPECS[provider].class_count
    assert start.model.config.region_feat_dim == 32
    assert start.parent == resolve_checkpoint(str(tmp_path / "network")).ref
    assert start.tokenizer.words == WORDS


def test_precomputed_regions_need_no_network(tmp_path, vocabulary):
    small_vlp.write_regions(tmp_path / "regions")
    table = {"count": 10, "feature_dim": 24, "class_count": 7, "layout": {"dataset": "coco"}}
    regions = RegionPlan(grid={"network": "never/opened"}, precomputed=table)
    recipe = Recipe(model=FreshPlan(vocabulary=str(vocabulary), sizes=SIZES), regions=regions)
    start = start_fresh(recipe, CPU, tmp_path / "regions", provider="precomputed")
    assert start.provider.spec == small_vlp.SPECS["precomputed"]
    assert start.provider.module() is None and start.parent is None


def test_bert_gives_its_weights_and_vocabulary_and_six_token_types(tmp_path, bert):
    recipe = plan_fresh(tmp_path, "", "grid")
    recipe = Recipe(model=FreshPlan(bert=str(bert), sizes=SIZES), regions=recipe.regions)
    start = start_fresh(recipe, CPU, None)
    given, taken = load_file(bert / "model.safetensors"), start.model.state_dict()
    assert start.tokenizer.words == WORDS
    same = [
        name
        for name in taken
        if name.startswith(("bert.", "cls.")) and "token_type" not in name and "decoder" not in name
    ]
    assert len(same) == 2 + 2 + 2 * 16 + 2 + 5  # tables, LayerNorm, layers, pooler, head
    for name in same:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        assert torch.equal(taken[name], given[old]), name
    types, table = given["bert.embeddings.token_type_embeddings.weight"], "bert.embeddings.token_type_embeddings.weight"
    assert torch.equal(taken[table], types[[0, 1, 0, 0, 0, 1]])


def test_bert_of_another_size_is_refused(tmp_path, bert):
    recipe = plan_fresh(tmp_path, "", "grid")
    model = FreshPlan(bert=str(bert), sizes=SIZES | {"hidden_size": 32})
    with pytest.raises(CheckpointBroken, match="other sizes"):
        start_fresh(Recipe(model=model, regions=recipe.regions), CPU, None)


def test_bert_without_its_lm_head_is_refused(tmp_path, bert):
    weights = load_file(bert / "model.safetensors")
    headless = {name: value for name, value in weights.items() if not name.startswith("cls.predictions.transform")}
    save_file(headless, bert / "model.safetensors", metadata={"format": "pt"})
    recipe = plan_fresh(tmp_path, "", "grid")
    with pytest.raises(CheckpointBroken, match=r"cls\.predictions\.transform"):
        start_fresh(Recipe(model=FreshPlan(bert=str(bert), sizes=SIZES), regions=recipe.regions), CPU, None)


def test_vocabulary_may_be_that_of_a_checkpoint(tmp_path):
    recipe = plan_fresh(tmp_path, "bundled:vlp", "grid")
    assert len(start_fresh(recipe, CPU, None).tokenizer.words) > 100


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"regions": None}, BadCall, "starts from a checkpoint"),
    ({"model": FreshPlan(sizes=SIZES)}, CheckpointMissing, "no vocabulary"),
    ({"sizes": {"hiden_size": 3}}, BadCall, "hiden_size"),
    ({"sizes": {"hidden_size": 17}}, BadCall, "num_attention_heads"),
    ({"provider": "magic"}, BadCall, "magic"),
    ({"network": ""}, BadCall, "names no network"),
    ({"image_size": 1000}, CheckpointBroken, "1000 x 1000"),
])  # fmt: skip
def test_recipe_that_gives_no_model_is_refused(tmp_path, vocabulary, change, error, words):
    recipe = plan_fresh(tmp_path, vocabulary, "grid")
    table = recipe.regions.grid | {key: change[key] for key in ("network", "image_size") if key in change}
    regions = RegionPlan(provider=change.get("provider", "grid"), grid=table)
    model = change.get("model", FreshPlan(vocabulary=str(vocabulary), sizes=change.get("sizes", SIZES)))
    with pytest.raises(error, match=words):
        start_fresh(Recipe(model=model, regions=change.get("regions", regions)), CPU, None)


def test_network_with_weights_of_nothing_is_refused(tmp_path, vocabulary):
    recipe = plan_fresh(tmp_path, vocabulary, "grid")
    path = tmp_path / "network" / "model.safetensors"
    half = {name: value for name, value in load_file(path).items() if "layer" not in name}
    save_file(half, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointBroken, match="has no"):
        start_fresh(recipe, CPU, None)


def test_vlp_is_taken_as_it_is_and_gets_a_head_for_its_answers(tmp_path):
    folder = small_vlp.save_vlp(tmp_path / "vlp", licence="MIT")
    start = start_from(resolve_checkpoint(str(folder)), CPU, None)
    assert start.parent == resolve_checkpoint(str(folder)).ref
    assert (start.licence, start.allowed_use, start.generation["num_beams"]) == ("MIT", "research", 3)
    assert add_answers(start, ["<unk>", "other"]) is start  # it answers already

    bare = VlpModel(VlpConfig(**{**vars_of(read_sizes(folder)[0]), "num_answers": 0}))
    bare.load_state_dict(load_network(folder, read_sizes(folder)[0]).state_dict(), strict=False)
    headed = add_answers(type(start)(bare, start.provider, start.tokenizer, (), None), ["<unk>", "yes", "no"])
    assert headed.model.config.num_answers == 3
    kept = headed.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in bare.state_dict().items())
    assert kept["ans_classifier.2.weight"].shape[0] == 3


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_blip_is_no_start():
    with pytest.raises(BadCall, match="family blip"):
        start_from(resolve_checkpoint("bundled:blip"), CPU, None)
