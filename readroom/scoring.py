"""Scores of models side by side: the command `evaluate`, which evaluate.py calls too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from readroom.errors import BadCall
from readroom.intake import choose_checkpoint, choose_generation, damaged_items, existing_store
from readroom.records import FoundImage, GenerationSettings, JobKind, SkippedItem
from readroom.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

    from models.checkpoint import CheckpointSource
    from training.evaluation import Subject
    from training.intervals import Score
    from training.predictions import Item, Prediction

DATASETS = ("phantoms", "coco", "vqa")
SPLITS = {"coco": "val2017", "vqa": "val2014"}
# What is asked of a model, and which of its checkpoints is looked up for it.
TASKS = {"phantoms": ("caption", "answer"), "coco": ("caption",), "vqa": ("answer",)}
FLOOR = "floor"  # the column of what needs no look at the picture
NOT_SCORED = "-"
BEGIN, END = "<!-- scores: written by the command below -->", "<!-- end of scores -->"

Report = Callable[[str, int, int], None]
"""Hears which model has done how many of how many items."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is evaluated: families, on what. `checkpoints` is empty, one name for all, or one for each family.

    `limit` is the number of items at most; of phantoms, of films and of scenes. `split` None means the usual one.
    """

    families: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()
    dataset: str = DATASETS[0]
    data_dir: Path | None = None
    split: str | None = None
    limit: int | None = None
    batch_size: int = 32

    @property
    def split_name(self) -> str:
        """The split that is meant; phantoms have none."""
        return self.split or SPLITS.get(self.dataset, "")


@dataclass(frozen=True, slots=True)
class Column:
    """One model: `label` heads its column, `checkpoint` is its ref, `settings` how it captioned."""

    label: str
    name: str
    checkpoint: str
    settings: GenerationSettings
    scores: dict[str, Score]
    predictions: list[Prediction]


@dataclass(frozen=True, slots=True)
class Scoreboard:
    """Models side by side. `protocol` says on what, `floor` scores what needs no look, `skipped` was left out."""

    evaluation: Evaluation
    protocol: dict[str, Any]
    columns: tuple[Column, ...]
    floor: dict[str, Score]
    skipped: tuple[SkippedItem, ...]

    def as_json(self) -> dict[str, Any]:
        """One JSON document."""
        return {
            "protocol": self.protocol,
            "models": [_describe_column(column) for column in self.columns],
            "floor": {name: score.as_json() for name, score in self.floor.items()},
            "skipped": [asdict(item) for item in self.skipped],
        }

    def list_failed(self) -> list[str]:
        """What was to be scored and could not be read, a line each."""
        failed = {one.picture: one.error for column in self.columns for one in column.predictions if one.error}
        missing = [f"{item.item}: {item.reason}" for item in damaged_items(self.skipped)]
        return missing + [f"{picture}: {error}" for picture, error in failed.items()]


def _describe_column(column: Column) -> dict[str, Any]:
    return {
        "model": column.label,
        "name": column.name,
        "checkpoint": column.checkpoint,
        "generation": asdict(column.settings),
        "failed": sum(bool(one.error) for one in column.predictions),
        "scores": {name: score.as_json() for name, score in column.scores.items()},
    }


# Running -------------------------------------------------------------------------------------------------------------


def run_evaluation(settings: Settings, evaluation: Evaluation, report: Report | None = None) -> Scoreboard:
    """Run each model on the same items and score what it says.

    Every checkpoint is looked up before the first one runs. Raises BadCall, CheckpointMissing, CheckpointBroken.
    """
    sources = choose_sources(settings, evaluation)
    items, skipped = read_items(settings, evaluation)
    labels = name_columns(evaluation)
    columns = [
        evaluate_source(settings, evaluation, label, source, items, report)
        for label, source in zip(labels, sources, strict=True)
    ]
    return Scoreboard(
        evaluation, describe_protocol(evaluation, columns), tuple(columns), score_floor(evaluation, columns), skipped
    )


def choose_sources(settings: Settings, evaluation: Evaluation) -> list[CheckpointSource]:
    """The checkpoint of each family: the one that is named, the setting's, on phantoms the bundled one."""
    names: Sequence[str | None] = evaluation.checkpoints or [None]
    if len(names) not in (1, len(evaluation.families)):
        raise BadCall(
            f"{len(names)} checkpoints for {len(evaluation.families)} models", "Give one for all, or one for each."
        )
    names = list(names) * len(evaluation.families) if len(names) == 1 else names
    kind = JobKind(TASKS[evaluation.dataset][0])
    with existing_store(settings) as store:
        return [
            choose_checkpoint(settings, store, family, name or name_default(settings, evaluation, family), False, kind)
            for family, name in zip(evaluation.families, names, strict=True)
        ]


