"""The tables that Diffusers' pipelines and training scripts read of a scheduler, and what they may be assigned."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import on_cpu
from .configuration import betas_of_log_snrs


class BetaTables:
    """`betas`, `alphas` and `alphas_cumprod` under Diffusers' names and in its float32. Nothing computes with them.

    Recipes assign to them or write into them, the one for zero terminal SNR for example: then they are what counts,
    and a scheduler asks `changed` for the betas that follow.

    Arguments:
        log_snrs: (T,) of x_1..x_T, float64.
        betas: (T,) float64, if they are known better than log SNR tells them.
    """

    @on_cpu
    def __init__(self, log_snrs: Tensor, betas: Tensor | None = None):
        self.exact = log_snrs.sigmoid()  # alpha_bar, float64
        betas = betas_of_log_snrs(log_snrs) if betas is None else betas
        self.named = {
            "betas": betas.float(),
            "alphas": (1 - betas).float(),
            "alphas_cumprod": self.exact.float(),
        }
        self._made = {name: table.clone() for name, table in self.named.items()}
        self._seen = self._state()

    def _state(self) -> list[tuple[int, int]]:
        """Which tensors stand under the names, and how often they were written into."""
        return [(id(table), 0 if table.is_inference() else table._version) for table in self.named.values()]

    def put(self, name: str, value: Tensor) -> None:
        """Let `value` stand under `name`. See `changed` for whether it says something new."""
        self.named[name] = value

    def changed(self) -> Tensor | None:
        """(T,) the betas, float64, that what was assigned or written means; None if it is the tables as they were
        made.

        Moved to another device or dtype, or multiplied out anew in float32, they are as they were.
        """
        if self._state() == self._seen:
            return None
        self._seen = self._state()
        for name, made in self._made.items():
            table = self.named[name].detach()
            if table.shape == made.shape and torch.equal(table.cpu(), made.to(table.dtype)):
                continue
            value = table.double().cpu()
            if (
                name == "alphas_cumprod"
                and len(value) == len(self.exact)
                and bool(same_to_rounding(value, self.exact).all())
            ):
                continue
            if name == "betas":
                return value
            if name == "alphas":
                return 1 - value
            return 1 - value / torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), value[:-1]])
        return None


def same_to_rounding(alphas_cumprod: Tensor, exact: Tensor) -> Tensor:
    """Whether each entry of a product that float32 has rounded is the exact one, as far as such a product can tell:
    (T,) bool.
    """
    steps = torch.arange(3, len(exact) + 3, dtype=torch.float64)
    # each factor of the product is rounded; rescaling to zero terminal SNR also rounds the difference of roots
    tolerance = 2.0**-24 * (steps * exact + 4 * exact.sqrt())
    return (alphas_cumprod - exact).abs() <= tolerance
