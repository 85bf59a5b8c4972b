"""The bundled captioner's own vocabulary: whole words of the phantom texts, and letters for everything else."""

from __future__ import annotations

import re
import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from training import phantom_text, scenes

# BLIP's special tokens: BERT's, then [DEC], which opens a caption, and [ENC]. Id 0 must be [PAD].
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "bos_token": "[DEC]",
    "eos_token": "[SEP]",
}
PAD, CLS, SEP, DEC = (SPECIAL_TOKENS.index(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[DEC]"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer. Unknown words are spelled, so that other texts can be learned later."""
    wordpiece = Tokenizer(models.WordPiece(_number_words(), unk_token="[UNK]"))  # noqa: S106 - a token of text
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        **ROLES,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=True,
    )


def _number_words() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits
    sentences = [*phantom_text.every_word(), *scenes.every_word()]
    words = sorted({word for text in sentences for word in re.findall(r"[a-z]+", text.lower())} - set(letters))
    pieces = [*SPECIAL_TOKENS, *string.punctuation, *letters, *(f"##{letter}" for letter in letters), *words]
    return {piece: number for number, piece in enumerate(pieces)}
