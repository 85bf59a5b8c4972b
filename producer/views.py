"""Which way a chest radiograph was taken, from what headers say about it.

Images of a study are ranked PA > AP > unknown > lateral > other: a draft is written from the best one. Real exports
leave ViewPosition out in about a third of the files, so four other elements are asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum


class View(StrEnum):
    """The views a draft tells apart."""

    PA = "PA"
    AP = "AP"
    LATERAL = "LATERAL"
    OTHER = "OTHER"


UNKNOWN_RANK = 2
VIEW_RANKS = {View.PA: 0, View.AP: 1, View.LATERAL: 3, View.OTHER: 4}

# Words that name a special projection, whatever stands beside them ("AP AXIAL", "XTABLE LATERAL", "AP LLD").
OTHER_WORDS = frozenset(
    [
        "AXIAL", "SWIMMERS", "SWIMMER", "LLD", "RLD", "DECUB", "DECUBITUS", "XTABLE", "LORDOTIC", "OBLIQUE", "OBL",
        "LPO", "RPO", "LAO", "RAO", "LLO", "RLO"
    ]
)  # fmt: skip
LATERAL_WORDS = frozenset(["LATERAL", "LAT", "LL", "RL", "LATERALE", "SEITLICH", "PROFIL"])
# The last ones are what `PA` and `AP` are short for; words are cut at hyphens, so the pairs are joined first.
PA_WORDS = frozenset(["PA", "POSTEROANTERIOR"])
AP_WORDS = frozenset(["AP", "ANTEROPOSTERIOR"])
SPELLED_OUT = re.compile(r"\b(POSTERO|ANTERO)[\s-]*(ANTERIOR|POSTERIOR)\b")
WORD = re.compile(r"[A-Z]+")

# CID 4010 "DX View", PS3.16: SNOMED CT codes, and the SNOMED RT ones of older files.
VIEW_CODES = {
    "272479007": View.PA,
    "R-10214": View.PA,
    "R-40888": View.PA,
    "399348003": View.AP,
    "R-10206": View.AP,
    "399067008": View.LATERAL,
    "R-102CD": View.LATERAL,
    "399173006": View.LATERAL,
    "R-10236": View.LATERAL,
    "399198007": View.LATERAL,
    "R-10232": View.LATERAL,
    "399352003": View.LATERAL,
    "R-10228": View.LATERAL,
    "399260004": View.LATERAL,
    "R-10224": View.LATERAL,
}


def find_view(
    view_position: str = "",
    view_codes: Iterable[tuple[str, str]] = (),
    patient_orientation: Sequence[str] = (),
    descriptions: Iterable[str] = (),
) -> View | None:
    """The view, None when nothing says it.

    `view_codes` are (CodeValue, CodeMeaning) of ViewCodeSequence; `descriptions` free texts such as SeriesDescription
    and AcquisitionDeviceProcessingDescription. ViewPosition wins, then the code, the orientation, the texts.
    """
    candidates = [read_words(view_position), read_codes(view_codes), read_orientation(patient_orientation)]
    return next((view for view in [*candidates, *map(read_words, descriptions)] if view), None)


def rank_view(view: View | None) -> int:
    """0 PA, 1 AP, 2 unknown, 3 lateral, 4 other."""
    return UNKNOWN_RANK if view is None else VIEW_RANKS[view]


def read_words(text: str) -> View | None:
    """The view a text names; None when it names none, or several ("CHEST PA AND LAT" titles both films)."""
    words = set(WORD.findall(SPELLED_OUT.sub(r"\1\2", text.upper())))
    if words & OTHER_WORDS or "CROSS TABLE" in text.upper():
        return View.OTHER
    meanings = ((View.PA, PA_WORDS), (View.AP, AP_WORDS), (View.LATERAL, LATERAL_WORDS))
    named = [view for view, names in meanings if words & names]
    return named[0] if len(named) == 1 else None


def read_codes(view_codes: Iterable[tuple[str, str]]) -> View | None:
    """The view of the first code that is known by its value or its meaning."""
    return next((view for value, meaning in view_codes if (view := VIEW_CODES.get(value) or read_words(meaning))), None)


def read_orientation(patient_orientation: Sequence[str]) -> View | None:
    """Lateral when the rows of the picture run front to back (PS3.3 C.7.6.1.1.1); frontal films stay unknown."""
    return View.LATERAL if patient_orientation and patient_orientation[0][:1] in {"A", "P"} else None
