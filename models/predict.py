"""Pictures in, texts out: what inference.py, `readroom caption` and tests call. A list gives a list, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.base import Answerer, Captioner, ItemReader, Model, Picture, run_answerer, run_captioner
from models.checkpoint import adjust_settings
from models.load import load_answerer, load_captioner
from models.pixels import render_array, render_file, render_pil, to_model_input
from readroom.errors import BadCall, ItemError
from readroom.records import GeneratedText, GenerationSettings, ImageRef

ImageLike = str | PathLike[str] | Image.Image | npt.NDArray[Any]
Loaded = TypeVar("Loaded")

# Models this process keeps. Two: a captioner and an answerer of BLIP base are 0.9 and 1.5 GB in float32.
KEPT_MODELS = 2
_loading = Lock()


@overload
def caption_images(
    images: Sequence[ImageLike],
    captioner: Captioner,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    errors: Literal["raise"] = "raise",
) -> list[GeneratedText]: ...
@overload
def caption_images(
    images: Sequence[ImageLike],
    captioner: Captioner,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    *,
    errors: Literal["return"],
) -> list[GeneratedText | ItemError]: ...
def caption_images(
    images: Sequence[ImageLike],
    captioner: Captioner,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    errors: str = "raise",
) -> Any:
    """Caption pictures: paths (DICOM too), PIL images or arrays. `settings` None means the captioner's defaults.

    `errors="return"` puts an ItemError in the place of each picture that cannot be had; `"raise"` captions nothing
    further after the last picture was tried and raises one ItemError that names the bad ones by number, from 0.
    """

    def run(pictures: list[Picture], _: list[int]) -> list[GeneratedText]:
        return run_captioner(captioner, pictures, settings)

    return _run_batches(images, captioner, run, batch_size, errors)


@overload
def answer_images(
    images: Sequence[ImageLike],
    questions: Sequence[str],
    answerer: Answerer,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    errors: Literal["raise"] = "raise",
) -> list[GeneratedText]: ...
@overload
def answer_images(
    images: Sequence[ImageLike],
    questions: Sequence[str],
    answerer: Answerer,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    *,
    errors: Literal["return"],
) -> list[GeneratedText | ItemError]: ...
def answer_images(
    images: Sequence[ImageLike],
    questions: Sequence[str],
    answerer: Answerer,
    settings: GenerationSettings | None = None,
    batch_size: int = 16,
    errors: str = "raise",
) -> Any:
    """Answer one question a picture; otherwise as `caption_images`. Raises BadCall when the lists differ in length."""
    if len(images) != len(questions):
        raise BadCall(f"{len(images)} pictures but {len(questions)} questions")

    def run(pictures: list[Picture], numbers: list[int]) -> list[GeneratedText]:
        return run_answerer(answerer, pictures, [questions[number] for number in numbers], settings)

    return _run_batches(images, answerer, run, batch_size, errors)


def load_picture(image: ImageLike, profile: str, size: int, reader: ItemReader | None = None) -> Picture:
    """The picture a model sees, uint8 (size, size, 3), or what its `reader` reads in the picture's place.

    Raises ImageError, or BadCall for another kind of thing.
    """
    if reader is not None:
        return _read_features(image, reader)
    if isinstance(image, str | PathLike):
        return render_file(image, profile=profile, size=size)
    if isinstance(image, Image.Image):
        return to_model_input(render_pil(image), size)
    if isinstance(image, np.ndarray):
        return to_model_input(render_array(image), size)
    raise BadCall(f"an image is a path, a PIL image or an array, not {type(image).__name__}")


def _read_features(image: ImageLike, reader: ItemReader) -> Picture:
    if not isinstance(image, str | PathLike):
        raise BadCall("this checkpoint reads region features by file name: give a path")
    features: Picture = reader.read(ImageRef(os.fspath(image)))
    return features


def caption(
    image: Any,
    model: str,
    device: str = "auto",
    precision: str = "float32",
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    region_dir: Path | None = None,
) -> Any:
    """The caption of an image, or the captions of a list of images, as plain strings.

    `num_beams` and `max_new_tokens` None mean what the checkpoint was made for. `region_dir` as for `load_captioner`.
    """
    captioner = get_captioner(model, device, precision, region_dir)
    settings = adjust_settings(captioner.defaults, num_beams=num_beams, max_new_tokens=max_new_tokens)
    if isinstance(image, list | tuple):
        return [found.text for found in caption_images(image, captioner, settings)]
    return run_captioner(captioner, [_see_image(image, captioner)], settings)[0].text


def answer(
    image: Any,
    question: str | Sequence[str],
    model: str,
    device: str = "auto",
    precision: str = "float32",
    region_dir: Path | None = None,
) -> Any:
    """The answer to a question about an image; lists of images, of questions or of both give a list."""
    answerer = get_answerer(model, device, precision, region_dir)
    images, questions = _pair_up(image, question)
    if isinstance(image, list | tuple) or not isinstance(question, str):
        return [found.text for found in answer_images(images, questions, answerer)]
    return run_answerer(answerer, [_see_image(image, answerer)], questions)[0].text


def get_captioner(
    name: str, device: str = "auto", precision: str = "float32", region_dir: Path | None = None
) -> Captioner:
    """A captioner by name, loaded once a process and kept (the two used last of each kind)."""
    with _loading:
        return _load_captioner(name, device, precision, region_dir)


def get_answerer(
    name: str, device: str = "auto", precision: str = "float32", region_dir: Path | None = None
) -> Answerer:
    """An answerer by name; as `get_captioner`."""
    with _loading:
        return _load_answerer(name, device, precision, region_dir)


@lru_cache(maxsize=KEPT_MODELS)
def _load_captioner(name: str, device: str, precision: str, region_dir: Path | None) -> Captioner:
    return load_captioner(name, device, precision, region_dir)


@lru_cache(maxsize=KEPT_MODELS)
def _load_answerer(name: str, device: str, precision: str, region_dir: Path | None) -> Answerer:
    return load_answerer(name, device, precision, region_dir)


def _pair_up(image: Any, question: str | Sequence[str]) -> tuple[list[ImageLike], list[str]]:
    images = list(image) if isinstance(image, list | tuple) else [image]
    questions = [question] if isinstance(question, str) else list(question)
    if len(questions) == 1:
        questions *= len(images)
    if len(images) == 1:
        images *= len(questions)
    return images, questions


def _run_batches(
    images: Sequence[ImageLike],
    model: Model,
    run: Callable[[list[Picture], list[int]], list[GeneratedText]],
    batch_size: int,
    errors: str,
) -> list[GeneratedText | ItemError]:
    # Only one batch of pictures is in memory at a time.
    if errors not in ("raise", "return") or batch_size < 1:
        raise BadCall("errors must be 'raise' or 'return', and batch_size 1 or more")
    found: dict[int, GeneratedText | ItemError] = {}
    numbers = iter(range(len(images)))
    while group := list(islice(numbers, batch_size)):
        pictures = _load_group(images, group, model, found)
        good = list(pictures)
        if good and not (errors == "raise" and _count_errors(found)):
            found.update(zip(good, run(list(pictures.values()), good), strict=True))
    if errors == "raise":
        _raise_bad(found, len(images))
    return [found[number] for number in range(len(images))]


def _load_group(
    images: Sequence[ImageLike], group: list[int], model: Model, found: dict[int, GeneratedText | ItemError]
) -> dict[int, Picture]:
    pictures = {}
    for number in group:
        try:
            pictures[number] = _see_image(images[number], model)
        except ItemError as error:
            found[number] = error
    return pictures


def _see_image(image: ImageLike, model: Model) -> Picture:
    return load_picture(image, model.profile, model.image_size, model.reader)


def _count_errors(found: dict[int, GeneratedText | ItemError]) -> int:
    return sum(isinstance(outcome, ItemError) for outcome in found.values())


def _raise_bad(found: dict[int, GeneratedText | ItemError], count: int) -> None:
    bad = {number: outcome for number, outcome in found.items() if isinstance(outcome, ItemError)}
    if bad:
        named = ", ".join(f"{number} ({error.reason})" for number, error in sorted(bad.items()))
        raise ItemError(next(iter(bad.values())).reason, f"{len(bad)} of {count} images cannot be used: {named}")