def name_default(settings: Settings, evaluation: Evaluation, family: str) -> str | None:
    """Phantoms are what the bundled checkpoints were made for; on real data these are never taken unasked."""
    from models.checkpoint import name_bundled

    is_toy = evaluation.dataset == "phantoms" and not settings.name_model(family)
    return name_bundled(family) if is_toy else None


def name_columns(evaluation: Evaluation) -> list[str]:
    """The families, numbered where one is there twice."""
    families = evaluation.families
    if len(set(families)) == len(families):
        return list(families)
    return [f"{family} {families[: place + 1].count(family)}" for place, family in enumerate(families)]


def evaluate_source(
    settings: Settings,
    evaluation: Evaluation,
    label: str,
    source: CheckpointSource,
    items: Sequence[Item],
    report: Report | None,
) -> Column:
    """Load one checkpoint, run it, score it."""
    from training.evaluation import load_subject, predict_items

    generation = choose_generation(settings, source)
    tasks = TASKS[evaluation.dataset]
    subject = load_subject(source, settings.device, settings.precision, settings.region_dir, generation, tasks)
    asked = items or list_held_out(subject, evaluation)
    tell = (lambda done, total: report(label, done, total)) if report else None
    predictions = predict_items(subject, asked, evaluation.batch_size, tell)
    scores = score_predictions(evaluation.dataset, predictions)
    return Column(label, source.name, subject.model.checkpoint, generation, scores, predictions)


def list_held_out(subject: Subject, evaluation: Evaluation) -> list[Item]:
    """Phantoms as this model sees them."""
    from training.evaluation import HELD_OUT, list_phantoms

    count = evaluation.limit or HELD_OUT
    return list_phantoms(subject, count, count)


def score_predictions(dataset: str, predictions: Sequence[Prediction]) -> dict[str, Score]:
    """The scores of a data set; nothing but the predictions enters them."""
    from training.intervals import measure_tallies
    from training.metrics import score_answer, tally_captions
    from training.phantom_scores import score_phantoms, tally_by_group

    said = [one for one in predictions if not one.error]
    if not said:
        raise BadCall("not one item could be scored", "Look at the data set: none of its images can be read.")
    if dataset == "coco":
        return measure_tallies(tally_captions([one.text for one in said], [one.references for one in said]))
    if dataset == "vqa":
        return measure_tallies(tally_by_group(said, [score_answer(one.text, one.references) for one in said]))
    return score_phantoms(said)


def score_floor(evaluation: Evaluation, columns: Sequence[Column]) -> dict[str, Score]:
    """What the most frequent text of each group scores on the same phantoms; {} on other data sets."""
    from training.floors import learn_floor, say_floor

    if evaluation.dataset != "phantoms":
        return {}
    asked = max((column.predictions for column in columns), key=len)
    return score_predictions(evaluation.dataset, say_floor(asked, learn_floor()))


def describe_protocol(evaluation: Evaluation, columns: Sequence[Column]) -> dict[str, Any]:
    """All that has to be known to measure the same again, but for the checkpoints."""
    from training import radiographs, scenes
    from training.data import TEST_SEED
    from training.evaluation import HELD_OUT
    from training.floors import QUESTIONS
    from training.intervals import RESAMPLES, SEED
    from training.metrics import WORDS_VERSION
    from training.questions import QUESTIONS_VERSION

    interval = {"interval": "95 %, percentile bootstrap over pictures", "resamples": RESAMPLES, "resampling_seed": SEED}
    if evaluation.dataset == "phantoms":
        count = evaluation.limit or HELD_OUT
        drawn = {"films": count, "scenes": count, "first_seed": TEST_SEED, "questions_a_picture": QUESTIONS}
        versions = [radiographs.GENERATOR_VERSION, scenes.GENERATOR_VERSION, QUESTIONS_VERSION]
        return {"dataset": "phantoms", **drawn, "generators": versions, **interval}
    items = max(len(column.predictions) for column in columns)
    words = {"words": WORDS_VERSION} if evaluation.dataset == "coco" else {}
    return {"dataset": evaluation.dataset, "split": evaluation.split_name, "items": items, **words, **interval}


