"""A recipe file of `readroom train vlp`: what is learned, how, and from which start. TOML, one table a dataclass."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from readroom.errors import BadCall

T = TypeVar("T")
TASKS = ("caption", "vqa")
PRECISIONS = ("float32", "bfloat16")
CONFIGS = Path(__file__).parent / "configs"
RECIPE_REMEDY = "training/configs/ holds recipes to start from."


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Splits to learn from and to validate with; with none of those, `held_out` of the pictures are kept back.

    `karpathy` names an annotation file in Karpathy's format below the data root, whose splits are then meant.
    `validation_examples` are used at most, `phantoms` pictures are drawn where phantoms are asked for.
    """

    train: tuple[str, ...] = ("train2017",)
    validation: tuple[str, ...] = ("val2017",)
    karpathy: str = ""
    held_out: float = 0.02
    validation_examples: int = 5000
    phantoms: int = 2000


@dataclass(frozen=True, slots=True)
class ObjectivePlan:
    """How texts are masked and losses made (SPEC section 7): `s2s` is the share of seq2seq samples."""

    s2s: float = 1.0
    mask_share: float = 0.15
    mask_most: int = 3
    smoothing: float = 0.0
    drop_worst: float = 0.0


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """The answer head's classes: the `most` frequent answers, "<unk>" counted in, given `least` times or more."""

    most: int = 3129
    least: int = 9


@dataclass(frozen=True, slots=True)
class OptimiserPlan:
    """BertAdam. A batch of `batch_size` runs in passes of `forward_size` at most, whose gradients are averaged.

    `backbone_rate` 0 leaves the region network as it is.
    """

    batch_size: int = 512
    forward_size: int = 64
    learning_rate: float = 3e-5
    backbone_rate: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-6
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class FreshPlan:
    """A model that starts from no VLP: `sizes` are fields of VlpConfig.

    `bert` (a folder or hub id) gives weights and vocabulary, `vocabulary` (a file or checkpoint) tokens alone.
    `glorot` starts linear layers by Glorot's rule: BERT's deviation of 0.02 is meant for width 768, and a small model
    stands still with it.
    """

    bert: str = ""
    vocabulary: str = ""
    glorot: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """Where a fresh model's regions come from: a provider, and a table for each with what it needs.

    `grid` and `detector`: `network` (a folder, `bundled:blip` or a hub id), and where it does not tell itself
    `image_size`, `mean`, `std`; `detector` also `count`. `precomputed`: the sizes and the layout of the features.
    """

    provider: str = "grid"
    grid: dict[str, Any] = field(default_factory=dict)
    detector: dict[str, Any] = field(default_factory=dict)
    precomputed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe, for the task `caption` or `vqa`. Without `model` and `regions` it can start at a VLP only."""

    task: str = "caption"
    seed: int = 42
    epochs: int = 30
    precision: str = "float32"
    workers: int = 4
    data: DataPlan = field(default_factory=DataPlan)
    objective: ObjectivePlan = field(default_factory=ObjectivePlan)
    answers: AnswerPlan = field(default_factory=AnswerPlan)
    optimiser: OptimiserPlan = field(default_factory=OptimiserPlan)
    model: FreshPlan | None = None
    regions: RegionPlan | None = None
    generation: dict[str, Any] = field(default_factory=dict)


TABLES: dict[str, type] = {
    "data": DataPlan,
    "objective": ObjectivePlan,
    "answers": AnswerPlan,
    "optimiser": OptimiserPlan,
    "model": FreshPlan,
    "regions": RegionPlan,
}


def read_recipe(path: Path) -> Recipe:
    """A recipe from its file. Raises BadCall naming what is wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadCall(f"there is no recipe {path.name} there", RECIPE_REMEDY) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadCall(f"{path.name} is not TOML: {error}", RECIPE_REMEDY) from None
    given = {name: document.pop(name) for name in TABLES if name in document}
    tables: dict[str, Any] = {name: fill_table(TABLES[name], name, table) for name, table in given.items()}
    recipe = fill_table(Recipe, "", document)
    return check_recipe(replace(recipe, **tables))


def fill_table(kind: type[T], table: str, document: Any) -> T:
    """One table as its dataclass. Raises BadCall naming an unknown or wrong key."""
    if not isinstance(document, Mapping):
        raise BadCall(f"the recipe's [{table}] is no table", RECIPE_REMEDY)
    known: dict[str, Field[Any]] = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    types = get_type_hints(kind)
    for key, value in document.items():
        place = f"[{table}] {key}" if table else key
        if key not in known or (not table and key in TABLES):
            raise BadCall(f"a recipe has no {place}", f"There are: {', '.join(known)}.")
        if not is_of_type(value, types[key], known[key]):
            raise BadCall(f"the recipe's {place} is of the wrong kind", RECIPE_REMEDY)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in document.items()})


def is_of_type(value: Any, wanted: Any, item: Field[Any]) -> bool:
    """Whether a TOML value can stand for a field; whole numbers can stand for fractions."""
    default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc, operator]
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list) and all(is_alike(one, default[0]) for one in value)
    return is_alike(value, default)


def is_alike(value: Any, default: Any) -> bool:
    """Whether two values are of one type; whole numbers can stand for fractions."""
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


def check_recipe(recipe: Recipe) -> Recipe:
    """The recipe, when its numbers can be used. Raises BadCall naming the one that cannot."""
    shares = {
        "[objective] s2s": recipe.objective.s2s,
        "[objective] mask_share": recipe.objective.mask_share,
        "[objective] smoothing": recipe.objective.smoothing,
        "[objective] drop_worst": recipe.objective.drop_worst,
        "[optimiser] warmup": recipe.optimiser.warmup,
        "[data] held_out": recipe.data.held_out,
    }
    counts = {
        "epochs": recipe.epochs,
        "[optimiser] batch_size": recipe.optimiser.batch_size,
        "[optimiser] forward_size": recipe.optimiser.forward_size,
        "[data] validation_examples": recipe.data.validation_examples,
        "[data] phantoms": recipe.data.phantoms,
        "[answers] least": recipe.answers.least,
        "[objective] mask_most": recipe.objective.mask_most,
    }
    rates = {
        "[optimiser] learning_rate": recipe.optimiser.learning_rate,
        "[optimiser] eps": recipe.optimiser.eps,
    }
    wrong = [name for name, share in shares.items() if not 0 <= share <= 1]
    wrong += [name for name, count in counts.items() if count < 1]
    wrong += [name for name, rate in rates.items() if not 0 < rate < math.inf]
    wrong += ["[optimiser] backbone_rate"] if not 0 <= recipe.optimiser.backbone_rate < math.inf else []
    wrong += ["[data] train"] if not recipe.data.train else []
    wrong += ["precision"] if recipe.precision not in PRECISIONS else []
    wrong += ["seed"] if recipe.seed < 0 else []
    wrong += ["[optimiser] warmup"] if recipe.optimiser.warmup == 0 else []
    wrong += ["[objective] drop_worst"] if recipe.objective.drop_worst == 1 else []
    wrong += ["[optimiser] betas"] if len(recipe.optimiser.betas) != 2 else []
    wrong += ["[answers] most"] if recipe.answers.most < 2 else []
    wrong += ["task"] if recipe.task not in TASKS else []
    wrong += ["workers"] if recipe.workers < 0 else []
    if wrong:
        raise BadCall(f"the recipe's {wrong[0]} is out of range", RECIPE_REMEDY)
    return recipe
