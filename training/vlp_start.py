"""Where a training of a VLP starts: at a VLP, or at a BERT or nothing over regions of some vision network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from models.checkpoint import (
    CLIP_MEAN,
    CLIP_STD,
    DEFAULT_PROFILE,
    CheckpointSource,
    Manifest,
    read_json,
    resolve_checkpoint,
)
from models.pretrained import hide_progress
from models.verified import open_folder
from models.vlp.backbone import save_provider_files
from models.vlp.captioner import load_parts
from models.vlp.config import VlpConfig
from models.vlp.convert import BIAS, SECOND_BIAS, TYPES, grow_types, rename_weight
from models.vlp.detector import find_detector, read_probabilities
from models.vlp.folder import TIED_WEIGHT, name_keys
from models.vlp.grid import find_backbone, read_grid
from models.vlp.network import VlpModel
from models.vlp.regions import RegionProvider, RegionSpec, open_provider
from models.vlp.tokenizer import VOCABULARY_NAME, CasedTokenizer, read_vocabulary
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing
from training.vlp_recipe import FreshPlan, Recipe, RegionPlan

DETECTED = 100  # regions an image, as the release has them
# What a BERT has no weights for: how regions are embedded, and the answer head.
NOT_IN_BERT = ("vis_embed.", "vis_pe_embed.", "ans_classifier.")


@dataclass(frozen=True, slots=True)
class Start:
    """What is trained on, and what its checkpoint will say of where it comes from."""

    model: VlpModel
    provider: RegionProvider
    tokenizer: CasedTokenizer
    answers: tuple[str, ...]
    parent: str | None
    profile: str = DEFAULT_PROFILE
    licence: str = ""
    allowed_use: str = "research"
    generation: dict[str, Any] = field(default_factory=dict)


# From a checkpoint ---------------------------------------------------------------------------------------------------


def start_from(source: CheckpointSource, device: torch.device, region_dir: Path | None) -> Start:
    """A VLP as it is. Raises BadCall for another family, CheckpointMissing, CheckpointBroken."""
    if source.family != "vlp":
        raise BadCall(f"checkpoint {source.name} is of the family {source.family}", "Name a VLP with --init.")
    manifest = source.manifest
    task = "caption" if manifest is None or "caption" in manifest.task else "answer"
    parts = load_parts(source, str(device), "float32", region_dir, task)
    return Start(
        model=parts.model,
        provider=parts.provider,
        tokenizer=parts.tokenizer,
        answers=parts.answers,
        parent=parts.checkpoint,
        profile=parts.profile,
        licence=manifest.licence if manifest else "",
        allowed_use=(manifest.allowed_use if manifest else "") or "research",
        generation=dict(manifest.generation) if manifest and task == "caption" else {},
    )


def add_answers(start: Start, answers: Sequence[str]) -> Start:
    """The same with a fresh answer head, unless it has one already."""
    if start.answers:
        return start
    config = replace(start.model.config, num_answers=len(answers))
    model = VlpModel(config).to(start.model.device)
    model.load_state_dict(start.model.state_dict(), strict=False)
    return replace(start, model=model, answers=tuple(answers))


# From less -----------------------------------------------------------------------------------------------------------


def start_fresh(recipe: Recipe, device: torch.device, region_dir: Path | None, provider: str | None = None) -> Start:
    """A model of the recipe's sizes. `provider` stands for the recipe's own.

    Raises BadCall when the recipe has none, CheckpointMissing, CheckpointBroken.
    """
    if recipe.model is None or recipe.regions is None:
        raise BadCall("this recipe starts from a checkpoint", "Name one with --init.")
    plan = replace(recipe.regions, provider=provider or recipe.regions.provider)
    regions, seen = open_regions(plan, device, region_dir)
    bert, read = open_bert(recipe.model)
    tokenizer = read_vocabulary(find_vocabulary(recipe.model, bert))
    model = build_model(recipe.model, regions.spec, len(tokenizer.words))
    if bert is not None:
        fill_from_bert(model, bert)
    return Start(
        model=model.to(device),
        provider=regions,
        tokenizer=tokenizer,
        answers=(),
        parent=seen or read,
        generation=dict(recipe.generation),
    )


def build_model(plan: FreshPlan, spec: RegionSpec, vocabulary: int) -> VlpModel:
    """A VLP of the planned sizes over these regions. Raises BadCall for a size there is not."""
    try:
        sizes = VlpConfig(
            vocab_size=vocabulary,
            num_regions=spec.count,
            region_feat_dim=spec.feature_dim,
            region_num_classes=spec.class_count,
            **plan.sizes,
        )
    except TypeError:
        unknown = sorted(plan.sizes.keys() - asdict(VlpConfig()).keys()) or ["a size that the regions give"]
        raise BadCall(f"the recipe's [model.sizes] cannot have {unknown[0]}") from None
    except CheckpointBroken as error:
        raise BadCall(f"the recipe's [model.sizes] are no VLP's: {error}") from None
    model = VlpModel(sizes)
    if plan.glorot:
        set_glorot(model)
    return model


def set_glorot(model: VlpModel) -> None:
    """Start linear layers by Glorot's rule (2010)."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embeddings" not in name:
            nn.init.xavier_uniform_(weight)