# Data sets -----------------------------------------------------------------------------------------------------------


def read_items(settings: Settings, evaluation: Evaluation) -> tuple[list[Item], tuple[SkippedItem, ...]]:
    """The items of a data set and what was left out; phantoms are drawn for each model's picture size later.

    Raises BadCall when the data set is not there.
    """
    if evaluation.dataset == "phantoms":
        return [], ()
    root = evaluation.data_dir or settings.data_dir
    if root is None:
        raise BadCall("where is the data set?", "Give --data_dir, or set READROOM_DATA_DIR.")
    listers = {"coco": list_coco, "vqa": list_vqa}
    found = list(listers[evaluation.dataset](root, settings, evaluation))
    skipped = tuple(one for one in found if isinstance(one, SkippedItem))
    items = [one for one in found if not isinstance(one, SkippedItem)]
    if not items:
        raise BadCall(f"nothing of the split {evaluation.split_name} can be scored", "Is it the right --split?")
    return items, skipped


def list_coco(root: Path, settings: Settings, evaluation: Evaluation) -> Iterator[Item | SkippedItem]:
    """An item for each image that people captioned."""
    from producer.coco import read_coco
    from training.predictions import Item

    found = take_items(read_coco(root, settings, evaluation.split_name), evaluation.limit)
    for image in found:
        if isinstance(image, FoundImage) and not image.reference_texts:
            raise BadCall(
                "an image has no captions to compare with", "Give a folder with annotations, captions_<split>.json."
            )
        if isinstance(image, FoundImage):
            name = image.source_id or image.item
            yield Item(name, name, image.ref.path, image.reference_texts)
        else:
            yield image


def list_vqa(root: Path, settings: Settings, evaluation: Evaluation) -> Iterator[Item | SkippedItem]:
    """An item for each question."""
    from producer.vqa import read_vqa
    from training.predictions import Item

    for found in read_vqa(root, evaluation.split_name, evaluation.limit):
        if isinstance(found, SkippedItem):
            yield found
        else:
            yield Item(found.question_id, found.image_id, found.path, found.answers, found.kind, found.text)


def take_items(found: Iterable[FoundImage | SkippedItem], limit: int | None) -> Iterator[FoundImage | SkippedItem]:
    """The first `limit` entries, whether their images are there or not; a second run scores the same ones."""
    return islice(found, limit)


def save_predictions(board: Scoreboard, output: Path) -> None:
    """Everything that was said, JSON lines, each with its model, checkpoint and data set."""
    from training.predictions import write_predictions

    with output.open("w", encoding="utf-8") as out:
        for column in board.columns:
            described = {"model": column.label, "checkpoint": column.checkpoint, "dataset": board.protocol["dataset"]}
            write_predictions(column.predictions, out, described)


# Showing -------------------------------------------------------------------------------------------------------------


def list_sections(board: Scoreboard) -> list[tuple[str, list[str]]]:
    """The names of all scores, in sections with their headings."""
    names = list(dict.fromkeys(name for column in board.columns for name in column.scores))
    by_finding = [name for name in names if name.endswith("_f1")]
    by_question = [name for name in names if ":" in name]
    main = [name for name in names if name not in by_finding and name not in by_question]
    sections = [("", main), ("F1 of each finding", by_finding), ("Answers by kind of question", by_question)]
    return [(heading, listed) for heading, listed in sections if listed]


def list_heads(board: Scoreboard) -> list[str]:
    """The heads of the table's columns."""
    return ["score", "n", *(column.label for column in board.columns), *([FLOOR] if board.floor else [])]


