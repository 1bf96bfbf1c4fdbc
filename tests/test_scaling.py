"""What benchmarks/scaling.py counts and extrapolates, against closed forms."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


class Two(nn.Module):
    """Two 3x3 convolutions with a sigmoid between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 5, 3, padding=1)

    def forward(self, sample, timestep, return_dict=False):
        return (self.second(torch.sigmoid(self.first(sample))),)


def test_operations_weights_and_what_is_kept_are_counted():
    cost = scaling.cost(Two, 11, 3)
    assert cost.weights == 7 * 27 + 7 + 5 * 63 + 5
    pixels = 11 * 11
    # forward; backward by the weights, twice; backward by the input, of the second alone
    assert cost.flops == 2 * pixels * (2 * 7 * 27 + 3 * 5 * 63)
    assert cost.saved_bytes == 4 * pixels * (3 + 7)  # the sample, and the sigmoid's result, which both sides need


def test_attention_is_counted():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "patch_size": 1, "norm_num_groups": 1}

    def flops(size):
        return scaling.cost(lambda: DiTTransformer2DModel(sample_size=8, in_channels=4, **sizes), size, 4).flops

    tokens = 64
    quadratic = 3 * 2 * 2 * tokens**2 * 8  # queries by keys, weights by values: forward and twice backward
    linear = flops(8) - quadratic
    assert linear > 0
    assert linear < 3 * 2 * tokens * 8 * 8 * 30


def test_an_extrapolation_by_hand():
    cost = scaling.Cost(weights=100, flops=6e9, saved_bytes=8e6)
    machine = scaling.Machine(peak=1e12, share=0.5, link=1e3, network=1e2, gpus=8)
    whole = scaling.extrapolate(cost, machine, num_gpus=8, images_per_gpu=4, divided=False)
    assert whole.compute_seconds == pytest.approx(4 * 6e9 / 5e11)
    assert whole.exchange_seconds == pytest.approx(2 * 7 / 8 * 400 / 1e3)
    assert (whole.state_bytes, whole.activation_bytes) == (2000, 1.6e7)
    divided = scaling.extrapolate(cost, machine, num_gpus=16, images_per_gpu=4, divided=True)
    assert divided.exchange_seconds == pytest.approx(3 * 15 / 16 * 400 / 1e2)
    assert divided.state_bytes == 125