def open_bert(plan: FreshPlan) -> tuple[Path | None, str | None]:
    """The folder of the BERT to start from and its ref; None twice without one."""
    if not plan.bert:
        return None, None
    source = resolve_checkpoint(plan.bert)
    return open_folder(source)[0], source.ref


def find_vocabulary(plan: FreshPlan, bert: Path | None) -> Path:
    """The vocabulary file that is named, else the BERT's. Raises CheckpointMissing."""
    path = Path(plan.vocabulary).expanduser()
    if plan.vocabulary and not path.is_file():
        path = open_folder(resolve_checkpoint(plan.vocabulary))[0] / VOCABULARY_NAME
    elif not plan.vocabulary and bert is not None:
        path = bert / VOCABULARY_NAME
    if not path.is_file():
        raise CheckpointMissing("there is no vocabulary", "Name a vocab.txt with [model] vocabulary in the recipe.")
    return path


@torch.no_grad()
def fill_from_bert(model: VlpModel, folder: Path) -> None:
    """Take over a BERT's weights and LM head; its two token types become six as in the release's loader.

    Raises CheckpointBroken when it has other sizes than the recipe's model, or is no BERT with an LM head.
    """
    weights = {
        rename_weight(name): value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()
    }
    if SECOND_BIAS in weights:
        weights.setdefault(BIAS, weights.pop(SECOND_BIAS))
    kept = {name: value for name, value in weights.items() if name in model.state_dict() and name != TIED_WEIGHT}
    if TYPES in kept and model.config.has_new_types:
        kept[TYPES] = grow_types(kept[TYPES])
    try:
        missing = model.load_state_dict(kept, strict=False).missing_keys
    except RuntimeError:
        raise CheckpointBroken("the BERT has other sizes than [model.sizes]", "Give its sizes in the recipe.") from None
    wrong = [name for name in missing if not name.startswith((*NOT_IN_BERT, TIED_WEIGHT))]
    if wrong:
        raise CheckpointBroken(f"the BERT to start from has no {name_keys(wrong)}", "Name one with its LM head.")


# Regions of a fresh model --------------------------------------------------------------------------------------------