def list_cells(board: Scoreboard, name: str) -> list[str]:
    """A row: the score's name, on how many items, and each model's score with its interval."""
    scored = [column.scores.get(name) for column in board.columns]
    counts = dict.fromkeys(str(score.n) for score in scored if score)
    floor = board.floor.get(name)
    floors = [f"{floor.value:.3f}" if floor and floor.n else NOT_SCORED] if board.floor else []
    return [name, "/".join(counts), *map(show_score, scored), *floors]


def show_score(score: Score | None) -> str:
    """`0.953 [0.921, 0.980]`; `-` where there was nothing to score."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" if score and score.n else NOT_SCORED


def render_table(board: Scoreboard) -> Table:
    """The scores for a terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in list_heads(board):
        table.add_column(head, justify="left" if head == "score" else "right", no_wrap=True)
    for heading, names in list_sections(board):
        if heading:
            table.add_row()
            table.add_row(f"[bold]{heading}")
        for name in names:
            cells = list_cells(board, name)
            table.add_row(escape(name.partition(":")[2] or name), *map(escape, cells[1:]))
    return table


def list_notes(board: Scoreboard) -> list[str]:
    """What has to be known to read the scores: on what, of which checkpoints, what the brackets mean."""
    notes = [f"On {describe_items(board)}. In brackets: 95 % intervals."]
    notes += [f"{FLOOR}: the most frequent caption, and answer to that kind of question, in training."] * bool(
        board.floor
    )
    return notes + [f"{column.label}: {column.name}, {column.checkpoint}" for column in board.columns]


def describe_items(board: Scoreboard) -> str:
    """What was scored, in one line."""
    protocol = board.protocol
    if protocol["dataset"] == "phantoms":
        on = f"{protocol['films']} films and {protocol['scenes']} scenes from seed {protocol['first_seed']} on"
        return f"{on}, {protocol['questions_a_picture']} questions each"
    return f"{protocol['dataset']} {protocol['split']}, {protocol['items']} items"


def render_markdown(board: Scoreboard, command: str) -> str:
    """The scores as Markdown, with the command that measured them."""
    lines = ["```bash", command, "```", "", *(f"- {note}" for note in list_notes(board))]
    for heading, names in list_sections(board):
        heads = list_heads(board)
        lines += ["", *([f"{heading}:", ""] if heading else []), _join_row(heads), _join_row(["---"] * len(heads))]
        lines += [_join_row([f"`{cells[0]}`", *cells[1:]]) for cells in (list_cells(board, name) for name in names)]
    return "\n".join(lines) + "\n"


def _join_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def check_places(output: Path | None, page: Path | None) -> None:
    """Raise BadCall before minutes are spent on scores that could not be written."""
    if output is not None and not output.absolute().parent.is_dir():
        raise BadCall("the folder of --output does not exist", "Make it first.")
    if page is not None:
        split_page(page)


def split_page(page: Path) -> tuple[str, str]:
    """What stands before the scores of a page and behind. Raises BadCall when the page or its markers are not there."""
    if not page.is_file():
        raise BadCall("that page does not exist", f"Make one that holds `{BEGIN}` and `{END}`, a line each.")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadCall("that page has no place for scores", f"Put `{BEGIN}` and `{END}` where they belong, a line each.")
    return before, after


def write_markdown(board: Scoreboard, page: Path) -> None:
    """Put the scores between a page's markers. Raises BadCall as `split_page`."""
    before, after = split_page(page)
    scores = render_markdown(board, describe_command(board.evaluation, page))
    page.write_text(f"{before}{BEGIN}\n\n{scores}\n{END}{after}", encoding="utf-8")


def describe_command(evaluation: Evaluation, page: Path) -> str:
    """The command that writes the same page."""
    options = [f"--model {family}" for family in evaluation.families]
    options += [f"--checkpoint {name}" for name in evaluation.checkpoints]
    options += [f"--dataset {evaluation.dataset}"] if evaluation.dataset != DATASETS[0] else []
    options += [f"--split {evaluation.split}"] if evaluation.split else []
    options += [f"--limit {evaluation.limit}"] if evaluation.limit else []
    return " ".join(["python evaluate.py", *options, f"--markdown {page}"])
