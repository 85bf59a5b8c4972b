"""BertAdam: no bias correction, each tensor clipped by itself, decay apart from the gradient, linear rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from training.bert_adam import BertAdam, group_parameters, linear_rate


def test_updates_follow_the_formula() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    expected, mean, square = weight.detach().double().clone(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    optimiser = BertAdam([weight], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01, clip_norm=1.0)
    for step in range(5):
        gradient = torch.randn(3, 4) * (10.0 if step % 2 else 0.01)  # once clipped, once not
        weight.grad = gradient.clone()
        optimiser.step()
        clipped = gradient.double() / max(1.0, float(gradient.norm()))
        mean = 0.8 * mean + 0.2 * clipped
        square = 0.95 * square + 0.05 * clipped**2
        expected = expected - 0.1 * (mean / (square.sqrt() + 1e-6) + 0.01 * expected)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_one_great_gradient_leaves_other_tensors_alone() -> None:
    small, great = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimiser = BertAdam([small, great], lr=1.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0)
    small.grad, great.grad = torch.tensor([0.3, 0.4]), torch.tensor([300.0, 400.0])
    optimiser.step()
    torch.testing.assert_close(small.detach(), -torch.tensor([0.3 / 1.3, 0.4 / 1.4]))
    torch.testing.assert_close(great.detach(), -torch.tensor([0.6 / 1.6, 0.8 / 1.8]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)),
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
])  # fmt: skip
def test_no_backbone_has_its_normalisations_decayed(network: nn.Module) -> None:
    decayed, plain = group_parameters(network, 0.01)
    vectors = {id(weight) for weight in network.parameters() if weight.dim() <= 1}
    assert {id(weight) for weight in plain["params"]} == vectors
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)


def test_rate_rises_over_a_tenth_and_falls_to_nothing() -> None:
    rates = [linear_rate(step, 100, 0.1) for step in range(101)]
    assert rates[0] == 0.0 and rates[5] == pytest.approx(0.5) and rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5) and rates[100] == 0.0
