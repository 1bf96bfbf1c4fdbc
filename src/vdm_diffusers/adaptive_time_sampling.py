r"""Importance sampling of the training times, from a history of the losses in bins of log SNR.

The objective is an integral over t in [0, 1] of the expected loss f. Drawn with a density p(t), a time's loss counts f
/ p: the expectation stays, the scatter becomes smallest for

    independent t     p(t) proportional to sqrt(E[f^2 | t])          (second_moment)
    stratified t      p(t) proportional to sqrt(Var[f | t])          (variance: strata remove what depends on t alone)

f is not known, but the losses that training computes anyway show it. Sampling this way and reshaping the noise
schedule are the same thing said twice: log SNR(t) at t ~ p is a schedule of its own, and for the `elbo` objective f /
p is its loss. Unlike a learned schedule the sampler serves every objective, VDM++'s weightings among them, and has no
parameters to learn.

Source: Nichol & Dhariwal 2021, "Improved DDPM", section 3.3 (by timestep); Kingma & Gao 2023, "Understanding diffusion
objectives as the ELBO with simple data augmentation", section 5 and appendix F (in bins of log SNR).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .noise_schedules import NoiseSchedule

Statistic = Literal["second_moment", "variance"]
STATISTICS: tuple[str, ...] = get_args(Statistic)
_LOWEST = -20.0  # below this log SNR nothing is left to predict: an infinite range ends here


class AdaptiveTimeSampler:
    r"""A density over time, constant on the bins, that follows the losses.

    One optimiser step of a training loop:

        t, weight = sampler.place(low_discrepancy(batch_size))      # weight = 1 / p(t)
        losses = ...                                                # (B,) at t, as if t were uniform
        (weight * losses).mean().backward()
        sampler.update(sampler.sums(t, losses))                     # several processes: the sum of their sums

    The history forgets: every update multiplies what was there by `decay`. Until each bin has been visited `warmup`
    times, one half of the times are uniform and the other half visit all bins alike (with a schedule linear in log
    SNR: all are uniform).

    Arguments:
        schedule: the noise schedule whose times are drawn. The bins have equal widths in log SNR.
        num_bins: their number.
        statistic: 'second_moment' or 'variance', see the module.
        decay: of the history, for each update, in [0, 1).
        uniform_share: share of the times drawn uniformly, in (0, 1], so that no bin is forgotten and no weight exceeds
            its inverse.
        warmup: losses seen in every bin before they count.
    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        num_bins: int = 32,
        statistic: Statistic = "second_moment",
        decay: float = 0.99,
        uniform_share: float = 0.01,
        warmup: int = 10,
    ) -> None:
        if num_bins < 1 or warmup < 1:
            raise ValueError(f"`num_bins` and `warmup` must be at least 1, got {num_bins} and {warmup}.")
        if statistic not in STATISTICS:
            raise ValueError(f"`statistic` must be one of {', '.join(STATISTICS)}, got {statistic!r}.")
        if not 0 <= decay < 1 or not 0 < uniform_share <= 1:
            raise ValueError(
                f"`decay` must lie in [0, 1) and `uniform_share` in (0, 1], got {decay} and {uniform_share}."
            )
        self.statistic, self.decay, self.uniform_share, self.warmup = statistic, decay, uniform_share, warmup
        lowest = max(schedule.log_snr_min, _LOWEST)
        log_snr = torch.linspace(schedule.log_snr_max, lowest, num_bins + 1, dtype=torch.float64)
        self.edges = schedule.inverse(log_snr).detach().cpu()
        """(num_bins + 1,) the times between which the bins lie, from 0 to 1."""
        self.edges[0], self.edges[-1] = 0.0, 1.0
        self._history = torch.zeros(3, num_bins, dtype=torch.float64)  # number, sum and sum of squares, all decayed
        self._visits = torch.zeros(num_bins, dtype=torch.float64)

    @property
    def density(self) -> Tensor:
        """(num_bins,) p(t) on each bin, with mean 1 over t in [0, 1]."""
        widths = self.edges.diff()
        number, total, squares = self._history
        used = widths > 0
        if bool((self._visits[used] < self.warmup).any()):
            return torch.where(used, 0.5 + 0.5 / (used.sum() * widths), 1.0)
        number = number.clamp(min=torch.finfo(torch.float64).tiny)
        moment = squares / number
        if self.statistic == "variance":
            moment = (moment - (total / number) ** 2).clamp(min=0.0)
        root = moment.sqrt()
        mass = (root * widths).sum()
        if not mass > 0:
            return torch.ones_like(widths)
        return (1 - self.uniform_share) * root / mass + self.uniform_share

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times t with density p made from uniform u in [0, 1), and the weights 1 / p(t) of their losses: (B,)
        float64, CPU.

        u -> t is increasing, so that strata of u become strata of p.
        """
        u, density = u.double().cpu(), self.density
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), (density * self.edges.diff()).cumsum(0)])
        u = u * cumulative[-1]  # 1 but for rounding
        index = (torch.searchsorted(cumulative, u.contiguous(), right=True) - 1).clamp(0, len(density) - 1)
        t = self.edges[index] + (u - cumulative[index]) / density[index]
        return torch.minimum(t, self.edges[index + 1]), 1 / density[index]

    def sums(self, t: Tensor, losses: Tensor) -> Tensor:
        """(3, num_bins) float64 on the losses' device: number, sum, and sum of squares of the losses (B,) at times t
        (B,).

        Those of several micro-batches and processes are added up before `update`, so that all draw from the same
        density.
        """
        index = (torch.searchsorted(self.edges, t.double().cpu().contiguous(), right=True) - 1).to(losses.device)
        losses = losses.detach().double()
        sums = torch.zeros(3, len(self._visits), dtype=torch.float64, device=losses.device)
        rows = torch.stack([torch.ones_like(losses), losses, losses**2])
        return sums.index_add_(1, index.clamp(0, len(self._visits) - 1), rows)

    def update(self, sums: Tensor) -> None:
        """Take the sums of one optimiser step into the history.

        Raises:
            ValueError: sums of another shape, or losses among them that were not finite.
        """
        sums = sums.cpu()
        if sums.shape != self._history.shape or not bool(sums.isfinite().all()):
            raise ValueError(
                f"`sums` must be finite and of shape {tuple(self._history.shape)}, got {tuple(sums.shape)}: was a "
                "loss infinite?"
            )
        self._history = self.decay * self._history + sums
        self._visits += sums[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The history; with it in place, a resumed run draws the times that it would have drawn."""
        return {"history": self._history.clone(), "visits": self._visits.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of another number of bins.
        """
        if state["history"].shape != self._history.shape:
            raise ValueError(
                f"the history has {state['history'].shape[-1]} bins, this sampler {len(self._visits)}: use the same "
                "`num_bins`."
            )
        self._history, self._visits = state["history"].double().clone(), state["visits"].double().clone()
