"""Training from the command line: finds the data, the recipe and the start, and runs training/vlp_run.py."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from readroom.errors import BadCall
from readroom.intake import existing_store, find_checkpoint_source, name_checkpoint
from readroom.records import FoundImage, JobKind, SkippedItem
from readroom.settings import Settings

if TYPE_CHECKING:
    from models.checkpoint import CheckpointSource
    from training.vlp_data import Sample
    from training.vlp_recipe import Recipe
    from training.vlp_run import Material, Tell, Trained
    from training.vlp_start import Start

Task = Literal["caption", "vqa"]
# The recipe where none is named. Fine-tuning starts from a checkpoint: the published way.
RECIPES = {
    ("caption", "coco"): "vlp_coco.toml",
    ("vqa", "coco"): "vlp_vqa.toml",
    ("caption", "phantoms"): "vlp_phantoms.toml",
    ("vqa", "phantoms"): "vlp_phantoms.toml",
}


@dataclass(frozen=True, slots=True)
class VlpOrder:
    """What one `readroom train vlp` was asked; None means as the recipe says."""

    task: Task = "caption"
    dataset: str = "coco"
    data_dir: Path | None = None
    config: Path | None = None
    init: str | None = None
    regions: str | None = None
    out: Path | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    limit: int | None = None
    command: str = ""


def teach_vlp(settings: Settings, order: VlpOrder, tell: Tell) -> Trained:
    """Train; `tell` hears a line of each epoch.

    Raises BadCall for data, recipe or start that are not there; CheckpointMissing, CheckpointBroken, LossNotFinite.
    """
    from training.vlp_run import train_on

    recipe = choose_recipe(order)
    material = gather_material(settings, order, recipe)
    folder = order.out or settings.home_dir / "training" / f"vlp-{order.task}-{time.strftime('%Y%m%d-%H%M%S')}"

    def open_start(device: Any) -> Start:
        return choose_start(settings, order, recipe, device)

    return train_on(recipe, material, open_start, folder, settings.device, settings.region_dir, order.command, tell)


def choose_recipe(order: VlpOrder) -> Recipe:
    """The recipe that is named, or the task's own, with what the command changes. Raises BadCall."""
    from training.vlp_recipe import CONFIGS, check_recipe, read_recipe

    recipe = read_recipe(order.config or CONFIGS / RECIPES[order.task, order.dataset])
    optimiser = replace(recipe.optimiser, **keep_given(batch_size=order.batch_size, learning_rate=order.learning_rate))
    changes = keep_given(task=order.task, epochs=order.epochs, seed=order.seed)
    return check_recipe(replace(recipe, optimiser=optimiser, **changes))


def keep_given(**changes: Any) -> dict[str, Any]:
    """Without those that are None."""
    return {name: value for name, value in changes.items() if value is not None}


def choose_start(settings: Settings, order: VlpOrder, recipe: Recipe, device: Any) -> Start:
    """The checkpoint that is named, else a fresh model as the recipe plans it."""
    from training.vlp_start import start_fresh, start_from

    if order.init is None:
        return start_fresh(recipe, device, settings.region_dir, order.regions)
    start = start_from(find_init(settings, order.init), device, settings.region_dir)
    if order.regions not in (None, start.provider.spec.provider):
        raise BadCall(
            f"that checkpoint's regions come from the provider {start.provider.spec.provider}, and it keeps to it",
            "Leave --regions out.",
        )
    return start


def find_init(settings: Settings, name: str) -> CheckpointSource:
    """The checkpoint to start from, by its name as every command knows it. Raises CheckpointMissing."""
    with existing_store(settings) as store:
        wanted = name_checkpoint(settings, "vlp", name, JobKind.CAPTION)
        return find_checkpoint_source(store, "vlp", wanted, JobKind.CAPTION)


# Data ----------------------------------------------------------------------------------------------------------------


def gather_material(settings: Settings, order: VlpOrder, recipe: Recipe) -> Material:
    """The samples of a data set, and its items that are not there. Raises BadCall when the whole is not there."""
    from training.vlp_data import Skipped
    from training.vlp_phantoms import list_phantoms
    from training.vlp_run import Material

    if order.dataset == "phantoms":
        count = order.limit or recipe.data.phantoms
        kept_back = max(2, round(recipe.data.held_out * count))
        drawn, checked = list_phantoms(order.task, count), list_phantoms(order.task, kept_back, validation=True)
        return Material(f"phantoms x {count}", list(drawn), list(checked), "phantoms")
    root = order.data_dir or settings.data_dir
    if root is None:
        raise BadCall("where is the data set?", "Give --data_dir, or set READROOM_DATA_DIR.")
    missing: list[SkippedItem] = []
    plan = recipe.data
    kind: Literal["features", "files"] = "features" if reads_features(settings, order, recipe) else "files"
    train = list(read_splits(root, settings, order, recipe, plan.train, missing, order.limit))
    held = list(read_splits(root, settings, order, recipe, plan.validation, missing, plan.validation_examples))
    skipped = tuple(Skipped(one.item, f"{one.reason}: {one.detail}") for one in missing)
    return Material(f"{order.dataset} {order.task} {'+'.join(plan.train)}", train, held, kind, skipped)


def reads_features(settings: Settings, order: VlpOrder, recipe: Recipe) -> bool:
    """Whether the model reads precomputed regions by the names of the pictures' files."""
    if order.init is not None:
        manifest = find_init(settings, order.init).manifest
        return manifest is not None and manifest.regions.get("provider") == "precomputed"
    planned = recipe.regions.provider if recipe.regions else None
    return (order.regions or planned) == "precomputed"


def read_splits(
    root: Path,
    settings: Settings,
    order: VlpOrder,
    recipe: Recipe,
    splits: Sequence[str],
    missing: list[SkippedItem],
    limit: int | None,
) -> Iterator[Sample]:
    """The samples of some splits, of the first `limit` items each; what is not there is added to `missing`."""
    for split in splits:
        found = read_questions(root, split, limit) if order.task == "vqa" else read_captions(
            root, settings, split, recipe.data.karpathy, limit
        )  # fmt: skip
        for item in found:
            if isinstance(item, SkippedItem):
                missing.append(item)
            else:
                yield item


def read_captions(
    root: Path, settings: Settings, split: str, karpathy: str, limit: int | None
) -> Iterable[Sample | SkippedItem]:
    """A sample for each caption of a COCO split. Raises BadCall for images without captions."""
    from producer.coco import read_coco
    from training.vlp_data import Sample

    for image in islice(read_coco(root, settings, split, root / karpathy if karpathy else None), limit):
        if not isinstance(image, FoundImage):
            yield image
        elif not image.reference_texts:
            raise BadCall(f"the images of {split} have no captions", f"annotations/captions_{split}.json is needed.")
        else:
            yield from (Sample(image.ref.path, text.strip()) for text in image.reference_texts)


def read_questions(root: Path, split: str, limit: int | None) -> Iterable[Sample | SkippedItem]:
    """A sample for each question of a VQA v2 split."""
    from producer.vqa import read_vqa
    from training.vlp_data import Sample

    for found in read_vqa(root, split, limit):
        if isinstance(found, SkippedItem):
            yield found
        else:
            yield Sample(found.path, found.text, found.answers)
