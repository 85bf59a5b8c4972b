"""A contact sheet: each image beside what was said of it, as PNG and as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Image as Picture

THUMB = 208  # pixels: the side of a thumbnail; six columns fill an ordinary screen
GAP = 16
HEAD = 80
COLUMNS = 6
TEXT_LINES = 6
FONT_SIZE = 14
LINE = FONT_SIZE + 4
BLOCK_GAP = 6  # between title, texts and truth
TEXT_WIDTH = THUMB - GAP
INK, FAINT, PAPER, CARD = (28, 32, 38), (104, 112, 122), (240, 242, 245), (255, 255, 255)
NAME = (31, 95, 168)  # of who said a text
Colour = tuple[int, int, int]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;
background:#f0f2f5;color:#1c2026}
h1{font-size:1.5rem;margin:0}p.note{color:#68707a;margin:.3rem 0 1.5rem}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:1rem}
figure{margin:0;background:#fff;border-radius:8px;overflow:hidden;box-shadow:0 1px 3px #0002}
img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#000}
figcaption{padding:.7rem .9rem 1rem;overflow-wrap:anywhere}small{color:#68707a;display:block}
figcaption p{margin:.25rem 0}b{color:#1f5fa8;font-size:.8rem}
</style></head><body><h1>{{ title }}</h1><p class="note">{{ note }}</p><main>
{% for e in entries %}<figure><img alt="{{ e.title }}" src="data:image/jpeg;base64,{{ e.jpeg }}">
<figcaption><small>{{ e.title }}</small>
{% for name, text in e.texts.items() %}<p>{% if name %}<b>{{ name }}</b> {% endif %}{{ text }}</p>
{% endfor %}{% if e.detail %}<small>{{ e.detail }}</small>{% endif %}</figcaption></figure>
{% endfor %}</main></body></html>
"""


@dataclass(frozen=True, slots=True)
class SheetEntry:
    """One card: a picture, where it came from, what was said by whom, and a smaller line (truth, score).

    `texts` are by the name of who said them; one alone may have the name "".
    """

    picture: Picture
    title: str
    texts: Mapping[str, str]
    detail: str = ""


def write_sheet(entries: Sequence[SheetEntry], folder: Path, title: str, note: str) -> tuple[Path, Path]:
    """Write `contact-sheet.png` and `contact-sheet.html` into `folder`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    png, page = folder / "contact-sheet.png", folder / "contact-sheet.html"
    draw_sheet(entries, title, note).save(png, optimize=True)
    page.write_text(render_page(entries, title, note), encoding="utf-8")
    return png, page


def render_page(entries: Sequence[SheetEntry], title: str, note: str) -> str:
    """The HTML page, pictures embedded, so that one file can be passed on."""
    cards = [{"title": e.title, "texts": e.texts, "detail": e.detail, "jpeg": encode_jpeg(e.picture)} for e in entries]
    return Environment(autoescape=True).from_string(PAGE).render(title=title, note=note, entries=cards)


def encode_jpeg(picture: Picture, side: int = 2 * THUMB) -> str:
    """A thumbnail as base64 JPEG text, at most `side` pixels wide and high."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def draw_sheet(entries: Sequence[SheetEntry], title: str, note: str) -> Picture:
    """The whole sheet as one RGB picture, `COLUMNS` cards a row, each row as high as its longest text."""
    rows = [entries[start : start + COLUMNS] for start in range(0, len(entries), COLUMNS)]
    heights = [THUMB + GAP + max(measure_lines(entry) for entry in row) for row in rows]
    width = COLUMNS * (THUMB + GAP) + GAP
    sheet = Image.new("RGB", (width, HEAD + sum(heights) + GAP * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 16), title, fill=INK, font=load_font(22))
    draw.text((GAP, 48), note, fill=FAINT, font=load_font(FONT_SIZE))
    top = HEAD
    for row, height in zip(rows, heights, strict=True):
        for column, entry in enumerate(row):
            draw_card(sheet, entry, GAP + column * (THUMB + GAP), top, height)
        top += height + GAP
    return sheet


def draw_card(sheet: Picture, entry: SheetEntry, left: int, top: int, height: int) -> None:
    """One card with its upper left corner at (`left`, `top`), pixels."""
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + THUMB - 1, top + height - 1), fill=CARD)
    sheet.paste(fit_square(entry.picture), (left, top))
    place = top + THUMB + GAP // 2
    for block in list_blocks(entry):
        for line, colour in block:
            text = clip_text(line, load_font(FONT_SIZE), TEXT_WIDTH)
            draw.text((left + GAP // 2, place), text, fill=colour, font=load_font(FONT_SIZE))
            place += LINE
        place += BLOCK_GAP


def measure_lines(entry: SheetEntry) -> int:
    """The height of what stands under a picture, pixels."""
    blocks = list_blocks(entry)
    return LINE * sum(map(len, blocks)) + BLOCK_GAP * len(blocks)


def list_blocks(entry: SheetEntry) -> list[list[tuple[str, Colour]]]:
    """The lines under a picture, each with its colour: title, each text under the name of who said it, detail."""
    said = [
        [*([(name, NAME)] if name else []), *((line, INK) for line in wrap_block(text))]
        for name, text in entry.texts.items()
    ]
    detail = [(line, FAINT) for line in wrap_block(entry.detail)]
    return [[(entry.title, FAINT)], *said, *([detail] if detail else [])]


def wrap_block(text: str) -> list[str]:
    """A text's lines as they fit on a card, the first `TEXT_LINES` of them."""
    return wrap_text(text, load_font(FONT_SIZE), TEXT_WIDTH)[:TEXT_LINES]


def fit_square(picture: Picture) -> Picture:
    """The whole picture inside a black square of `THUMB` pixels."""
    square = Image.new("RGB", (THUMB, THUMB))
    small = picture.convert("RGB")
    small.thumbnail((THUMB, THUMB))
    square.paste(small, ((THUMB - small.width) // 2, (THUMB - small.height) // 2))
    return square


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font: the same on every machine."""
    return ImageFont.load_default(size)


def wrap_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, at spaces."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def clip_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut with an ellipsis when it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
