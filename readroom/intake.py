"""From a command line to a submission: which checkpoint, which settings, which producer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing, SettingsError
from readroom.records import FAMILIES, FoundImage, GenerationSettings, JobKind, Priority, SkippedItem, SubmissionCounts
from readroom.settings import PREFIX, Settings

if TYPE_CHECKING:
    from db.checkpoints import CheckpointRecord
    from db.session import Store
    from db.submissions import PlannedCaptioner, SubmissionPlan
    from models.checkpoint import CheckpointSource

# What is taken where neither command, setting nor registry names a checkpoint. There is no VLP on any hub.
PUBLISHED = {
    ("blip", JobKind.CAPTION): "Salesforce/blip-image-captioning-base",
    ("blip", JobKind.ANSWER): "Salesforce/blip-vqa-base",
}
# BLIP answers with other weights than it captions with, and its setting names the captioner. One VLP can do both.
SETTINGS_NAME_CAPTIONERS_ONLY = frozenset({"blip"})

# Left out by policy: the export is fine, these are just not what is drafted. Everything else names damage or a
# refusal that somebody should look at, and makes `enqueue` end with exit status 1.
EXPECTED_REASONS = frozenset(
    {
        "not_dicom",
        "not_image",
        "other_modality",
        "for_processing",
        "secondary_capture",
        "burned_in",
        "not_chest",
        "duplicate",
    }
)


@dataclass(frozen=True, slots=True)
class Intake:
    """What one `enqueue` was asked: `source_kind` is pacs, coco, mimic or images; `options` belong to that producer.

    Each image is captioned by each of the `captioners`, which are families.
    """

    source_kind: str
    path: Path
    priority: Priority
    captioners: tuple[str, ...] = FAMILIES[:1]
    model: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    dry_run: bool = False


def run_intake(
    settings: Settings, intake: Intake, report: Callable[[str, int], None] | None = None
) -> SubmissionCounts:
    """Enqueue one source; `report(event, items)` hears how far it is.

    Raises BadCall when the path does not exist, BrokerError and StoreError when these do not answer.
    """
    if not intake.path.exists():
        raise BadCall(f"nothing stands at {intake.path}", "Give the folder, archive or file to enqueue.")
    with opened_store(settings) as store:
        return submit_intake(settings, store, intake, report)


def submit_intake(
    settings: Settings, store: Store, intake: Intake, report: Callable[[str, int], None] | None
) -> SubmissionCounts:
    """Scan, commit the rows, publish the ids."""
    from producer.enqueue import enqueue
    from readroom.broker import broker_url
    from readroom.messages import queue_names
    from readroom.transport import make_celery, publish, queue_depths

    plan = plan_submission(settings, store, intake)
    app = None if intake.dry_run else make_celery(settings, broker_url(settings, start=True))

    def publish_ids(kind: JobKind, priority: Priority, ids: list[int]) -> int:
        return publish(app, kind, priority, ids, settings.ids_per_message)

    def measure_depth() -> int:
        # Only the queues that this submission fills: an urgent one must not wait for a backlog of the bulk queue.
        return sum(queue_depths(app, queue_names(plan.kinds, [plan.priority])).values())

    return enqueue(
        settings,
        store,
        scan_source(settings, intake),
        plan,
        publish=publish_ids,
        depth=measure_depth,
        progress=report,
        dry_run=intake.dry_run,
    )


def plan_submission(settings: Settings, store: Store, intake: Intake) -> SubmissionPlan:
    """The submission as it is remembered: checkpoints and generation settings are fixed here, once.

    In whatever order the captioners were named, it is the same plan.
    """
    from db.submissions import SubmissionPlan

    families = [family for family in FAMILIES if family in intake.captioners]
    check_model(intake.model, families)
    return SubmissionPlan(
        source_kind=intake.source_kind,
        source=str(intake.path.resolve()),
        priority=intake.priority,
        captioners=tuple(plan_captioner(settings, store, family, intake) for family in families),
        kinds=(JobKind.CAPTION,),
        options=dict(intake.options),
    )


def plan_captioner(settings: Settings, store: Store, family: str, intake: Intake) -> PlannedCaptioner:
    """A family with the checkpoint and the settings that it captions with in this submission."""
    from db.submissions import PlannedCaptioner

    source = choose_checkpoint(settings, store, family, intake.model, remember=not intake.dry_run)
    return PlannedCaptioner(family, source.ref, choose_generation(settings, source))


def check_model(model: str | None, families: Sequence[str]) -> None:
    """Raise BadCall for a `--model` that several captioners cannot share."""
    from models.checkpoint import BUNDLED, is_dummy

    if model and len(families) > 1 and not (model == BUNDLED or is_dummy(model)):
        raise BadCall(
            f"--model names one checkpoint, and there are {len(families)} captioners",
            f"Set {' and '.join(map(name_variable, families))}, or give `--model {BUNDLED}` to try them.",
        )


def choose_checkpoint(
    settings: Settings,
    store: Store | None,
    family: str,
    model: str | None,
    remember: bool,
    kind: JobKind = JobKind.CAPTION,
) -> CheckpointSource:
    """As `look_up_checkpoint`; hub checkpoints by the commit, where it can be told.

    `remember` puts it into the registry, where workers find it by its ref.
    """
    from readroom.registry import pin_checkpoint, record_source

    source = pin_checkpoint(look_up_checkpoint(settings, store, family, model, kind))
    if remember and store is not None:
        record_source(store, source)
    return source


def look_up_checkpoint(
    settings: Settings, store: Store | None, family: str, model: str | None, kind: JobKind = JobKind.CAPTION
) -> CheckpointSource:
    """The checkpoint by name: the command's, the setting's, the registry's active one, else the published one.

    Names are looked up in the registry first; `store` None means there is none. Touches no network.
    Raises CheckpointMissing or CheckpointBroken, also when the registered folder holds another checkpoint by now, and
    BadCall when it is of another family.
    """
    found = find_checkpoint_source(store, family, name_checkpoint(settings, family, model, kind), kind)
    if found.family not in (family, "dummy"):
        raise BadCall(
            f"checkpoint {found.name} is of the family {found.family}, and {family} was asked for",
            f"Name a {family.upper()} checkpoint with --model or {name_variable(family)}.",
        )
    found.check_task(kind)
    return found


def name_checkpoint(settings: Settings, family: str, model: str | None, kind: JobKind) -> str | None:
    """The name that the command or the setting gives, `bundled` with its family; None when neither does."""
    from models.checkpoint import BUNDLED, name_bundled

    is_served = kind is JobKind.CAPTION or family not in SETTINGS_NAME_CAPTIONERS_ONLY
    name = model or (settings.name_model(family) if is_served else None)
    return name_bundled(family) if name == BUNDLED else name


def name_variable(family: str) -> str:
    """The variable that names a family's captioner."""
    return f"{PREFIX}{family.upper()}_MODEL"


