"""The result of an evaluation: bits/dim with its terms and errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LikelihoodReport:
    """What an estimator found: a bound on -ln p(x) (or an estimate of it) for each image, with the error of their
    mean.

    Attributes:
        method: name of the estimator.
        nats: (N,) float64, -ln p(x) of every image, or a bound on it from above.
        prior, diffusion, reconstruction: (N,) nats, the terms of the bound; None where the method has no such term.
        num_dims: D, dimensions of an image (pixels times channels).
        standard_error: bits/dim, one standard deviation of the estimator of `bits_per_dim` for these very images: what
            more evaluations would reduce.
        is_bound: whether `nats` bounds -ln p(x) from above in expectation.
        num_model_evaluations: how many times the network was applied to one image.
        settings: how the figure came about: number of steps, decoder, levels, ... (JSON primitives).
        loss_curve: the network's loss against log SNR: lists `log_snr` (centre of a bin), `mse` (mean |eps -
            eps_hat|^2 / D), `count`; None where no such loss was measured.
        nats_error: (N,) one standard deviation of every image's own estimate. It comes from few replicates, so that it
            is rough for one image and right on average; None where the method has no such error.
        log_snr_edges: (B + 1,) increasing edges of bands of log SNR, each an octave of alpha / sigma; None without a
            diffusion term.
        nats_by_log_snr: (N, B) what each band adds to `diffusion`, by plain stratified averages: rough for one image,
            right on average.
    """

    method: str
    nats: Tensor
    prior: Tensor | None
    diffusion: Tensor | None
    reconstruction: Tensor | None
    num_dims: int
    standard_error: float
    is_bound: bool
    num_model_evaluations: int
    settings: dict[str, Any] = field(default_factory=dict)
    loss_curve: dict[str, list[float]] | None = None
    nats_error: Tensor | None = None
    log_snr_edges: Tensor | None = None
    nats_by_log_snr: Tensor | None = None

    @property
    def bits_per_dim(self) -> float:
        """The mean over the images, in bits for each dimension."""
        return self._bits(self.nats)

    @property
    def nats_per_dim(self) -> float:
        """The mean over the images, in nats for each dimension: the usual unit for continuous data."""
        return float(self.nats.double().mean()) / self.num_dims

    @property
    def sampling_error(self) -> float:
        """bits/dim, std / sqrt(N) between the images: how far another sample of N images would differ.

        NaN for one image.
        """
        if len(self.nats) < 2:
            return math.nan
        return float(self.nats.std()) / math.sqrt(len(self.nats)) / (self.num_dims * math.log(2))

    @property
    def total_error(self) -> float:
        """bits/dim, sqrt(standard_error^2 + sampling_error^2): of the mean over all images that might have been
        drawn.
        """
        return math.hypot(self.standard_error, self.sampling_error)

    def to_dict(self, per_image: bool = False) -> dict[str, Any]:
        """JSON primitives: means in bits/dim, errors, counts and settings; with `per_image` the lists of nats as
        well.
        """
        terms = {"prior": self.prior, "diffusion": self.diffusion, "reconstruction": self.reconstruction}
        summary: dict[str, Any] = {
            "method": self.method,
            "bits_per_dim": self.bits_per_dim,
            "standard_error": self.standard_error,
            "sampling_error": None if math.isnan(self.sampling_error) else self.sampling_error,
            "total_error": None if math.isnan(self.total_error) else self.total_error,
            **{name: None if term is None else self._bits(term) for name, term in terms.items()},
            "is_bound": self.is_bound,
            "num_images": len(self.nats),
            "num_dims": self.num_dims,
            "num_model_evaluations": self.num_model_evaluations,
            "settings": dict(self.settings),
            "loss_curve": self.loss_curve,
        }
        if per_image:
            terms = {"nats": self.nats, **terms}
            summary["per_image"] = {name: term.tolist() for name, term in terms.items() if term is not None}
        return summary

    def _bits(self, nats: Tensor) -> float:
        return float(nats.double().mean()) / (self.num_dims * math.log(2))

    def __str__(self) -> str:
        bound = " (upper bound)" if self.is_bound else ""
        is_density = self.settings.get("num_levels", 0) is None  # continuous data, whose usual unit is nats
        value, unit, scale = (
            (self.nats_per_dim, "nats", math.log(2)) if is_density else (self.bits_per_dim, "bits", 1.0)
        )
        images = f" +- {self.sampling_error * scale:.4f} (images)" if len(self.nats) > 1 else ""
        return (
            f"{value:.4f} {unit}/dim{bound}, {self.method}, {len(self.nats)} "
            f"image{'s' if len(self.nats) > 1 else ''}: "
            f"+- {self.standard_error * scale:.4f} (estimator){images}"
        )


class LossCurve:
    """Sums of |eps - eps_hat|^2 in bins of log SNR half a unit wide."""

    def __init__(self) -> None:
        self.bins: dict[int, tuple[float, int]] = {}

    def add(self, log_snr: Tensor, squared_error: Tensor) -> None:
        finite = log_snr.isfinite() & squared_error.isfinite()
        keys, inverse = (log_snr[finite] * 2).floor().long().unique(return_inverse=True)
        sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, squared_error[finite])
        for key, total, count in zip(
            keys.tolist(), sums.tolist(), inverse.bincount(minlength=len(keys)).tolist(), strict=True
        ):
            old = self.bins.get(key, (0.0, 0))
            self.bins[key] = (old[0] + total, old[1] + count)

    def to_dict(self, num_dims: int) -> dict[str, list[float]]:
        items = sorted(self.bins.items())
        return {
            "log_snr": [(key + 0.5) / 2 for key, _ in items],
            "mse": [total / count / num_dims for _, (total, count) in items],
            "count": [count for _, (_, count) in items],
        }
