"""Caption an image or ask about it: a path (DICOM too), a PIL image or an array; a list gives a list."""

from typing import Any

from models.predict import answer, caption
from readroom.settings import load_settings


def generate_caption(image: Any, model: str | None = None) -> Any:
    """What `image` shows. `model`: folder, hub id, `bundled` (no registry); else READROOM_BLIP_MODEL or BLIP base."""
    chosen = load_settings()
    name = model or chosen.blip_model or "Salesforce/blip-image-captioning-base"
    return caption(image, name, chosen.device, chosen.precision, chosen.num_beams, chosen.max_new_tokens)


def answer_question(image: Any, question: Any, model: str | None = None) -> Any:
    """The answer to `question` about `image`; lists of either give a list."""
    chosen = load_settings()
    return answer(image, question, model or "Salesforce/blip-vqa-base", chosen.device, chosen.precision)
