"""Foreign weights to a checkpoint folder: the only road on which a pickle is read, on request, tensors only.

Which family a released file belongs to stands in the names of its tensors (models/blip_convert.py, vlp/convert.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import models.blip_convert as blip_convert
import models.vlp.convert as vlp_convert
from models.checkpoint import publish_folder
from models.released import read_weights


def convert_checkpoint(source: str | Path, dest_root: Path | str, vocabulary: Path | None = None) -> Path:
    """Convert a released BLIP `.pth` or VLP `.bin`, or a BLIP's folder or hub id, to `<dest_root>/<digest>`.

    `vocabulary` is the `vocab.txt` of the release's BERT, for a file; None looks beside the file, then on the hub.
    Raises CheckpointMissing or CheckpointBroken; writes nothing then.
    """
    with tempfile.TemporaryDirectory(prefix="readroom-convert-") as staged:
        folder = Path(staged) / "checkpoint"
        folder.mkdir()
        path = Path(source).expanduser()
        if path.is_file():
            weights = read_weights(path)
            family = vlp_convert if vlp_convert.is_vlp(weights) else blip_convert
            family.convert_released(path, weights, folder, vocabulary)
        else:
            place = path if path.is_dir() else blip_convert.fetch_pickled(str(source))
            blip_convert.convert_folder(place, folder, str(source))
        return publish_folder(folder, dest_root)
