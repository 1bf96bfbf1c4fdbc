"""An exponential moving average of a network's weights, kept as a network of its own: ready to evaluate, sample and
save.
"""

from __future__ import annotations

import copy

import torch
from sharding import local
from torch import nn


def ema_decay(step: int, *, inv_gamma: float, power: float, max_decay: float) -> float:
    """The decay at optimiser step 1, 2, ...: 1 - (1 + (step - 1) / inv_gamma)^-power, at most max_decay; 0 at the
    first.

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
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average the weights of `model` from here on: where they are divided among processes, each averages its
        share.
        """
        self._averages = [local(parameter) for parameter in self.model.parameters()]
        self._weights = [local(parameter) for parameter in model.parameters()]
        self._copies = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> float:
        """Take in the weights after optimiser step `step` (1, 2, ...); returns the decay. Buffers are copied."""
        decay = ema_decay(step, inv_gamma=self.inv_gamma, power=self.power, max_decay=self.max_decay)
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for average, buffer in self._copies:
            average.copy_(buffer)
        return decay
