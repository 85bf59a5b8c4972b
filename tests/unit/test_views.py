"""Views and their ranks, with the spellings of real headers."""

from __future__ import annotations

import pytest

from producer.views import View, find_view, rank_view


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PA", View.PA),
        ("pa erect", View.PA),
        ("POSTERO-ANTERIOR", View.PA),
        ("AP", View.AP),
        ("AP PORTABLE", View.AP),
        ("Antero posterior", View.AP),
        ("LL", View.LATERAL),
        ("RL", View.LATERAL),
        ("LATERAL", View.LATERAL),
        ("LARGE LATERAL", View.LATERAL),
        ("AP AXIAL", View.OTHER),
        ("XTABLE LATERAL", View.OTHER),
        ("AP LLD", View.OTHER),
        ("SWIMMERS", View.OTHER),
        ("LPO", View.OTHER),
        ("", None),
        ("ERECT", None),
    ],
)
def test_a_view_position_is_read(text: str, expected: View | None) -> None:
    assert find_view(view_position=text) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (("399348003", ""), View.AP),
        (("R-10206", "antero-posterior"), View.AP),
        (("R-10214", "postero-anterior"), View.PA),
        (("272479007", ""), View.PA),
        (("R-10236", "left lateral"), View.LATERAL),
        (("local", "postero-anterior"), View.PA),
        (("local", "something"), None),
    ],
)
def test_a_view_code_is_read(code: tuple[str, str], expected: View | None) -> None:
    assert find_view(view_codes=[code]) == expected


@pytest.mark.parametrize(
    ("rows", "expected"), [(["A", "F"], View.LATERAL), (["PH", "F"], View.LATERAL), (["L", "F"], None)]
)
def test_a_patient_orientation_tells_laterals(rows: list[str], expected: View | None) -> None:
    assert find_view(patient_orientation=rows) == expected


def test_descriptions_are_asked_last_and_ambiguous_ones_say_nothing() -> None:
    assert find_view(descriptions=["W034 CHEST PA"]) == View.PA
    assert find_view(descriptions=["CHEST PA AND LAT"]) is None
    assert find_view(descriptions=["Thorax", "CHEST LAT"]) == View.LATERAL
    assert find_view(view_position="AP", descriptions=["CHEST PA"]) == View.AP
    assert find_view(descriptions=["PAIN, APNEA, LATE"]) is None


def test_frontal_views_rank_before_unknown_and_lateral_ones() -> None:
    views = [View.OTHER, None, View.LATERAL, View.AP, View.PA]
    assert sorted(views, key=rank_view) == [View.PA, View.AP, None, View.LATERAL, View.OTHER]
