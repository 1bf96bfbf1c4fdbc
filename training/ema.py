"""An exponential moving average of a network's weights, kept as a network of its own: ready to evaluate, sample and save."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_decay(step: int, *, inv_gamma: float, power: float, max_decay: float) -> float:
    """The decay at optimiser step 1, 2, ...: 1 - (1 + (step - 1) / inv_gamma)^-power, at most max_decay; 0 at the first.

    The warm-up of Diffusers' `EMAModel`, counted in optimiser steps.
    """
    return min(max_decay, 1 - (1 + (step - 1) / inv_gamma) ** -power)


class EMA:
    """average <- decay average + (1 - decay) weights, for all weights in one call.

    Attributes:
        model: a copy of the network in eval mode, without gradients, that holds the average.
    """

    def __init__(self, model: nn.Module, *, inv_gamma: float, power: float, max_decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.inv_gamma, self.power, self.max_decay = inv_gamma, power, max_decay
        self._averages, self._weights = list(self.model.parameters()), list(model.parameters())
        self._copies = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> float:
        """Take in the weights after optimiser step `step` (1, 2, ...); returns the decay. Buffers are copied."""
        decay = ema_decay(step, inv_gamma=self.inv_gamma, power=self.power, max_decay=self.max_decay)
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for average, buffer in self._copies:
            average.copy_(buffer)
        return decay
