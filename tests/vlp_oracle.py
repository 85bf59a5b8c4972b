"""A second VLP, slow and plain, that shares no code with ours; and reference sets made with it.

Everything is in float64 around transformers' BertModel: a whole forward for each token, a beam search over Python
lists, layouts and losses written as loops. Sets of other sizes and special ids than the recorded one come from here.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from transformers import BertConfig, BertModel

EPSILON = 1e-5
BLOCKED = -10000.0
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TASKS = {"s2s": 3, "bi": 0}
ANSWER_PARTS = ("ans_classifier.0", "ans_classifier.2")


# The transformer -----------------------------------------------------------------------------------------------------


def list_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original state dict, the tied copy among them."""
    width, inner, words = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    features, places = sizes["region_feat_dim"], sizes["region_geometry_dim"] + sizes["region_num_classes"]
    head = max(1, sizes["relax_projection"]) * width
    tables = {"word": words, "position": sizes["max_position_embeddings"], "token_type": sizes["type_vocab_size"]}
    shapes: dict[str, tuple[int, ...]] = {
        f"bert.embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()
    }
    linears = {"bert.pooler.dense": (width, width), "cls.predictions.transform.dense": (head, width)}
    norms = {"bert.embeddings.LayerNorm": width, "cls.predictions.transform.LayerNorm": head}
    for number in range(sizes["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{number}"
        linears |= {f"{layer}.attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        linears |= {f"{layer}.attention.output.dense": (width, width), f"{layer}.intermediate.dense": (inner, width)}
        linears |= {f"{layer}.output.dense": (width, inner)}
        norms |= {f"{layer}.attention.output.LayerNorm": width, f"{layer}.output.LayerNorm": width}
    linears |= {
        "vis_embed.0": (features, features),
        "vis_embed.2": (width, features),
        "vis_pe_embed.0": (width, places),
    }
    if sizes["vqa_num_answers"]:
        linears |= {ANSWER_PARTS[0]: (2 * width, width), ANSWER_PARTS[1]: (sizes["vqa_num_answers"], 2 * width)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, length in norms.items():
        shapes |= {f"{name}.weight": (length,), f"{name}.bias": (length,)}
    return shapes | {"cls.predictions.bias": (words,), "cls.predictions.decoder.weight": (words, width)}


@dataclass(frozen=True)
class Seen:
    """Features [B, R, F] and places [B, R, 6 + C] of the regions of B samples."""

    features: Tensor
    places: Tensor


class SlowVlp:
    """The transformer with its heads; `weights` are float64 leaves under the original names, without the tied copy."""

    def __init__(self, sizes: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self.sizes = sizes
        leaves = {name: tensor.double() for name, tensor in weights.items() if not name.endswith("decoder.weight")}
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
        config = BertConfig(
            **{name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{name: sizes[name] for name in ("intermediate_size", "max_position_embeddings", "type_vocab_size")},
            hidden_act="gelu",
            layer_norm_eps=EPSILON,
            pad_token_id=0,
            attn_implementation="eager",
        )
        self.bert = BertModel(config).double().eval()
        names = {name.removeprefix("bert.") for name in self.weights if name.startswith("bert.")}
        assert names == set(self.bert.state_dict())

    def linear(self, name: str, values: Tensor) -> Tensor:
        return values @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def run(self, seen: Seen, ids: Tensor, types: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, final states [B, L, H] and pooled [B, H]; `mask` 0 / 1, query by key."""
        count = seen.features.shape[1]
        look = self.linear("vis_embed.2", self.linear("vis_embed.0", seen.features).clamp(min=0)).clamp(min=0)
        place = self.linear("vis_pe_embed.0", seen.places).clamp(min=0)
        # BertModel adds a position to everything: those of the regions are taken away beforehand.
        regions = look + place - self.weights["bert.embeddings.position_embeddings.weight"][1 : 1 + count]
        words = self.weights["bert.embeddings.word_embeddings.weight"][ids]
        inputs = {
            "inputs_embeds": torch.cat([words[:, :1], regions, words[:, 1 + count :]], dim=1),
            "token_type_ids": types,
            "attention_mask": (1.0 - mask[:, None].double()) * BLOCKED,
            "output_hidden_states": True,
        }
        leaves = {name[5:]: tensor for name, tensor in self.weights.items() if name.startswith("bert.")}
        found = functional_call(self.bert, leaves, kwargs=inputs)
        return found.hidden_states[0], found.last_hidden_state, found.pooler_output

    def predict_tokens(self, states: Tensor, mode: str) -> Tensor:
        """LM logits of states [..., H]."""
        inner = self.linear("cls.predictions.transform.dense", states)
        inner = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
        name, width = "cls.predictions.transform.LayerNorm", self.sizes["hidden_size"]
        normed = normalise(inner) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        if self.sizes["relax_projection"]:
            normed = normed[..., TASKS[mode] * width : (TASKS[mode] + 1) * width]
        words = self.weights["bert.embeddings.word_embeddings.weight"]
        return normed @ words.T + self.weights["cls.predictions.bias"]

    def predict_answers(self, states: Tensor) -> Tensor:
        """VQA logits, from the product of [CLS] and the first [SEP]."""
        product = states[:, 0] * states[:, self.sizes["len_vis_input"] + 1]
        return self.linear(ANSWER_PARTS[1], self.linear(ANSWER_PARTS[0], product).clamp(min=0))


def normalise(values: Tensor) -> Tensor:
    """LayerNorm without weights."""
    mean = values.mean(dim=-1, keepdim=True)
    variance = ((values - mean) ** 2).mean(dim=-1, keepdim=True)
    return (values - mean) / torch.sqrt(variance + EPSILON)


def locate(boxes: Tensor, classes: Tensor) -> Tensor:
    """Places [R, 6 + C] of one image's regions, region by region."""
    width = max(max(box[0], box[2]) for box in boxes.double().tolist()) + EPSILON
    height = max(max(box[1], box[3]) for box in boxes.double().tolist()) + EPSILON
    rows = []
    for x1, y1, x2, y2, _, confidence in boxes.double().tolist():
        left, top, right, bottom = x1 / width, y1 / height, x2 / width, y2 / height
        rows.append([left, top, right, bottom, max(0.0, (bottom - top) * (right - left)), confidence])
    geometry = torch.tensor(rows, dtype=torch.float64)
    return torch.cat([normalise(geometry), normalise(classes.double())], dim=1)


# Sequences and texts -------------------------------------------------------------------------------------------------


def lay_text(text: Sequence[int], mode: str, sizes: Mapping[str, Any], special: Mapping[str, int], total: int) -> Any:
    """Ids, types and mask of one sequence, as lists."""
    count = sizes["len_vis_input"]
    body = [*text[: sizes["max_len_b"]], special["[SEP]"]]
    ids = [special["[CLS]"]] + [special["[UNK]"]] * count + [special["[SEP]"]] + body
    prefix, real = count + 2, len(ids)
    first, second = (4, 5) if mode == "s2s" and sizes["new_segment_ids"] else (0, 1)
    types = [first] * prefix + [second] * len(body)
    padding = [0] * (total - real)
    mask = [[int(sees(query, key, mode, prefix, real)) for key in range(total)] for query in range(total)]
    return ids + padding, types + padding, mask


def sees(query: int, key: int, mode: str, prefix: int, real: int) -> bool:
    if mode == "bi":
        return key < real
    return key < prefix or (prefix <= key <= query < real)


def split_text(text: str, vocabulary: Sequence[str]) -> list[str]:
    """Cased WordPiece, letter by letter."""
    words = [""]
    for letter in text:
        kind = unicodedata.category(letter)
        stands_alone = kind[0] == "P" or (letter.isascii() and kind[0] == "S") or "\u4e00" <= letter <= "\u9fff"
        if letter.isspace():
            words.append("")
        elif stands_alone:
            words += [letter, ""]
        elif kind[0] != "C":
            words[-1] += letter
    return [piece for word in words if word for piece in split_word(word, set(vocabulary))]


def split_word(word: str, vocabulary: set[str]) -> list[str]:
    pieces: list[str] = []
    rest = word
    while rest and len(word) <= 100:
        mark = "##" if pieces else ""
        ends = [end for end in range(len(rest), 0, -1) if mark + rest[:end] in vocabulary]
        if not ends:
            return ["[UNK]"]
        pieces.append(mark + rest[: ends[0]])
        rest = rest[ends[0] :]
    return pieces or ["[UNK]"]


def join_pieces(ids: Sequence[int], vocabulary: Sequence[str]) -> str:
    """The text of ids up to the first [SEP] or [PAD]."""
    text = ""
    for token in (vocabulary[number] for number in ids):
        if token in ("[SEP]", "[PAD]"):
            break
        glued = text and token.startswith("##")
        text += token[2:] if glued else (" " + token if text else token)
    return text


# Losses --------------------------------------------------------------------------------------------------------------


def masked_loss(logits: Tensor, labels: Tensor, weights: Tensor, drop_worst: float, smoothing: float) -> Tensor:
    """Masked-LM loss, token by token."""
    sums = []
    for row, targets, counts in zip(logits, labels.tolist(), weights.tolist(), strict=True):
        losses = [
            token_loss(scores, target, smoothing) * count
            for scores, target, count in zip(row, targets, counts, strict=True)
        ]
        sums.append((sum(losses), sum(counts)))
    kept = sorted(sums, key=lambda pair: float(torch.as_tensor(pair[0]).detach()))[: int(len(sums) * (1 - drop_worst))]
    return torch.as_tensor(sum(loss for loss, _ in kept) / (sum(count for _, count in kept) + 1e-5))


def token_loss(scores: Tensor, target: int, smoothing: float) -> Any:
    logs = torch.log_softmax(scores, dim=0)
    if not smoothing:
        return -logs[target]
    if target == 0:
        return 0.0
    share = smoothing / (len(scores) - 2)
    wanted = [0.0] + [1 - smoothing if token == target else share for token in range(1, len(scores))]
    return sum(part * (math.log(part) - logs[token]) for token, part in enumerate(wanted) if part)


def answer_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross entropy, summed over answers, averaged over questions."""
    right, wrong = torch.log1p(torch.exp(-logits)), torch.log1p(torch.exp(logits))
    return (scores * right + (1 - scores) * wrong).sum() / len(logits)


# Search --------------------------------------------------------------------------------------------------------------

NextLogits = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Rules:
    """How a caption is searched."""

    beams: int
    steps: int
    end: int
    least: int = 0
    bonus: float = 0.0
    ngram: int = 0
    free: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Slot:
    """A hypothesis: total log-probability, tokens, and the slot of the frame before that it continues."""

    score: float
    text: tuple[int, ...]
    parent: int


@dataclass
class Found:
    """The best caption; `margin` is how near any decision was to falling otherwise."""

    text: tuple[int, ...] = ()
    score: float = 0.0
    frames: list[list[Slot]] = field(default_factory=list)
    last: int = 0
    margin: float = math.inf


def search_beams(next_logits: NextLogits, rules: Rules) -> Found:
    """One image's beam search, hypothesis by hypothesis, always to the last step."""
    found = Found()
    slots = [Slot(0.0, (), 0)]
    for step in range(rules.steps):
        # One more than needed from each, for the margin.
        pool = [child for number, slot in enumerate(slots) for child in extend(next_logits, slot, number, step, rules)]
        pool.sort(key=lambda slot: -slot.score)
        slots = pool[: rules.beams]
        found.frames.append(slots)
        gaps = [a.score - b.score for a, b in pairwise(pool[: rules.beams + 1]) if a.score > BLOCKED / 2]
        found.margin = min([found.margin, *gaps])
        if all(slot.text[-1] == rules.end for slot in slots):
            break
    found.last = len(found.frames) - 1
    select_best(found, rules)
    return found


def extend(next_logits: NextLogits, slot: Slot, number: int, step: int, rules: Rules) -> Iterator[Slot]:
    """A hypothesis' best continuations."""
    logs = torch.log_softmax(next_logits(slot.text).double(), dim=0).tolist()
    for token in range(len(logs)):
        if repeats(slot.text, token, rules):
            logs[token] += BLOCKED
    if step + 1 <= rules.least:
        logs[rules.end] = BLOCKED
    malus = BLOCKED if slot.text and slot.text[-1] == rules.end else 0.0
    for token in sorted(range(len(logs)), key=lambda token: -logs[token])[: rules.beams + 1]:
        yield Slot(slot.score + logs[token] + malus, (*slot.text, token), number)


def repeats(text: Sequence[int], token: int, rules: Rules) -> bool:
    """Whether a token would complete an n-gram that is there already."""
    if not rules.ngram or len(text) < rules.ngram or token in rules.free:
        return False
    wanted = [*text[-(rules.ngram - 1) :], token]
    if rules.free & set(wanted):
        return False
    return any(list(text[start : start + rules.ngram]) == wanted for start in range(len(text) - rules.ngram + 1))


def select_best(found: Found, rules: Rules) -> None:
    """The first of the best among all that ended and those of the last frame."""
    best: Slot | None = None
    rates: list[float] = []
    for number, frame in enumerate(found.frames):
        for slot in frame:
            if slot.text[-1] != rules.end and number != found.last:
                continue
            rates.append(slot.score + rules.bonus * len(slot.text))
            if best is None or rates[-1] > found.score:
                best, found.score = slot, rates[-1]
    assert best is not None
    found.text = best.text
    if len(rates) > 1:
        top = sorted(rates)[-2:]
        found.margin = min(found.margin, top[1] - top[0])


# Reference sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetPlan:
    """A set to be made: sizes under the names of meta.json, special ids, and what its losses and searches ask for."""

    seed: int
    sizes: dict[str, Any]
    special: dict[str, int]
    images: int
    drop_worst: float
    smoothing: float
    searches: dict[str, dict[str, Any]]


def plan_search(beams: int, steps: int, least: int = 0, bonus: float = 0.0, ngram: int = 0, free: int = 0) -> Any:
    """The parameters of a beam case; the first `free` tokens may be repeated."""
    return {
        "beam_size": beams,
        "length_penalty": bonus,
        "min_len": least,
        "forbid_duplicate_ngrams": ngram > 0,
        "ngram_size": ngram or 3,
        "forbid_ignore_ids": list(range(10, 10 + free)),
        "max_tgt_length": steps,
    }


def plan_sizes(**changes: Any) -> dict[str, Any]:
    """The config of a meta.json; lengths follow from the rest."""
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
        "hidden_act": "gelu", "max_position_embeddings": 64, "type_vocab_size": 6, "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "relax_projection": 0, "len_vis_input": 9,
        "region_feat_dim": 32, "region_geometry_dim": 6, "region_num_classes": 17, "vqa_num_answers": 11,
        "new_segment_ids": True, "max_len_b": 8, "max_tgt_length": 8,
    }  # fmt: skip
    sizes |= changes
    return sizes | {"max_seq_length": sizes["max_len_b"] + sizes["len_vis_input"] + 3}


RELAXED_SIZES = plan_sizes(
    vocab_size=47, hidden_size=32, num_hidden_layers=1, num_attention_heads=8, intermediate_size=24,
    type_vocab_size=2, new_segment_ids=False, relax_projection=4, len_vis_input=19, region_feat_dim=12,
    region_num_classes=5, vqa_num_answers=7, max_len_b=5, max_tgt_length=6, max_position_embeddings=40,
)  # fmt: skip
PLANS = {
    # Token types of their own, an image more than samples, special tokens at odd places.
    "other_sizes": SetPlan(
        seed=34,
        sizes=plan_sizes(),
        special={"[PAD]": 0, "[UNK]": 41, "[CLS]": 7, "[SEP]": 60, "[MASK]": 2},
        images=4,
        drop_worst=0.34,
        smoothing=0.25,
        searches={
            "beam2": plan_search(2, 8),
            "beam4": plan_search(4, 8),
            "beam4_bonus": plan_search(4, 8, bonus=0.75),
            "beam3_malus": plan_search(3, 8, bonus=-0.5),
            "beam3_minlen": plan_search(3, 8, least=4),
            "beam3_norepeat2": plan_search(3, 8, least=8, ngram=2),
            "beam3_norepeat3_ignore": plan_search(3, 8, least=8, ngram=3, free=20),
        },
    ),
    # The older token types, a relaxed LM head with a slice a task, one layer, more regions than the features are wide.
    "relaxed": SetPlan(
        seed=15,
        sizes=RELAXED_SIZES,
        special={"[PAD]": 0, "[UNK]": 3, "[CLS]": 46, "[SEP]": 1, "[MASK]": 20},
        images=2,
        drop_worst=0.6,
        smoothing=0.05,
        searches={"beam3": plan_search(3, 6), "beam5_norepeat2": plan_search(5, 6, least=3, ngram=2, bonus=0.3)},
    ),
}
WORDS = ("a", "A", "the", "man", "dog", "##s", "ball", "##ing", "play", "##er", "caf", "##é", "日", "-", "'", ".", "!")
SENTENCES = (
    "A man plays the ball.",
    "the dogs' player - playing!",
    "THE café\tcafe",
    "日本 a日ball\u0000s",
    "b" * 101 + " a " + "man" * 2,
)
SCALES = {"vis_embed.0.weight": 2.0**-8, "vis_embed.2.weight": 2.0**-8, "ans_classifier.2.weight": 2.0**-7}
GRADIENTS = (
    *("bert.embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"),
    *("bert.embeddings.token_type_embeddings.weight", "bert.embeddings.LayerNorm.weight", "vis_embed.0.weight"),
    *("vis_pe_embed.0.weight", "bert.encoder.layer.0.attention.self.key.weight", "cls.predictions.bias"),
    *("cls.predictions.transform.dense.weight", "bert.encoder.layer.0.intermediate.dense.bias"),
)
SAFE_MARGIN = 1e-3  # decisions nearer than this may fall otherwise in float32
# Spread of weights, by name: large enough that each token changes what follows, and not so large that float32 rounds
# gradients to more than a fifth of the tolerance.
GAINS = {"word_emb": 0.6, "position_emb": 1.5, "_embeddings": 0.5, "query": 1.5, "key": 1.5, "value": 3.0, "": 1.4}
# Of the embeddings: a sum of small variance, which the eps of the LayerNorm behind it changes visibly.
FAINT = 0.1
ENDS_GAIN = 2.0  # added to the bias of [SEP], so that some captions end


class SetMaker:
    """Draws a model and its inputs, runs the slow VLP, and writes a reference set."""

    def __init__(self, plan: SetPlan, seed: int) -> None:
        self.plan, self.sizes, self.special = plan, plan.sizes, plan.special
        self.rng = torch.Generator().manual_seed(seed)
        self.vocabulary = self.draw_vocabulary()
        self.scales: dict[str, dict[str, float]] = {"weights": {}, "inputs": {}}
        self.weights = {name: self.draw_weight(name, shape) for name, shape in list_shapes(self.sizes).items()}
        self.weights["cls.predictions.decoder.weight"] = self.weights["bert.embeddings.word_embeddings.weight"].clone()
        self.slow = SlowVlp(self.sizes, {name: self.widen("weights", name) for name in self.weights})
        self.inputs: dict[str, Tensor] = {}
        self.expected: dict[str, Tensor] = {}
        self.cases: list[dict[str, Any]] = []
        self.margin = math.inf
        self.known: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def draw_vocabulary(self) -> list[str]:
        fillers = [f"w{number}" if number % 3 else f"##w{number}" for number in range(self.sizes["vocab_size"])]
        places = [place for place in range(self.sizes["vocab_size"]) if place not in self.special.values()]
        vocabulary = dict(zip(places, [*WORDS, *fillers], strict=False))
        vocabulary |= {place: token for token, place in self.special.items()}
        return [vocabulary[place] for place in range(self.sizes["vocab_size"])]

    def draw_weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            weight = 0.1 * self.draw(*shape) + name.endswith("LayerNorm.weight")
        else:
            gain = next(gain for part, gain in GAINS.items() if part in name)
            weight = self.draw(*shape) * (gain * FAINT if "_embeddings" in name else gain / math.sqrt(shape[1]))
        if name.startswith("cls.predictions.transform.LayerNorm"):
            weight /= FAINT  # back to logits of the usual size: the output layer is the word embedding
        if name == "cls.predictions.bias":
            weight[self.special["[SEP]"]] += ENDS_GAIN
        if name == "ans_classifier.2.bias":
            weight[0] = 30.0  # the answer that is never given would always win
        return self.pack("weights", name, weight, SCALES.get(name))

    def pack(self, kind: str, name: str, values: Tensor, scale: float | None) -> Tensor:
        """As it is stored: 16 bits, or 8 with a scale."""
        if scale is None:
            return values.half()
        self.scales[kind][name] = scale
        return (values / scale).round().clamp(-127, 127).to(torch.int8)

    def widen(self, kind: str, name: str) -> Tensor:
        stored = (self.weights if kind == "weights" else self.inputs)[name]
        return stored.double() * self.scales[kind].get(name, 1.0) if stored.dtype != torch.int32 else stored.long()

    # --- cases ---

    def add_case(self, name: str, tier: str, expected: Mapping[str, Tensor], **more: Any) -> None:
        debug = more.pop("debug", {})
        tensors = {f"{name.split('.')[0]}.{key}": tensor.detach() for key, tensor in {**expected, **debug}.items()}
        for key, tensor in tensors.items():
            whole = torch.int32 if tensor.dtype == torch.int64 else tensor.dtype
            self.expected[key] = (tensor.float() if tensor.is_floating_point() else tensor.to(whole)).contiguous()
        names = list(tensors)
        listed = {"expected": names[: len(expected)]} | ({"debug_expected": names[len(expected) :]} if debug else {})
        self.cases.append({"id": name, "tier": tier, "what": "made", "inputs": []} | listed | more)

    def add_images(self) -> None:
        count, classes = self.sizes["len_vis_input"], self.sizes["region_num_classes"]
        for image in range(self.plan.images):
            feature = self.draw(count, self.sizes["region_feat_dim"]).clamp(min=0) * 2
            name = f"image.{image}.region_feat"
            self.inputs[name] = self.pack("inputs", name, feature, 2.0**-4)
            self.inputs[f"image.{image}.cls_prob"] = (self.draw(count, classes) * 2).softmax(dim=1).half()
            corners = torch.rand(count, 4, generator=self.rng) * 300  # some have no area
            rest = torch.rand(count, 2, generator=self.rng)
            self.inputs[f"image.{image}.bbox"] = torch.cat([corners, rest], dim=1)
        places = torch.stack([self.see([image]).places[0] for image in range(self.plan.images)])
        self.add_case("prep", "core", {"vis_pe_geometry": places[..., :6], "vis_pe_class_first4": places[:, :4, 6:]})

    def see(self, images: Sequence[int]) -> Seen:
        features = [self.widen("inputs", f"image.{image}.region_feat") for image in images]
        places = [
            locate(*(self.widen("inputs", f"image.{image}.{name}") for name in ("bbox", "cls_prob")))
            for image in images
        ]
        return Seen(torch.stack(features), torch.stack(places))

    def add_layout(self, name: str, owner: str, mode: str) -> None:
        """Four texts: one too long, one of one token."""
        longest = self.sizes["max_len_b"]
        lengths = (longest + 3, 1, longest, longest // 2)
        texts = [torch.randint(1, self.sizes["vocab_size"], (length,), generator=self.rng) for length in lengths]
        padded = torch.full((4, longest + 3), -1, dtype=torch.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        total = self.sizes["max_seq_length"]
        rows = [lay_text(text.tolist(), mode, self.sizes, self.special, total) for text in texts]
        ids, types, mask = (torch.tensor(part) for part in zip(*rows, strict=True))
        self.inputs |= {f"layout_{name}.text_ids": padded, f"{owner}.attention_mask": mask.to(torch.uint8)}
        images = torch.randint(self.plan.images, (4,), generator=self.rng, dtype=torch.int32)
        self.inputs |= {f"{owner}.image_index": images, f"{owner}.segment_ids": types.int()}
        self.inputs[f"{owner}.input_ids"] = ids.int()
        params = {"mode": mode, "max_len_b": longest, "max_seq_length": total}
        named = {"expected_in_inputs": [f"{owner}.attention_mask"]}
        self.add_case(f"layout_{name}", "core", {"input_ids": ids, "segment_ids": types}, params=params, **named)

    def add_masked_lm(self, mode: str) -> None:
        owner = f"mlm_{mode}"
        self.add_layout(mode, owner, mode)
        self.mask_inputs(owner)
        given = self.read(owner)
        embedded, states, pooled = self.slow.run(*given)
        places, labels, weights = (
            self.widen("inputs", f"{owner}.{n}") for n in ("masked_pos", "labels", "masked_weights")
        )
        picked = torch.stack([row[place] for row, place in zip(states, places, strict=True)])
        logits = self.slow.predict_tokens(picked, mode)
        share, smoothing = self.plan.drop_worst, self.plan.smoothing
        loss = masked_loss(logits, labels, weights, 0.0, 0.0).reshape(1)
        dropped = masked_loss(logits, labels, weights, share, 0.0).reshape(1)
        smoothed = masked_loss(logits, labels, weights, 0.0, smoothing).reshape(1)
        params = {"task_idx": TASKS[mode], "drop_worst_ratio": 0.0}
        self.add_case(owner, "core", {"masked_logits": logits, "loss": loss}, params=params)
        internals = {"sequence_output": states, "pooled_output": pooled, "embedding_output": embedded}
        self.add_case(f"{owner}.internals", "debug", internals)
        variants = {f"loss_drop_worst_{share}": dropped, f"loss_label_smoothing_{smoothing}": smoothed}
        self.add_case(f"{owner}.loss_variants", "extra", variants)
        leaves = {name: self.slow.weights[name] for name in GRADIENTS}
        found = torch.autograd.grad(loss, list(leaves.values()))
        self.add_case(f"grad_{owner}", "extra", dict(zip(leaves, found, strict=True)))

    def mask_inputs(self, owner: str) -> None:
        """Three slots a sample, the last ones unused in some."""
        prefix, ids = self.sizes["len_vis_input"] + 2, self.inputs[f"{owner}.input_ids"]
        slots = {
            name: torch.zeros(len(ids), 3, dtype=torch.int32) for name in ("masked_pos", "labels", "masked_weights")
        }
        for row in range(len(ids)):
            real = int(self.inputs[f"{owner}.attention_mask"][row].diagonal().sum())
            order = torch.randperm(real - prefix, generator=self.rng)[: 1 + row % 3]
            for slot, place in enumerate((order + prefix).tolist()):
                slots["masked_pos"][row, slot], slots["masked_weights"][row, slot] = place, 1
                slots["labels"][row, slot] = ids[row, place]
                ids[row, place] = self.special["[MASK]"]
        self.inputs |= {f"{owner}.{name}": tensor for name, tensor in slots.items()}

    def read(self, owner: str) -> tuple[Seen, Tensor, Tensor, Tensor]:
        ids, types = (self.widen("inputs", f"{owner}.{name}") for name in ("input_ids", "segment_ids"))
        seen = self.see(self.inputs[f"{owner}.image_index"].tolist())
        return seen, ids, types, self.inputs[f"{owner}.attention_mask"]

    def add_answers(self) -> None:
        self.add_layout("vqa", "vqa", "bi")
        scores = torch.rand(4, self.sizes["vqa_num_answers"], generator=self.rng)
        self.inputs["vqa.answer_scores"] = scores
        _, states, _ = self.slow.run(*self.read("vqa"))
        logits = self.slow.predict_answers(states)
        best = logits[:, 1:].detach().topk(2, dim=1).values
        self.margin = min(self.margin, float((best[:, 0] - best[:, 1]).min()))
        found = {"logits": logits, "answer_index": logits[:, 1:].argmax(dim=1) + 1}
        loss = answer_loss(logits, scores.double()).reshape(1)
        self.add_case("vqa", "core", {**found, "loss": loss}, params={"task_idx": 0})

    # --- writing captions ---

    def next_logits(self, image: int, text: tuple[int, ...]) -> Tensor:
        """Logits of the token behind `text`: a whole forward with one [MASK]."""
        if (image, text) not in self.known:
            prefix = self.sizes["len_vis_input"] + 2
            total = prefix + len(text) + 1
            ids, types, mask = lay_text([], "s2s", self.sizes, self.special, prefix + 1)
            ids = [*ids[:prefix], *text, self.special["[MASK]"]]
            types = [*types[:prefix], *[types[-1]] * (len(text) + 1)]
            mask = [[int(sees(query, key, "s2s", prefix, total)) for key in range(total)] for query in range(total)]
            given = (torch.tensor([part]) for part in (ids, types, mask))
            with torch.no_grad():
                _, states, _ = self.slow.run(self.see([image]), *given)
                self.known[image, text] = self.slow.predict_tokens(states[0, -1], "s2s")
        return self.known[image, text]

    def add_captions(self) -> None:
        images = list(range(self.plan.images))
        self.inputs["decode.image_index"] = torch.tensor(images[::-1], dtype=torch.int32)
        self.add_decode_layout(len(images))
        self.add_greedy(images[::-1])
        for name, params in self.plan.searches.items():
            self.add_beams(name, params, images[::-1])

    def add_decode_layout(self, count: int) -> None:
        steps, prefix = self.sizes["max_tgt_length"], self.sizes["len_vis_input"] + 2
        ids, types, _ = lay_text([], "s2s", self.sizes, self.special, prefix + 1)
        total = prefix + steps
        mask = [[int(key < prefix or prefix <= key <= query) for key in range(total)] for query in range(total)]
        expected = {
            "input_ids": torch.tensor([ids[:prefix]] * count),
            "segment_ids": torch.tensor([types[:prefix] + [types[-1]] * steps] * count),
            "position_ids": torch.tensor([list(range(total))] * count),
            "attention_mask": torch.tensor([mask] * count, dtype=torch.uint8),
        }
        self.add_case("layout_decode", "core", expected, params={"max_tgt_length": steps})

    def add_greedy(self, images: Sequence[int]) -> None:
        steps, rows, logits = self.sizes["max_tgt_length"], [], []
        for image in images:
            text: tuple[int, ...] = ()
            for _ in range(steps):
                logits.append(self.next_logits(image, text))
                best = logits[-1].topk(2).values
                self.margin = min(self.margin, float(best[0] - best[1]))
                text = (*text, int(logits[-1].argmax()))
            rows.append(text)
        steps_logits = torch.stack(logits).view(len(images), steps, -1)
        found = {"ids": torch.tensor(rows), "max_logit": steps_logits.amax(dim=2), "step_logits": steps_logits}
        captions = [join_pieces(text, self.vocabulary) for text in rows]
        self.add_case("greedy", "core", found, params={"beam_size": 1, "max_tgt_length": steps}, captions=captions)

    def add_beams(self, name: str, params: Mapping[str, Any], images: Sequence[int]) -> None:
        steps, beams = params["max_tgt_length"], params["beam_size"]
        size = params["ngram_size"] if params["forbid_duplicate_ngrams"] else 0
        free = frozenset(params["forbid_ignore_ids"])
        rules = Rules(beams, steps, self.special["[SEP]"], params["min_len"], params["length_penalty"], size, free)
        found = [search_beams(lambda text, image=image: self.next_logits(image, text), rules) for image in images]
        self.margin = min([self.margin, *(one.margin for one in found)])
        padded = [[*one.text, *[0] * (steps - len(one.text))] for one in found]
        expected = {
            "pred_seq": torch.tensor(padded),
            "pred_len": torch.tensor([len(one.text) for one in found]),
            "best_score": torch.tensor([one.score for one in found], dtype=torch.float64),
        }
        # What follows the last valid frame means nothing.
        nothing = [Slot(BLOCKED, (0,), 0)] * beams
        frames = [one.frames + [nothing] * (steps - len(one.frames)) for one in found]
        debug = {
            "scores": torch.tensor([[[slot.score for slot in frame] for frame in one] for one in frames]),
            "wids": torch.tensor([[[slot.text[-1] for slot in frame] for frame in one] for one in frames]),
            "ptrs": torch.tensor([[[slot.parent for slot in frame] for frame in one] for one in frames]),
            "last_valid_frame": torch.tensor([one.last for one in found]),
        }
        captions = [join_pieces(one.text, self.vocabulary) for one in found]
        self.add_case(name, "core", expected, debug=debug, params=dict(params), captions=captions)

    # --- the folder ---

    def make(self) -> None:
        self.add_images()
        self.cases.append({"id": "tokenizer", "tier": "core", "what": "made", "inputs": [], "expected": []})
        for mode in TASKS:
            self.add_masked_lm(mode)
        self.add_answers()
        self.add_captions()

    def is_telling(self) -> bool:
        """Whether captions end early, late and not at all, the rules change some, and no decision is too near."""
        searches = {name: self.expected[f"{name}.pred_seq"] for name in self.plan.searches}
        lengths = {int(length) for name in searches for length in self.expected[f"{name}.pred_len"]}
        steps = self.sizes["max_tgt_length"]
        results = {tuple(map(tuple, found.tolist())) for found in searches.values()}
        has_lengths = bool(lengths & set(range(2, steps))) and steps in lengths
        return has_lengths and len(results) > len(searches) / 2 and self.margin > SAFE_MARGIN

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("weights", "inputs", "expected"):
            save_file(getattr(self, name), folder / f"{name}.safetensors")
        (folder / "vocab.txt").write_text("\n".join(self.vocabulary) + "\n", encoding="utf-8")
        numbers = {word: number for number, word in enumerate(self.vocabulary)}
        split = {text: split_text(text, self.vocabulary) for text in SENTENCES}
        meta = {
            "format_version": 1,
            "config": self.sizes,
            "special_tokens": self.special,
            "files": {"vocab": "vocab.txt"}
            | {name: f"{name}.safetensors" for name in ("weights", "inputs", "expected")},
            "loading": {"int8_scales": self.scales},
            "n_images": self.plan.images,
            "tolerances": {"float_atol": 1e-4, "float_rtol": 1e-4},
            "tokenizer_examples": [
                {"text": text, "tokens": pieces, "ids": [numbers[piece] for piece in pieces]}
                for text, pieces in split.items()
            ],
            "cases": self.cases,
        }
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        return folder


def make_set(folder: Path, plan: SetPlan) -> Path:
    """Write the set of the first telling seed, from the plan's own on."""
    for seed in range(plan.seed, plan.seed + 20):
        maker = SetMaker(plan, seed)
        maker.make()
        if maker.is_telling():
            return maker.write(folder)
    raise AssertionError("no seed makes a telling set")
