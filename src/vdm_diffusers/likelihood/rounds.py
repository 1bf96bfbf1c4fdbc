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
from .terms import ContinuousTerm, DiffusionTerm, Profile


@dataclass(frozen=True, eq=False)
class EvaluationRound:
    """Evaluations (N, n) of all images: sites, what the network's answers cost there, and the features of the
    surrogate.
    """

    layout: Layout
    site: Tensor
    inverse_density: Tensor
    log_snr: Tensor
    nats: Tensor
    features: Tensor  # (N, n, F)


@dataclass(frozen=True, eq=False)
class Side:
    """A model whose bound is evaluated: its network, its diffusion term, its decoder."""

    model: DenoisingModel
    term: DiffusionTerm
    decoder: Decoder

    def evaluate(
        self, levels: Tensor, noise: Tensor, index: Tensor, site: Tensor, log_snr: Tensor, is_decoder: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One evaluation of the network for each row: nats and e^log_snr |x - x_hat|^2, and the x, z_t and log SNR
        that they are of.

        Rows of the decoder are decoded, or cost nothing where the decoder needs no network. A site outside a
        continuous term's range costs nothing either: the range is this model's own, and may be shorter than that of a
        model it is compared with.
        """
        model, term, decoder = self.model, self.term, self.decoder
        counts = torch.ones_like(is_decoder)
        if isinstance(term, ContinuousTerm):
            clamped = log_snr.clamp(term.log_snr_min, term.log_snr_max)
            counts = is_decoder | (clamped == log_snr)
            site, log_snr = torch.where(is_decoder, site, clamped), clamped
        if isinstance(decoder, GaussianDecoder):
            log_snr = torch.where(is_decoder, decoder.log_snr_1, log_snr)
        else:
            counts = counts & ~is_decoder
        x = model.encode(levels)
        z_t = diffuse(x, noise, log_snr)
        value, variance = model.outputs(z_t, log_snr, index)
        error, to_x = model.error(value, x, noise, z_t, log_snr)
        nats = term.nats(site, error, to_x, variance)
        if isinstance(decoder, GaussianDecoder) and bool(is_decoder.any()):
            mine = is_decoder.to(x.device)
            nats[is_decoder] = decoder.nats(
                model,
                levels[mine],
                model.denoised(value[mine], z_t[mine], log_snr[is_decoder]),
                None if variance is None else variance[mine],
            ).to("cpu", torch.float64)
        return torch.where(counts, nats, 0.0), log_snr.exp() * to_x * sum64(error**2), x, z_t, log_snr


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that stays the same from round to round.

    Attributes:
        sides: the model, or two, of which the second's nats are subtracted from the first's at the same images, sites
            and noise.
        term: where evaluations may be placed, and what is added up.
    """

    sides: tuple[Side, ...]
    levels: Tensor
    term: DiffusionTerm
    controls: Controls
    variance_reduction: bool
    batch_size: int
    seed: int
    device: torch.device
    progress: Callable[[int], object] | None
    runner: Runner
    curve: LossCurve

    @property
    def decoder(self) -> Decoder:
        """A decoder that needs the network, if either side has one."""
        return next((s.decoder for s in self.sides if isinstance(s.decoder, GaussianDecoder)), self.sides[0].decoder)

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
        return self.sides[0].model.encode(self.levels[rows])


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
            f"the loss is not finite at log_snr = {float(log_snr[~nats.isfinite()][0]):.3g}: the network's outputs "
            "are too large for "
            "float32, as of a diverged training. No likelihood can be computed."
        )
    problem.curve.add(log_snr, loss)
    return EvaluationRound(layout, site, inverse_density, log_snr, nats, torch.stack(features, dim=-1))


def _evaluate_block(
    problem: Problem, layout: Layout, rows: Tensor, site: Tensor, log_snr: Tensor, number: int
) -> Tensor:
    """(2 + F, m, n) of the images `rows`: nats, |eps - eps_hat|^2, and the features of the surrogate."""
    n = site.shape[1]
    strata = layout.strata if problem.variance_reduction else None
    result = torch.empty(2 + problem.controls.num_features, len(rows), n, dtype=torch.float64)
    for flat in torch.arange(len(rows) * n).split(problem.batch_size):
        row, column = flat // n, flat % n
        index = rows[row]
        k = problem.levels[index].to(problem.device)
        noise = noise_of(index, column, k.shape[1:], problem.seed, number, strata).to(problem.device)
        drawn = (k, noise, index, site[index, column], log_snr[index, column], layout.is_decoder[column])
        nats, loss, x, z_t, ell = problem.sides[0].evaluate(*drawn)
        for other in problem.sides[1:]:
            nats = nats - other.evaluate(*drawn)[0]
        if not torch.equal(ell, log_snr[index, column]):  # outside the first side's range
            ell = log_snr[index, column]
            z_t = diffuse(x, noise, ell)
        features = problem.controls.features(x, k, noise, z_t, ell)
        result[:, row, column] = torch.cat([torch.stack([nats, loss]), features])
        if problem.progress is not None:
            problem.progress(len(flat) * len(problem.sides))
    return result
