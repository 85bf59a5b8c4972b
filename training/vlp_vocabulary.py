"""The bundled VLP's vocabulary: cased, whole words of the phantom texts, and letters for everything else."""

from __future__ import annotations

import re
import string

from models.vlp.tokenizer import SPECIAL_TOKENS
from training import phantom_text, questions, scenes


def list_words() -> list[str]:
    """The lines of vocab.txt. Unknown words are spelled, so that other texts can be learned later."""
    letters = string.ascii_letters + string.digits
    sentences = [*phantom_text.every_word(), *scenes.every_word(), *questions.every_word()]
    words = {word for text in sentences for word in re.findall(r"[A-Za-z]+", text)}
    words |= {word.lower() for word in words}
    words |= {word.capitalize() for text in questions.every_word() for word in text.split()}
    spelled = [*letters, *(f"##{letter}" for letter in letters)]
    return [*SPECIAL_TOKENS, *string.punctuation, *spelled, *sorted(words - set(letters))]
