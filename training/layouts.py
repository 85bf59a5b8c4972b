"""Phantoms written as the folders people have: a COCO captions set, a PACS export, the MIMIC-CXR trees.

Each function returns what it wrote as records, so that a caller knows the truth without reading it back.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydicom import dcmread
from pydicom.uid import SecondaryCaptureImageStorage

from training.findings import Truth
from training.instances import VIEW_CODES, Visit, make_instance, make_uid, sample_visit, save_instance
from training.phantom_text import ReportText, caption_truth, write_report
from training.radiographs import draw_radiograph
from training.scenes import draw_scene

Record = dict[str, Any]

# Every layout draws from its own seeds, none of which training ever sees (training/data.py starts at 0, 5 and 9 M).
FIRST_SEED = 20_000_000
SEEDS_PER_LAYOUT = 100_000
ACCEPTED = "accepted"
CHEXPERT_COLUMNS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip


def _seed_of(seed: int, index: int) -> int:
    return FIRST_SEED + seed * SEEDS_PER_LAYOUT + index


def _describe_film(truth: Truth) -> Record:
    findings = [{k: v for k, v in asdict(finding).items() if v} for finding in truth.findings]
    return {"view": truth.view, "caption": caption_truth(truth), "ctr": round(truth.ctr, 3), "findings": findings}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    return content.getvalue()


# --- COCO -------------------------------------------------------------------------------------------------------


def write_coco(out: Path, count: int, seed: int, split: str = "val2017") -> list[Record]:
    """Write `count` scenes as `<out>/coco2017/{annotations,<split>}`; `out` may itself be the coco2017 folder."""
    root = Path(out) if Path(out).name == "coco2017" else Path(out) / "coco2017"
    images, annotations, records = [], [], []
    for number in range(1, count + 1):
        scene = draw_scene(_seed_of(seed, number), height=240)
        name = f"{number:012d}.jpg"
        _write(root / split / name, _encode_jpeg(scene.pixels))
        high, wide = scene.pixels.shape[:2]
        images.append(_describe_coco_image(number, name, split, high, wide))
        annotations += [
            {"image_id": number, "id": number * 5 + i, "caption": text.capitalize()}
            for i, text in enumerate(scene.captions)
        ]
        records.append({"path": f"{split}/{name}", "caption": scene.captions[0], "captions": list(scene.captions)})
    licence = {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
    info = {"description": "Readroom scenes", "version": "1.0", "year": 2024, "date_created": "2024/01/01"}
    document = {"info": info, "licenses": [licence], "images": images, "annotations": annotations}
    _write(root / "annotations" / f"captions_{split}.json", json.dumps(document).encode())
    return records


def _describe_coco_image(number: int, name: str, split: str, high: int, wide: int) -> Record:
    return {
        "license": 1,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}/{name}",
        "height": high,
        "width": wide,
        "date_captured": "2024-01-01 00:00:00",
        "flickr_url": "",
        "id": number,
    }


# --- PACS export ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Film:
    """One instance to be written: its picture, its view and its number within the study."""

    pixels: NDArray[np.uint8]
    truth: Truth
    number: int


def write_pacs(out: Path, count: int, seed: int, hazards: bool = True) -> list[Record]:
    """Write `count` studies as a PACS export of mixed folder shapes, and `<out>/phantoms.json`, the truth.

    One study in four has a lateral companion, one in eight a second frontal exposure. With `hazards` the export also
    holds what exports hold: a text file, an empty file, a duplicate and a secondary capture. Each record's `expected`
    says what a producer should make of the file: "accepted", or a reason of `readroom.records.Reason`.
    """
    root = Path(out)
    records: list[Record] = []
    for index in range(count):
        visit = sample_visit(_seed_of(seed, index))
        films = _sample_films(visit)
        report = asdict(write_report(films[0].truth, np.random.default_rng([7, visit.seed])))  # one report a study
        for film in films:
            name = FOLDER_SHAPES[index % len(FOLDER_SHAPES)](visit, index, film.number)
            _write(root / name, make_instance(film.pixels, visit, film.truth.view, film.number))
            records.append({"path": name, **_describe_instance(visit, film), "report": report})
    if hazards and records:
        records += _write_hazards(root, records[0])
    _write(root / "phantoms.json", json.dumps(records, indent=1).encode())
    return records


def _sample_films(visit: Visit) -> list[Film]:
    """The films of a study: a frontal one, sometimes with a companion that shows the same patient."""
    rng = np.random.default_rng([6, visit.seed])
    height = int(rng.choice([384, 448, 512]))
    frontal = draw_radiograph(visit.seed, height)
    films = [Film(frontal.pixels, frontal.truth, 1)]
    draw = rng.random()
    if draw < 0.25:
        side = draw_radiograph(visit.seed, height, lateral=True)
        films.append(Film(side.pixels, side.truth, 2))
    elif draw < 0.375:
        again = 255 * (frontal.pixels / 255.0) ** rng.uniform(0.85, 1.15)  # the same patient, exposed again
        films.append(Film(again.round().astype(np.uint8), frontal.truth, 2))
    return films


def _name_media(visit: Visit, index: int, number: int) -> str:
    """As on a disc (IHE PDI): capitals, at most 8 characters, no extension."""
    return f"DICOM/PAT{index:04d}/STU0/SER{number - 1}/IM0"


def _name_uids(visit: Visit, index: int, number: int) -> str:
    """As archives write: the three UIDs."""
    series, instance = make_uid("series", visit.seed, number), make_uid("instance", visit.seed, number)
    return f"{visit.study_uid}/{series}/{instance}.dcm"


def _name_flat(visit: Visit, index: int, number: int) -> str:
    """As in a dump: all studies in one folder, no extension."""
    return f"dump/IM{index * 10 + number:06d}"


def _name_vendor(visit: Visit, index: int, number: int) -> str:
    """As some vendors export: with the patient's number and blanks in folder names."""
    return f"{visit.patient_id} Phantom/exam {index} THORAX/CR/CR{number - 1:06d}.dcm"