def find_checkpoint_source(store: Store | None, family: str, name: str | None, kind: JobKind) -> CheckpointSource:
    """What `look_up_checkpoint` finds, whatever its family turns out to be."""
    from models.checkpoint import is_bundled, resolve_checkpoint

    known = find_registered(store, family, name, kind) if store is not None else None
    if known is None:
        return resolve_checkpoint(name or name_published(family, kind), family)
    found = resolve_checkpoint(known.location, known.family)
    if found.ref == known.ref:
        return replace(found, name=known.name, family=known.family)
    if name and is_bundled(name):  # another release of Readroom brought another one
        return resolve_checkpoint(name)
    raise CheckpointBroken(
        f"the folder of checkpoint {known.name} holds another one by now", "Add it again: readroom checkpoints add"
    )


def is_chosen(settings: Settings, store: Store | None, family: str) -> bool:
    """Whether there is a captioner of the family to look up when a command names none."""
    from db.checkpoints import active_checkpoint

    active = active_checkpoint(store, family) if store is not None else None
    return bool(active or settings.name_model(family) or (family, JobKind.CAPTION) in PUBLISHED)


def name_published(family: str, kind: JobKind) -> str:
    """The checkpoint that a family's authors published. Raises CheckpointMissing where nobody can fetch any."""
    published = PUBLISHED.get((family, kind))
    if published is None:
        raise CheckpointMissing(
            f"no {family.upper()} checkpoint was chosen, and there is none on the hub",
            f"Set {name_variable(family)}, or run `readroom checkpoints add FOLDER --activate`. To try it: "
            "`--model bundled`, a small one that knows drawn phantoms only.",
        )
    return published


