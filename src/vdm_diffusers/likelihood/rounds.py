"""The rounds of evaluations: the network is called here, and nowhere else in the estimate of the bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..control_variates import Controls, PixelDenoiser, Surrogate, WienerDenoiser
from ..decoders import level_values
from ..gaussian import diffuse
from ..repetitions import Runner, mix_seed
from .denoising_model import DenoisingModel, sum64
from .placement import Layout, group_size, noise_of
from .reconstruction import Decoder, GaussianDecoder
from .report import LossCurve
from .terms import DiffusionTerm, Profile


@dataclass(frozen=True, eq=False)
class EvaluationRound:
    """Evaluations (N, n) of all images: sites, what the network's answers cost there, and the features of the surrogate."""

    layout: Layout
    site: Tensor
    inverse_density: Tensor
    log_snr: Tensor
    nats: Tensor
    features: Tensor  # (N, n, F)


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that stays the same from round to round."""

    model: DenoisingModel
    levels: Tensor
    term: DiffusionTerm
    decoder: Decoder
    controls: Controls
    variance_reduction: bool
    batch_size: int
    seed: int
    device: torch.device
    progress: Callable[[int], object] | None
    runner: Runner
    curve: LossCurve

    @property
    def groups(self) -> Tensor:
        """(N,) the group of every image."""
        return torch.arange(len(self.levels)) // group_size(len(self.levels))

    @property
    def num_dims(self) -> int:
        return self.levels[0].numel()

    @property
    def no_surrogate(self) -> Surrogate:
        return Surrogate(
            torch.zeros(1, dtype=torch.float64), torch.zeros(1, self.controls.num_features, dtype=torch.float64)
        )

    def encode(self, rows: Tensor | slice) -> Tensor:
        return self.model.encode(self.levels[rows])


def fit_controls(model: DenoisingModel, levels: Tensor, term: DiffusionTerm) -> Controls:
    """The cheap denoisers, fitted to images."""
    wiener = WienerDenoiser.fit(model.encode(levels))
    if model.num_levels is None:
        return Controls(wiener, None)
    values = level_values(model.num_levels, model.pixel_encoding)
    counts = levels.flatten().long().bincount(minlength=model.num_levels)
    ends = term.log_snr_range()
    return Controls(wiener, PixelDenoiser.fit(values, counts, *ends))


def evaluate_round(
    problem: Problem, num_samples: int, profile: Profile | None, before: list[EvaluationRound]
) -> EvaluationRound:
    """A round: `num_samples` further evaluations of every image."""
    count, term, number = len(problem.levels), problem.term, len(before)
    share = 0.125 if profile is None else profile.decoder_share
    layout = Layout.of(count, num_samples, problem.decoder, share)
    groups = torch.arange(count).split(group_size(count))
    placed = [
        layout.place(
            len(rows), term, profile, torch.Generator().manual_seed(mix_seed(problem.seed, "shift", number, i))
        )
        for i, rows in enumerate(groups)
    ]
    site, inverse_density = (torch.cat(parts) for parts in zip(*placed, strict=True))
    log_snr = term.log_snr(site)
    if isinstance(problem.decoder, GaussianDecoder):
        log_snr = torch.where(layout.is_decoder, problem.decoder.log_snr_1, log_snr)
    per_block = max(1, problem.batch_size // num_samples)  # a block is what a runner runs or keeps
    blocks = torch.arange(count).split(per_block)
    sizes = "-".join(str(n) for n in (*(r.nats.shape[1] for r in before), num_samples))
    work = [
        (f"{sizes}-{i}", partial(_evaluate_block, problem, layout, rows, site, log_snr, number))
        for i, rows in enumerate(blocks)
    ]
    nats, loss, *features = torch.cat(problem.runner(work), dim=1)
    if not bool(nats.isfinite().all()):
        raise ValueError(
            f"the loss is not finite at log_snr = {float(log_snr[~nats.isfinite()][0]):.3g}: the network's outputs are too large for "
            "float32, as of a diverged training. No likelihood can be computed."
        )
    problem.curve.add(log_snr, loss)
    return EvaluationRound(layout, site, inverse_density, log_snr, nats, torch.stack(features, dim=-1))


def _evaluate_block(
    problem: Problem, layout: Layout, rows: Tensor, site: Tensor, log_snr: Tensor, number: int
) -> Tensor:
    """(2 + F, m, n) of the images `rows`: nats, |eps - eps_hat|^2, and the features of the surrogate."""
    n = site.shape[1]
    model, decoder, device = problem.model, problem.decoder, problem.device
    strata = layout.strata if problem.variance_reduction else None
    result = torch.empty(2 + problem.controls.num_features, len(rows), n, dtype=torch.float64)
    for flat in torch.arange(len(rows) * n).split(problem.batch_size):
        row, column = flat // n, flat % n
        index = rows[row]
        k = problem.levels[index].to(device)
        x = model.encode(k)
        noise = noise_of(index, column, x.shape[1:], problem.seed, number, strata).to(device)
        own, at, ell = layout.is_decoder[column], site[index, column], log_snr[index, column]
        z_t = diffuse(x, noise, ell)
        value, variance = model.outputs(z_t, ell, index)
        error, to_x = model.error(value, x, noise, z_t, ell)
        nats = problem.term.nats(at, error, to_x, variance)
        if isinstance(decoder, GaussianDecoder) and bool(own.any()):
            mine = own.to(device)
            nats[own] = decoder.nats(
                model,
                k[mine],
                model.denoised(value[mine], z_t[mine], ell[own]),
                None if variance is None else variance[mine],
            ).to("cpu", torch.float64)
        features = problem.controls.features(x, k, noise, z_t, ell)
        result[:, row, column] = torch.cat([torch.stack([nats, ell.exp() * to_x * sum64(error**2)]), features])
        if problem.progress is not None:
            problem.progress(len(flat))
    return result
