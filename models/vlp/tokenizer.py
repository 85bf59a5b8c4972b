"""The cased WordPiece tokenizer of bert-base-cased, from a plain vocab.txt. Special tokens in a text are plain words.

SPEC section 9; Wu et al. 2016 for the greedy longest match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers

from models.vlp.layout import PAD, SpecialIds
from readroom.errors import CheckpointBroken

VOCABULARY_NAME = "vocab.txt"
MAX_WORD_CHARS = 100
MAX_VOCABULARY_BYTES = 16 * 1024 * 1024
CONTINUES = "##"
BEFORE_MARK = re.compile(r" (?=[.,;:!?)])|(?<=\() ")
OWNS = re.compile(r" ' s\b")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class CasedTokenizer:
    """Texts to ids and back. `words` holds the vocabulary, a token's index is its id."""

    def __init__(self, words: Sequence[str]) -> None:
        """Raise CheckpointBroken when special tokens are missing or [PAD] is not token 0."""
        self.words = list(words)
        numbers = {word: number for number, word in enumerate(self.words)}
        missing = [token for token in SPECIAL_TOKENS if token not in numbers]
        if missing:
            raise CheckpointBroken(f"vocab.txt: {', '.join(missing)} missing", "Use the checkpoint's own vocabulary.")
        if numbers["[PAD]"] != PAD:
            raise CheckpointBroken("vocab.txt: [PAD] is not the first token", "Use the checkpoint's own vocabulary.")
        self.special = SpecialIds(*(numbers[token] for token in SPECIAL_TOKENS[1:]))
        unknown = SPECIAL_TOKENS[1]
        pieces = models.WordPiece(numbers, unk_token=unknown, max_input_chars_per_word=MAX_WORD_CHARS)
        self._tokenizer = Tokenizer(pieces)
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def split(self, text: str) -> list[str]:
        """The word pieces of a text, no special tokens added."""
        return list(self._encode(text).tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's word pieces."""
        return list(self._encode(text).ids)

    def knows_any(self, ids: Sequence[int]) -> bool:
        """Whether there is more in a text than [UNK]."""
        return any(number != self.special.unknown for number in ids)

    def _encode(self, text: str) -> Encoding:
        # Half a surrogate pair, as a name of undecodable bytes holds, is a str of Python's and no Unicode.
        return self._tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first [SEP] or [PAD]; pieces are glued, words stand apart, so do their marks."""
        pieces: list[str] = []
        for number in ids:
            if number in (PAD, self.special.end):
                break
            word = self.words[number]
            if pieces and word.startswith(CONTINUES):
                pieces[-1] += word[len(CONTINUES) :]
            else:
                pieces.append(word)
        return " ".join(pieces)


def join_marks(text: str) -> str:
    """A decoded text as people write it: marks join the word before them. The original leaves them apart."""
    return OWNS.sub("'s", BEFORE_MARK.sub("", text))


def read_vocabulary(path: Path) -> CasedTokenizer:
    """The tokenizer of a vocab.txt, a token a line. Raises CheckpointBroken."""
    try:
        if path.stat().st_size > MAX_VOCABULARY_BYTES:
            raise CheckpointBroken(f"vocab.txt is larger than {MAX_VOCABULARY_BYTES} bytes")
        words = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointBroken(f"vocab.txt cannot be read ({type(error).__name__})") from None
    return CasedTokenizer([word.rstrip("\r") for word in (words[:-1] if words[-1] == "" else words)])
