"""VLP's unified transformer (Zhou et al., AAAI 2020): BERT, post-LN, over regions and text in one sequence.

Parameters carry the names of the original release, so that its state dicts fit as they are. Attention is torch's SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.vlp.config import VlpConfig

INITIALISER_RANGE = 0.02


@dataclass(frozen=True, slots=True)
class SeenRegions:
    """Regions as the transformer takes them: `features` [N, R, F] and `places` [N, R, 6 + C] (locate_regions)."""

    features: Tensor
    places: Tensor


class LayerCache:
    """Keys and values [N, heads, positions, head size] of one layer; positions beyond `length` are free."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new positions behind the valid ones, and return all; `length` is the caller's to move on."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class SelfAttention(nn.Module):
    """The three projections and SDPA; dropout of the attention in training only."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.drop = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, visible: Tensor | None, cache: LayerCache | None) -> Tensor:
        """`hidden` [N, L, H]; `visible` bool, broadcast to [N, heads, L, keys], None where all is visible."""
        query, key, value = (self._split(layer(hidden)) for layer in (self.query, self.key, self.value))
        if cache is not None:
            key, value = cache.extend(key, value)
        drop = self.drop if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=drop)
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], self.heads, -1).transpose(1, 2)


class Residual(nn.Module):
    """Linear, dropout, sum, LayerNorm: how both halves of a layer end."""

    def __init__(self, width: int, config: VlpConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        """`inner` [N, L, width] is projected and added to `hidden` [N, L, H]."""
        normed: Tensor = self.LayerNorm(hidden + self.dropout(self.dense(inner)))
        return normed


class Attention(nn.Module):
    """Self-attention with its residual, under the release's names."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, hidden: Tensor, visible: Tensor | None, cache: LayerCache | None) -> Tensor:
        """[N, L, H] to [N, L, H]."""
        mixed: Tensor = self.output(self.self(hidden, visible, cache), hidden)
        return mixed


class Intermediate(nn.Module):
    """The wide half of the feed-forward network; GELU in its exact (erf) form."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, L, H] to [N, L, intermediate]."""
        return functional.gelu(self.dense(hidden))


class Layer(nn.Module):
    """One post-LN transformer layer."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, hidden: Tensor, visible: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """[N, L, H] to [N, L, H]."""
        mixed = self.attention(hidden, visible, cache)
        result: Tensor = self.output(self.intermediate(mixed), mixed)
        return result


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, visible: Tensor | None, caches: Sequence[LayerCache] | None = None) -> Tensor:
        """Run all layers; with `caches`, `hidden` is behind what they hold."""
        for number, layer in enumerate(self.layer):
            hidden = layer(hidden, visible, caches[number] if caches is not None else None)
        return hidden


class Embeddings(nn.Module):
    """Tables of words, positions and token types, and the LayerNorm over their sum."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, types: Tensor, positions: Tensor, seen: Tensor | None = None) -> Tensor:
        """`ids`, `types` [N, L] and `positions` [L] to [N, L, H].

        `seen` [N, R, H] takes the place of word and position at positions 1 .. R: a region's place in the picture
        stands in for its place in the sequence.
        """
        looked_up = self.word_embeddings(ids) + self.position_embeddings(positions)
        if seen is not None:
            looked_up = torch.cat([looked_up[:, :1], seen, looked_up[:, 1 + seen.shape[1] :]], dim=1)
        embedded: Tensor = self.dropout(self.LayerNorm(looked_up + self.token_type_embeddings(types)))
        return embedded


class Pooler(nn.Module):
    """tanh over [CLS]. In every released checkpoint, read by no objective."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, L, H] to [N, H]."""
        return torch.tanh(self.dense(hidden[:, 0]))