def find_registered(store: Store, family: str, name: str | None, kind: JobKind) -> CheckpointRecord | None:
    """The registered checkpoint of that name, without a name the active one of the family; None when none is."""
    from db.checkpoints import active_checkpoint, find_checkpoint

    if name:
        return find_checkpoint(store, name)
    active = active_checkpoint(store, family)
    if active is not None and (kind is JobKind.CAPTION or kind in active.manifest.get("task", "").split("+")):
        return active
    published = PUBLISHED.get((family, kind))
    return find_checkpoint(store, published) if published else None


@contextmanager
def opened_store(settings: Settings) -> Iterator[Store]:
    """The store of these settings, made where it does not exist, closed afterwards."""
    from db.session import open_store, store_url

    prepare_home(settings)
    with closing(open_store(store_url(settings))) as store:
        yield store


@contextmanager
def existing_store(settings: Settings) -> Iterator[Store | None]:
    """The store of these settings; None, and nothing is made, where it is an SQLite file that does not exist."""
    from db.session import SQLITE_NAME, open_store, store_url

    if settings.database_url is None and not (settings.home_dir / SQLITE_NAME).exists():
        yield None
        return
    with closing(open_store(store_url(settings))) as store:
        yield store


def choose_generation(settings: Settings, source: CheckpointSource) -> GenerationSettings:
    """The checkpoint's own generation settings, with what READROOM_NUM_BEAMS and _MAX_NEW_TOKENS change."""
    from models.checkpoint import adjust_settings

    return adjust_settings(
        source.caption_defaults, num_beams=settings.num_beams, max_new_tokens=settings.max_new_tokens
    )


def scan_source(settings: Settings, intake: Intake) -> Iterator[FoundImage | SkippedItem]:
    """The producer of this kind of source, started."""
    options = dict(intake.options)
    match intake.source_kind:
        case "pacs":
            from producer.pacs import scan_export

            return scan_export(intake.path, settings, keep=not intake.dry_run)
        case "coco":
            from producer.coco import read_coco

            karpathy = options.get("karpathy")
            return read_coco(intake.path, settings, options["split"], Path(karpathy) if karpathy else None)
        case "mimic":
            from producer.mimic import scan_mimic

            return scan_mimic(intake.path, settings, **options)
        case "images":
            from producer.images import scan_images

            return scan_images(intake.path, settings)
    raise BadCall(f"no producer reads {intake.source_kind}")


def damaged_items(skipped: Iterable[SkippedItem]) -> list[SkippedItem]:
    """The skipped items that somebody should look at (not those left out by policy)."""
    return [item for item in skipped if item.reason not in EXPECTED_REASONS]


def prepare_home(settings: Settings) -> Path:
    """Make the home folder, closed to other users: store, spool and logs below it hold patients' data."""
    home = settings.home_dir
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(f"READROOM_HOME cannot be made ({error.strerror})", "Name a folder of yours.") from None
    if not os.access(home, os.W_OK | os.X_OK):
        raise SettingsError("READROOM_HOME cannot be written", "Name a folder of yours.")
    return home