FOLDER_SHAPES: tuple[Callable[[Visit, int, int], str], ...] = (_name_media, _name_uids, _name_flat, _name_vendor)


def _describe_instance(visit: Visit, film: Film) -> Record:
    instance = make_uid("instance", visit.seed, film.number)
    uids = {"study_instance_uid": visit.study_uid, "sop_instance_uid": instance}
    return {**uids, "expected": ACCEPTED, **_describe_film(film.truth)}


def _write_hazards(root: Path, first: Record) -> list[Record]:
    """Files that a producer must skip for a named reason."""
    original = (root / first["path"]).read_bytes()
    contents = {
        "README.TXT": (b"This disc holds images of Readroom phantoms.\r\n", "not_dicom"),
        "dump/IM999001": (b"", "empty"),
        "dump/IM999002": (original, "duplicate"),
        "dump/IM999003": (_make_capture(original), "secondary_capture"),
    }
    for name, (content, _) in contents.items():
        _write(root / name, content)
    return [{"path": name, "expected": reason} for name, (_, reason) in contents.items()]


def _make_capture(original: bytes) -> bytes:
    """A screenshot of a film with text burned in, in the film's own study."""
    ds = dcmread(BytesIO(original))
    if ds.file_meta.TransferSyntaxUID.is_compressed:
        ds.decompress()
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = make_uid("capture", ds.SOPInstanceUID)
    ds.ConversionType, ds.BurnedInAnnotation = "WSD", "YES"
    return save_instance(ds, ds.file_meta.TransferSyntaxUID)


