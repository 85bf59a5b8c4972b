"""Training from the command line: finds the data, the recipe and the start, and runs training/vlp_run.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
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
    from producer.coco import Listing
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
DATA_REMEDY = (
    "--data_dir or READROOM_DATA_DIR names the folder that holds coco2017/annotations and coco2017/train2017, for "
    "questions v2_OpenEnded_mscoco_train2014_questions.json and what belongs to it; docs/training.md lists them."
)


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
    forward_size: int | None = None
    seed: int | None = None
    limit: int | None = None
    region_dir: Path | None = None
    command: str = ""


def teach_vlp(settings: Settings, order: VlpOrder, tell: Tell) -> Trained:
    """Train; `tell` hears a line of each epoch.

    Raises BadCall for data, recipe or start that are not there; CheckpointMissing, CheckpointBroken, LossNotFinite.
    """
    from training.vlp_run import train_on

    recipe = choose_recipe(order)
    region_dir = order.region_dir or settings.region_dir
    folder = order.out or settings.home_dir / "training" / f"vlp-{order.task}-{time.strftime('%Y%m%d-%H%M%S')}"

    def open_start(device: Any) -> Start:
        return choose_start(settings, order, recipe, device, region_dir)

    def gather(provider: str) -> Material:
        return gather_material(settings, order, recipe, by_name=provider == "precomputed")

    return train_on(recipe, gather, open_start, folder, settings.device, region_dir, order.command, tell)


def choose_recipe(order: VlpOrder) -> Recipe:
    """The recipe that is named, or the task's own, with what the command changes. Raises BadCall."""
    from training.vlp_recipe import CONFIGS, check_recipe, read_recipe

    recipe = read_recipe(order.config or CONFIGS / RECIPES[order.task, order.dataset])
    sizes = keep_given(batch_size=order.batch_size, forward_size=order.forward_size)
    optimiser = replace(recipe.optimiser, **sizes, **keep_given(learning_rate=order.learning_rate))
    changes = keep_given(task=order.task, epochs=order.epochs, seed=order.seed)
    return check_recipe(replace(recipe, optimiser=optimiser, **changes))


def keep_given(**changes: Any) -> dict[str, Any]:
    """Without those that are None."""
    return {name: value for name, value in changes.items() if value is not None}


def choose_start(settings: Settings, order: VlpOrder, recipe: Recipe, device: Any, region_dir: Path | None) -> Start:
    """The checkpoint that is named, else a fresh model as the recipe plans it."""
    from training.vlp_start import start_fresh, start_from

    if order.init is None:
        return start_fresh(recipe, device, region_dir, order.regions)
    start = start_from(find_init(settings, order.init), device, region_dir)
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


def gather_material(settings: Settings, order: VlpOrder, recipe: Recipe, by_name: bool) -> Material:
    """The samples of a data set, and its items that are not there. Raises BadCall when the whole is not there.

    `by_name`: the model reads regions that were computed before, by the names of the pictures' files.
    """
    from training.vlp_data import Skipped
    from training.vlp_phantoms import list_phantoms
    from training.vlp_run import Material

    if order.dataset == "phantoms":
        count = order.limit or recipe.data.phantoms
        kept_back = max(2, round(recipe.data.held_out * count))
        drawn, checked = list_phantoms(order.task, count), list_phantoms(order.task, kept_back, validation=True)
        return Material(f"phantoms x {count}", list(drawn), list(checked), "phantoms")
    folder = order.data_dir or settings.data_dir
    if folder is None:
        raise BadCall("it is not said where the data set is", DATA_REMEDY)
    if not folder.expanduser().is_dir():
        raise BadCall("the folder of the data set is not there", DATA_REMEDY)
    root, plan = folder.expanduser().resolve(), recipe.data
    reader = Splits(root, settings, order.task, plan.karpathy, by_name)
    missing: list[SkippedItem] = []
    train = list(reader.read(plan.train, order.limit, missing))
    held = list(reader.read(plan.validation, plan.validation_examples, missing))
    skipped = tuple(Skipped(one.item, f"{one.reason}: {one.detail}") for one in missing)
    name, kind = f"{order.dataset} {order.task} {'+'.join(plan.train)}", "features" if by_name else "files"
    return Material(name, train, held, kind, skipped)


@dataclass(frozen=True, slots=True)
class Splits:
    """Reads the splits of a data set below `root`.

    `by_name`: pictures stand for themselves by their files' names and need not be there, as for precomputed regions.
    """

    root: Path
    settings: Settings
    task: Task
    karpathy: str = ""
    by_name: bool = False

    def read(self, splits: Sequence[str], limit: int | None, missing: list[SkippedItem]) -> Iterator[Sample]:
        """The samples of the first `limit` pictures (or questions) of each split; `missing` takes what is not there."""
        for split in splits:
            for item in self._read_questions(split, limit) if self.task == "vqa" else self._read_captions(split, limit):
                if isinstance(item, SkippedItem):
                    missing.append(item)
                else:
                    yield item

    def _read_captions(self, split: str, limit: int | None) -> Iterator[Sample | SkippedItem]:
        """A sample for each caption of a COCO split."""
        from training.vlp_data import Sample

        listing = find_annotations(self.root, split, self.karpathy)
        for item in islice(list_captions(listing) if self.by_name else self._find_captions(split), limit):
            if isinstance(item, SkippedItem):
                yield item
            else:
                yield from (Sample(item[0], text.strip()) for text in item[1] if text.strip())

    def _find_captions(self, split: str) -> Iterator[tuple[str, tuple[str, ...]] | SkippedItem]:
        from producer.coco import read_coco

        karpathy = self.root / self.karpathy if self.karpathy else None
        for image in read_coco(self.root, self.settings, split, karpathy):
            yield (image.ref.path, image.reference_texts) if isinstance(image, FoundImage) else image

    def _read_questions(self, split: str, limit: int | None) -> Iterator[Sample | SkippedItem]:
        """A sample for each question of a VQA v2 split."""
        from producer.vqa import read_vqa
        from training.vlp_data import Sample

        for found in read_vqa(self.root, split, limit, self.by_name):
            yield found if isinstance(found, SkippedItem) else Sample(found.path, found.text, found.answers)


def find_annotations(root: Path, split: str, karpathy: str) -> Listing:
    """The annotation file of a split. Raises BadCall naming the one that is not there."""
    from producer.coco import find_listing

    file = root / karpathy if karpathy else None
    listing = find_listing(root, split, file) if file is None or file.is_file() else None
    if listing is None:
        name = karpathy or f"coco2017/annotations/captions_{split}.json"
        raise BadCall(f"{name} is not in the folder of the data set", DATA_REMEDY)
    return listing


def list_captions(listing: Listing) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The pictures that an annotation file names, each with its captions; nothing else is looked at."""
    from producer.coco import SCHEMA, collect_captions, iter_entries, read_entry
    from producer.index import open_temporary

    with closing(open_temporary(SCHEMA)) as memory:
        collect_captions(listing, memory)
        for listed in filter(None, map(read_entry, iter_entries(listing, "images"))):
            is_wanted = not listing.splits or not listed.split or listed.split in listing.splits
            if is_wanted and memory.execute("INSERT OR IGNORE INTO seen VALUES (?)", (listed.name,)).rowcount:
                rows = memory.execute("SELECT caption FROM captions WHERE image = ? ORDER BY rowid", (listed.key,))
                yield listed.name, listed.captions or tuple(caption for (caption,) in rows if listed.key)