class Bert(nn.Module):
    """What the release calls `bert`: embeddings, encoder, pooler."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)


class Transform(nn.Module):
    """Before the vocabulary: linear, GELU, LayerNorm; with `relax_projection` R one slice of R a task."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.slices = max(1, config.relax_projection)
        width = self.slices * config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, task: int) -> Tensor:
        """[..., H] to [..., H]; `task` picks the slice."""
        normed: Tensor = self.LayerNorm(functional.gelu(self.dense(hidden)))
        if self.slices == 1:
            return normed
        return normed.view(*hidden.shape[:-1], self.slices, hidden.shape[-1])[..., task, :]


class Predictions(nn.Module):
    """The LM head; `decoder` shares the word embeddings."""

    def __init__(self, config: VlpConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder.weight = words.weight
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, task: int) -> Tensor:
        """[..., H] to logits [..., V]."""
        logits: Tensor = self.decoder(self.transform(hidden, task)) + self.bias
        return logits


class Heads(nn.Module):
    """What the release calls `cls`."""

    def __init__(self, config: VlpConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.predictions = Predictions(config, words)


class VlpModel(nn.Module):
    """The unified transformer with its heads. All shapes: N batch, R regions, L sequence, H width, V vocabulary."""

    def __init__(self, config: VlpConfig) -> None:
        super().__init__()
        self.config = config
        features, width = config.region_feat_dim, config.hidden_size
        drop = config.hidden_dropout_prob
        self.bert = Bert(config)
        self.cls = Heads(config, self.bert.embeddings.word_embeddings)
        # The first layer is the detector's fc7, trained on.
        self.vis_embed = nn.Sequential(
            nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width), nn.ReLU(), nn.Dropout(drop)
        )
        self.vis_pe_embed = nn.Sequential(nn.Linear(config.place_dim, width), nn.ReLU(), nn.Dropout(drop))
        if config.num_answers:
            self.ans_classifier = nn.Sequential(
                nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, config.num_answers)
            )
        self.apply(_set_weights)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.cls.predictions.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        return self.cls.predictions.bias.dtype

    def embed_regions(self, regions: SeenRegions) -> Tensor:
        """[N, R, H]: what a region looks like plus where and what it is."""
        features, places = regions.features.to(self.dtype), regions.places.to(self.dtype)
        seen: Tensor = self.vis_embed(features) + self.vis_pe_embed(places)
        return seen

    def embed(self, regions: SeenRegions, ids: Tensor, types: Tensor) -> Tensor:
        """The sequence before the first layer [N, L, H]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        embedded: Tensor = self.bert.embeddings(ids, types, positions, self.embed_regions(regions))
        return embedded

    def forward(self, regions: SeenRegions, ids: Tensor, types: Tensor, visible: Tensor) -> Tensor:
        """Final states [N, L, H]; `ids`, `types` [N, L], `visible` bool [N, L, L] (query, key)."""
        hidden: Tensor = self.bert.encoder(self.embed(regions, ids, types), visible[:, None])
        return hidden

    def predict_tokens(self, hidden: Tensor, task: int) -> Tensor:
        """LM logits [..., V] of states [..., H]."""
        logits: Tensor = self.cls.predictions(hidden, task)
        return logits

    def predict_masked(self, hidden: Tensor, places: Tensor, task: int) -> Tensor:
        """LM logits [N, P, V] of the positions `places` [N, P]."""
        wide = places[:, :, None].expand(-1, -1, hidden.shape[2])
        return self.predict_tokens(hidden.gather(1, wide), task)

    def predict_answers(self, hidden: Tensor) -> Tensor:
        """VQA logits [N, A]: from the product of [CLS] and of the [SEP] between regions and question."""
        fused = hidden[:, 0] * hidden[:, self.config.prefix_length - 1]
        logits: Tensor = self.ans_classifier(fused)
        return logits


def _set_weights(module: nn.Module) -> None:
    """BERT's initialisation."""
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.data.normal_(0.0, INITIALISER_RANGE)
    if isinstance(module, nn.Linear) and module.bias is not None:
        module.bias.data.zero_()