# --- MIMIC-CXR --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MimicFilm:
    """One image of the MIMIC-CXR tree with what its csv rows need."""

    subject: int
    study: int
    dicom: str
    split: str
    visit: Visit
    film: Film

    @property
    def folder(self) -> str:
        """`files/p10/p10000032/s50414267`."""
        return f"files/p{str(self.subject)[:2]}/p{self.subject}/s{self.study}"


def write_mimic(out: Path, count: int, seed: int) -> list[Record]:
    """Write `count` studies as MIMIC-CXR 2.0.0 (DICOM, reports) and MIMIC-CXR-JPG 2.0.0 (JPEG, labels, splits).

    The trees stand at `<out>/mimic-cxr/2.0.0` and `<out>/mimic-cxr-jpg/2.0.0`; the split is by subject.
    """
    dicom_root, jpg_root = Path(out) / "mimic-cxr" / "2.0.0", Path(out) / "mimic-cxr-jpg" / "2.0.0"
    films: list[MimicFilm] = []
    reports: dict[int, ReportText] = {}
    for index in range(count):
        made = _make_mimic_study(seed, index, count)
        films += made
        reports[made[0].study] = write_report(made[0].film.truth, np.random.default_rng([7, made[0].visit.seed]))
    for image in films:
        instance = make_instance(image.film.pixels, image.visit, image.film.truth.view, image.film.number, digital=True)
        _write(dicom_root / image.folder / f"{image.dicom}.dcm", instance)
        _write(jpg_root / image.folder / f"{image.dicom}.jpg", _encode_mimic_jpeg(image.film.pixels))
    _write_mimic_reports(dicom_root, films, reports, seed)
    _write_mimic_lists(dicom_root, films)
    _write_mimic_tables(jpg_root, films, reports)
    return [_describe_mimic(image, reports[image.study]) for image in films]


def _make_mimic_study(seed: int, index: int, count: int) -> list[MimicFilm]:
    """Two studies in three start a new subject; the last tenths of the subjects are validate and test."""
    visit = sample_visit(_seed_of(seed, index))
    owner = index - (1 if index % 3 == 2 else 0)
    position = owner / count
    split = "train" if position < 0.7 else "validate" if position < 0.83 else "test"
    subject, study = 10_000_000 + _pick_id(seed, "subject", owner), 50_000_000 + _pick_id(seed, "study", index)
    frontal = draw_radiograph(visit.seed, 256)
    films = [Film(frontal.pixels, frontal.truth, 1)]
    if index % 4 == 3:
        side = draw_radiograph(visit.seed, 256, lateral=True)
        films.append(Film(side.pixels, side.truth, 2))
    return [MimicFilm(subject, study, _name_dicom(visit.seed, f.number), split, visit, f) for f in films]


def _pick_id(*parts: object) -> int:
    """Up to seven digits, the same for the same parts."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest(), 16) % 9_999_999


def _name_dicom(seed: int, number: int) -> str:
    """40 hex digits in five groups of eight."""
    digits = hashlib.sha1(f"{seed}/{number}".encode(), usedforsecurity=False).hexdigest()
    return "-".join(digits[i : i + 8] for i in range(0, 40, 8))


def _encode_mimic_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """As MIMIC-CXR-JPG was made: full range, histogram equalisation, JPEG quality 95 (Johnson et al., 2019)."""
    return _encode_jpeg(np.asarray(ImageOps.equalize(ImageOps.autocontrast(Image.fromarray(pixels)))))


def _write_mimic_reports(root: Path, films: list[MimicFilm], reports: dict[int, ReportText], seed: int) -> None:
    """Text files beside the study folders, and the same in mimic-cxr-reports.zip."""
    rng = np.random.default_rng([8, seed])
    folders = {image.study: image.folder for image in films}
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for study, folder in folders.items():
            style = str(rng.choice(["full", "impression", "findings", "bare"], p=[0.62, 0.21, 0.12, 0.05]))
            text = _format_report(reports[study], style)
            _write(root / f"{folder}.txt", text.encode())
            archive.writestr(f"{folder}.txt", text)


def _format_report(report: ReportText, style: str) -> str:
    """A report in MIMIC-CXR's habits: each line starts with a blank, empty lines are one blank, `___` hides names."""
    sections = [("EXAMINATION", "CHEST (PA AND LAT)"), ("INDICATION", "___ with shortness of breath.")]
    if style in ("full", "findings"):
        sections.append(("FINDINGS", report.findings))
    if style in ("full", "impression"):
        sections.append(("IMPRESSION", report.impression))
    lines = [" " * 33 + "FINAL REPORT"]
    if style == "bare":
        return "\n".join([*lines, *_wrap(report.findings), " ", *_wrap(report.impression)]) + "\n"
    for title, text in sections:
        lines += [*_wrap(f"{title}:  {text}"), " "]
    return "\n".join(lines[:-1]) + "\n"


