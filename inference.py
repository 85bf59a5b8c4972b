"""Caption an image or ask about it: a path (DICOM too), a PIL image or an array; a list gives a list."""

from typing import Any

from models.predict import answer, caption
from readroom.captions import choose_now


def generate_caption(image: Any, model: str | None = None) -> Any:
    """What `image` shows. `model`: a folder, a hub id, `bundled`, `bundled:vlp`, or a family. `blip` (the default) is
    READROOM_BLIP_MODEL, the registry's active one or BLIP base; `vlp` READROOM_VLP_MODEL, the active one or, with a
    warning, the bundled one, for there is no other VLP to be had."""
    return caption(image, **choose_now("caption", model))


def answer_question(image: Any, question: Any, model: str | None = None) -> Any:
    """The answer to `question` about `image`; lists of either give a list. `blip` means Salesforce/blip-vqa-base."""
    return answer(image, question, **choose_now("answer", model))
