"""Colour DICOM frames to 8-bit RGB. Producers skip colour images; what arrives here is still drawn correctly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.pixels import apply_color_lut

from models.decoders import DecodedFrame
from readroom.errors import ImageError
from readroom.records import Reason


def render_colour(decoded: DecodedFrame, instance: Any) -> NDArray[np.uint8]:
    """uint8 (rows, columns, 3) of a decoded PALETTE COLOR, RGB or YBR frame.

    YBR and PlanarConfiguration 1 were undone while decoding (PS3.3 C.7.6.3.1). Raises ImageError `unsupported_syntax`
    for the retired colour models, and whatever pydicom raises for a broken palette.
    """
    if decoded.photometric == "PALETTE COLOR":
        return narrow_samples(apply_color_lut(decoded.pixels, instance)[..., :3], 16)
    if decoded.photometric != "RGB" or decoded.pixels.ndim != 3:
        raise ImageError(Reason.UNSUPPORTED_SYNTAX, "a colour model other than RGB, YBR and PALETTE COLOR")
    return narrow_samples(decoded.pixels, int(instance.BitsStored))


def narrow_samples(samples: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Samples of `bits` bits as uint8, scaled by their full range; 8-bit samples are returned as they are.

    Palettes declare 16 bits and often hold 8: then the values say so.
    """
    if samples.dtype == np.uint8:
        return np.asarray(samples)
    maximum = 2**bits - 1 if int(samples.max(initial=0)) > 255 else 255
    return np.asarray(np.rint(np.clip(samples.astype(np.float64) / maximum, 0.0, 1.0) * 255.0), dtype=np.uint8)