def _wrap(text: str, width: int = 78) -> list[str]:
    """Lines of less than 80 characters, each with its leading blank; double blanks stay."""
    lines, current = [], ""
    for word in text.split(" "):
        if len(current) + len(word) + 1 > width:
            lines.append(current)
            current = ""
        current += " " + word
    return [*lines, current]


def _write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_mimic_lists(root: Path, films: list[MimicFilm]) -> None:
    records = [(f.subject, f.study, f.dicom, f"{f.folder}/{f.dicom}.dcm") for f in films]
    _write_table(root / "cxr-record-list.csv.gz", ("subject_id", "study_id", "dicom_id", "path"), records)
    studies = dict.fromkeys((f.subject, f.study, f"{f.folder}.txt") for f in films)
    _write_table(root / "cxr-study-list.csv.gz", ("subject_id", "study_id", "path"), studies)


def _write_mimic_tables(root: Path, films: list[MimicFilm], reports: dict[int, ReportText]) -> None:
    splits = [(f.dicom, f.study, f.subject, f.split) for f in films]
    _write_table(root / "mimic-cxr-2.0.0-split.csv.gz", ("dicom_id", "study_id", "subject_id", "split"), splits)
    _write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA_COLUMNS, map(_describe_metadata, films))
    labels = [
        (subject, study, *(_format_label(reports[study].labels.get(name)) for name in CHEXPERT_COLUMNS))
        for subject, study in dict.fromkeys((f.subject, f.study) for f in films)
    ]
    for labeller in ("chexpert", "negbio"):
        _write_table(root / f"mimic-cxr-2.0.0-{labeller}.csv.gz", ("subject_id", "study_id", *CHEXPERT_COLUMNS), labels)


METADATA_COLUMNS = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip


def _format_label(label: int | None) -> str:
    return "" if label is None else f"{float(label)}"


def _describe_metadata(image: MimicFilm) -> tuple[object, ...]:
    """One row of the metadata table; dates lie in the future and times lose their leading zero, as published."""
    view = image.film.truth.view
    shown = "" if image.visit.seed % 25 == 0 else view  # 4 % of the published rows have no view
    time = f"{int(image.visit.study_time)}.{image.visit.seed % 1000:03d}"
    date = 21_000_000 + image.visit.seed % 100 * 10_000 + int(image.visit.study_date[4:])
    procedure = "CHEST (PORTABLE AP)" if view == "AP" else "CHEST (PA AND LAT)"
    meaning = "lateral" if view == "LL" else VIEW_CODES[view][2]
    rows, columns = image.film.pixels.shape
    head = (image.dicom, image.subject, image.study, procedure, shown, rows, columns, date, time)
    return (*head, procedure, meaning, "Erect" if view != "AP" else "Recumbent")


def _describe_mimic(image: MimicFilm, report: ReportText) -> Record:
    name = f"{image.folder}/{image.dicom}"
    ids = {"subject_id": image.subject, "study_id": image.study, "dicom_id": image.dicom, "split": image.split}
    return {"path": name, **ids, **_describe_film(image.film.truth), "report": asdict(report)}
