"""The little of JPEG, JPEG-LS and JPEG 2000 codestreams that must be known before a decoder is trusted with one."""

from __future__ import annotations

END_MARKER = b"\xff\xd9"  # EOI of JPEG and JPEG-LS (ISO 10918-1 B.2), EOC of JPEG 2000 (ISO 15444-1 A.4.4)
JPEG2000_START = b"\xff\x4f\xff\x51"  # SOC followed by SIZ
# SOF0-15 without DHT (C4), JPG (C8) and DAC (CC); F7 is SOF55 of JPEG-LS
JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
STANDALONE_MARKERS = frozenset(range(0xD0, 0xD9)) | {0x01}  # RSTn, SOI and TEM carry no length


def is_cut(codestream: bytes) -> bool:
    """Whether the codestream lacks its end marker. Encoders pad after it: 16 bytes of slack."""
    return END_MARKER not in codestream[-16:]


def read_size(codestream: bytes) -> tuple[int, int] | None:
    """(rows, columns) a codestream claims for itself; None when it does not say."""
    start = codestream[:256].find(JPEG2000_START)
    if start >= 0:
        return read_jpeg2000_size(codestream[start : start + 24])
    return read_jpeg_size(codestream)


def read_jpeg2000_size(header: bytes) -> tuple[int, int] | None:
    """(rows, columns) from the SIZ segment (ISO 15444-1 A.5.1): Xsiz, Ysiz, XOsiz, YOsiz after Lsiz and Rsiz."""
    if len(header) < 24:
        return None
    right, bottom, left, top = (int.from_bytes(header[at : at + 4], "big") for at in (8, 12, 16, 20))
    return bottom - top, right - left


def read_jpeg_size(codestream: bytes) -> tuple[int, int] | None:
    """(rows, columns) from the first frame header (ISO 10918-1 B.2.2)."""
    at = 2
    while at + 9 <= len(codestream) and codestream[at] == 0xFF:
        marker = codestream[at + 1]
        if marker in JPEG_FRAME_MARKERS:
            rows, columns = (int.from_bytes(codestream[at + i : at + i + 2], "big") for i in (5, 7))
            return (rows, columns) if rows and columns else None  # zero rows: given later by a DNL marker
        at += next_step(codestream, at)
    return None


def next_step(codestream: bytes, at: int) -> int:
    """Bytes from the marker at `at` to the next one; fill bytes FF and stand-alone markers have no length."""
    marker = codestream[at + 1]
    if marker == 0xFF:
        return 1
    return 2 if marker in STANDALONE_MARKERS else 2 + int.from_bytes(codestream[at + 2 : at + 4], "big")
