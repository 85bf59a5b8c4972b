"""The contact sheet shows every card, whatever its text holds."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image

from readroom.sheet import (
    COLUMNS,
    FAINT,
    GAP,
    HEAD,
    INK,
    NAME,
    THUMB,
    SheetEntry,
    clip_text,
    draw_sheet,
    list_blocks,
    load_font,
    measure_lines,
    render_page,
    wrap_text,
    write_sheet,
)


def make_entry(
    text: str = "small left pleural effusion", value: int = 200, size: tuple[int, int] = (64, 80)
) -> SheetEntry:
    return SheetEntry(Image.new("L", size, value), "IM0001", {"": text}, "truth: none")


def test_sheet_writes_a_png_and_a_page_with_every_card(tmp_path: Path) -> None:
    entries = [make_entry(value=40 * number) for number in range(1, 7)]
    png, page = write_sheet(entries, tmp_path / "new", "Title", "note")
    with Image.open(png) as sheet:
        assert sheet.width == COLUMNS * (THUMB + GAP) + GAP
        pixels = np.asarray(sheet.convert("L"))
    for number, entry in enumerate(entries):
        left = GAP + (number % COLUMNS) * (THUMB + GAP)
        column = pixels[HEAD:, left + THUMB // 2]
        assert 40 * (number + 1) in column, entry
    assert page.read_text().count("<figure>") == 6


def test_page_escapes_what_a_caption_or_a_file_name_holds() -> None:
    texts = {"<b>": "<script>alert(1)</script>"}
    page = render_page([SheetEntry(Image.new("L", (8, 8)), "<img src=x>", texts)], "t", "n")
    assert "<script>" not in page
    assert html.escape("<script>alert(1)</script>") in page


TWO = {"BLIP": "small left pleural effusion", "VLP": "no pleural effusion"}


def test_each_text_stands_under_the_name_of_who_said_it() -> None:
    entry = SheetEntry(Image.new("L", (8, 8)), "IM0001", TWO, "truth: none")
    blocks = [[line for line, _ in block] for block in list_blocks(entry)]
    assert [block[0] for block in blocks] == ["IM0001", "BLIP", "VLP", "truth: none"]
    assert [" ".join(block[1:]) for block in blocks] == ["", *TWO.values(), ""]
    colours = [{colour for _, colour in block} for block in list_blocks(entry)]
    assert colours == [{FAINT}, {NAME, INK}, {NAME, INK}, {FAINT}]
    page = render_page([entry], "t", "n")
    assert all(f"<b>{name}</b> {text}" in page for name, text in TWO.items())


def test_one_text_needs_no_name() -> None:
    assert [[line for line, _ in block] for block in list_blocks(make_entry("heart"))][1:] == [
        ["heart"],
        ["truth: none"],
    ]
    assert "<b>" not in render_page([make_entry("heart")], "t", "n")


def test_a_card_is_as_high_as_the_longest_of_its_row_needs(tmp_path: Path) -> None:
    short, long = make_entry("heart"), SheetEntry(Image.new("L", (8, 8)), "IM0002", TWO, "truth: none")
    alone, both = draw_sheet([short], "t", "n"), draw_sheet([short, long], "t", "n")
    assert both.height - alone.height == measure_lines(long) - measure_lines(short) > 0
    left = GAP + THUMB + GAP
    ink = np.asarray(both.convert("L"))[HEAD + THUMB :, left : left + THUMB] < 200
    lowest = HEAD + THUMB + int(np.flatnonzero(ink.any(axis=1)).max())
    assert HEAD + THUMB + measure_lines(short) < lowest < HEAD + THUMB + GAP + measure_lines(long)


def test_wrapped_lines_fit_and_keep_every_word() -> None:
    font = load_font(14)
    text = "frontal chest radiograph with a very large heart and a pacemaker on the left side"
    lines = wrap_text(text, font, 150)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 150 for line in lines)


def test_a_word_wider_than_the_card_is_cut_with_an_ellipsis() -> None:
    font = load_font(14)
    shown = clip_text("x" * 200, font, 100)
    assert shown.endswith("…")
    assert font.getlength(shown) <= 100


def test_an_empty_sheet_is_still_a_picture(tmp_path: Path) -> None:
    png, page = write_sheet([], tmp_path, "Nothing", "note")
    assert png.stat().st_size > 0
    assert "<figure>" not in page.read_text()
