"""How large a picture may be before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from readroom.errors import ImageError
from readroom.records import Reason


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """Upper bounds checked against headers, before a decoder sees a byte.

    The largest chest films are about 4300 x 4300 (18 million pixels, 37 MB); the defaults leave room for whole-spine
    stitches and 100-megapixel photographs and stop headers that lie.
    """

    max_file_bytes: int = 512 * 2**20  # of the file, and of the inflated data set of a deflated file
    max_pixels: int = 120_000_000  # rows x columns of one frame
    max_frames: int = 4096
    max_decoded_bytes: int = 2 * 2**30  # rows x columns x samples x frames x bytes per sample

    def check_file(self, size_bytes: int) -> None:
        """Raise ImageError `empty` or `too_large` for a file of `size_bytes`."""
        if size_bytes == 0:
            raise ImageError(Reason.EMPTY, "the file has no bytes")
        if size_bytes > self.max_file_bytes:
            raise ImageError(Reason.TOO_LARGE, f"the file is larger than {self.max_file_bytes} bytes")

    def check_picture(self, rows: int, columns: int) -> None:
        """Raise ImageError `corrupt` or `too_large` for one frame of `rows` x `columns` pixels."""
        if rows < 1 or columns < 1:
            raise ImageError(Reason.CORRUPT, "the header gives no picture size")
        if rows * columns > self.max_pixels:
            raise ImageError(Reason.TOO_LARGE, f"more than {self.max_pixels} pixels")

    def check_frames(self, frames: int, decoded_bytes: int) -> None:
        """Raise ImageError `too_large` for `frames` that decode to `decoded_bytes` together."""
        if frames > self.max_frames:
            raise ImageError(Reason.TOO_LARGE, f"more than {self.max_frames} frames")
        if decoded_bytes > self.max_decoded_bytes:
            raise ImageError(Reason.TOO_LARGE, f"more than {self.max_decoded_bytes} bytes when decoded")