def open_regions(plan: RegionPlan, device: torch.device, region_dir: Path | None) -> tuple[RegionProvider, str | None]:
    """A provider as planned, and the ref of the network in it; None for precomputed regions."""
    tables = {"grid": plan.grid, "detector": plan.detector, "precomputed": plan.precomputed}
    if plan.provider not in tables:
        raise BadCall(f"no provider of regions is called {plan.provider!r}", f"There are: {', '.join(tables)}.")
    table = tables[plan.provider]
    if plan.provider == "precomputed":
        spec = RegionSpec.from_json({"provider": "precomputed", **table})
        return open_provider(Path(), spec, device, torch.float32, region_dir), None
    if not table.get("network"):
        raise BadCall(f"the recipe's [regions.{plan.provider}] names no network", "Name a folder or a hub id.")
    source = resolve_checkpoint(str(table["network"]))
    folder, manifest = open_folder(source)
    network = load_vision(folder, plan.provider)
    spec = measure_network(network, plan.provider, table, read_picture_sizes(folder, manifest))
    with TemporaryDirectory() as staged:
        # By way of its files, as a worker will: what could not be served is refused before it is trained.
        save_provider_files(network, Path(staged))
        return open_provider(Path(staged), spec, device, torch.float32), source.ref


def load_vision(folder: Path, provider: str) -> Any:
    """The vision network of a checkpoint folder: a whole one, or the tower of a BLIP. Raises CheckpointBroken."""
    from transformers import AutoConfig, BlipForConditionalGeneration

    with hide_progress():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if provider == "grid" and config.model_type == "blip":
                blip = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
                return blip.vision_model
            kind = find_backbone(config) if provider == "grid" else find_detector(config)
            if kind is None:
                raise CheckpointBroken(f"a {config.model_type} gives no regions by the provider {provider}")
            network, found = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, ImportError) as error:  # transformers' own words hold paths
            raise CheckpointBroken(f"the network of the regions cannot be loaded ({type(error).__name__})") from None
    # A pooler is in every class and in few checkpoints; regions are taken before it.
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise CheckpointBroken(f"the network of the regions has no {name_keys(missing)}", "Name another one.")
    return network


def read_picture_sizes(folder: Path, manifest: Manifest | None) -> dict[str, Any]:
    """What a checkpoint says of the pictures it saw: `image_size`, `mean`, `std`, as far as it says."""
    if manifest is not None:
        return {"image_size": manifest.image_size, "mean": manifest.mean, "std": manifest.std}
    document = read_json(folder / "preprocessor_config.json")
    size = document.get("size")
    side = size.get("height") or size.get("shortest_edge") if isinstance(size, dict) else size
    told = {"image_size": side, "mean": document.get("image_mean"), "std": document.get("image_std")}
    return {name: value for name, value in told.items() if value}


@torch.no_grad()
def measure_network(network: Any, provider: str, table: dict[str, Any], told: dict[str, Any]) -> RegionSpec:
    """The spec of what a network gives, by looking at a black picture. Raises BadCall, CheckpointBroken."""
    sizes = {"mean": CLIP_MEAN, "std": CLIP_STD, **told, **{k: v for k, v in table.items() if k != "network"}}
    side = sizes.get("image_size")
    if not isinstance(side, int):
        raise BadCall("the network of the regions does not tell its pictures' size", "Give image_size in the recipe.")
    try:
        seen = network.eval()(torch.zeros(1, 3, side, side))
    except (ValueError, RuntimeError):
        raise CheckpointBroken(f"the network of the regions sees no pictures of {side} x {side} pixels") from None
    hidden = seen.last_hidden_state
    if provider == "detector":
        classes = read_probabilities(seen.logits, network.config.model_type).shape[2]
        count = min(int(sizes.pop("count", DETECTED)), seen.logits.shape[1])
    elif hidden.ndim == 4:
        hidden, classes, count = hidden.flatten(2).transpose(1, 2), 0, hidden.shape[2] * hidden.shape[3]
    else:
        rows, columns = read_grid(network.config, side)
        classes, count = 0, rows * columns
    document = {"provider": provider, "count": count, "feature_dim": hidden.shape[2], "class_count": classes}
    return RegionSpec.from_json({**sizes, **document, "mean": list(sizes["mean"]), "std": list(sizes["std"])})
