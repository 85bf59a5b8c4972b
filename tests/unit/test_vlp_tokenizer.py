"""The cased tokenizer on texts that are hardly texts."""

from __future__ import annotations

import pytest

from models.vlp.tokenizer import CasedTokenizer
from tests.fakes.small_blip import VOCABULARY


@pytest.fixture(scope="module")
def tokenizer() -> CasedTokenizer:
    return CasedTokenizer(VOCABULARY)


@pytest.mark.parametrize("text", ["\udcff is there", "is\ud800 there", "\ud83d\ude00", "a\udfff?"])
def test_what_is_no_unicode_becomes_a_question_mark(tokenizer: CasedTokenizer, text: str) -> None:
    plain = "".join("?" if "\ud800" <= sign <= "\udfff" else sign for sign in text)
    assert tokenizer.split(text) == tokenizer.split(plain)
    assert tokenizer.encode(text) == tokenizer.encode(plain) != []


@pytest.mark.parametrize(
    ("text", "known"),
    [("", False), ("\u200b", False), ("\x00", False), ("\U0001f600", False), ("xyzzy", False), ("xyzzy what", True)],
)
def test_a_text_holds_a_known_word_or_none(tokenizer: CasedTokenizer, text: str, known: bool) -> None:
    assert tokenizer.knows_any(tokenizer.encode(text)) == known
