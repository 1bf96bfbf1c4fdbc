"""The importance-weighted bound of Burda et al. 2016, from whole chains."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..decoders import softmax_log_likelihood
from ..gaussian import alpha_sigma, diffuse, posterior_coefficients
from ..numerics import as_float64, expand_to
from ..repetitions import Budget, Runner, mix_seed, repeat, run_all
from ..reverse_variance import forward_variance
from .denoising_model import DenoisingModel, learned_variance_of, sum64
from .reconstruction import Decoder, GaussianDecoder, SoftmaxDecoder
from .report import LikelihoodReport
from .terms import DiscreteTerm


def evaluate_importance_weighted(
    model: DenoisingModel,
    levels: Tensor,
    term: DiscreteTerm,
    decoder: Decoder,
    prior_log_snr: float,
    *,
    num_samples: int = 16,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner = run_all,
) -> LikelihoodReport:
    """The K-sample bound -ln p(x) <= -E ln 1/K sum_k w_k, w = p(x, z_0..z_T) / q(z_0..z_T | x), over the whole chain.

    Chains are drawn backwards, z_T from q(z_T | x), then q(z_s | z_t, x), and every step adds its sampled log ratio.
    Two independent bounds of K = num_samples // 2 chains give the error, and further ones of the same K make it
    smaller. For K = 1 it is the discrete bound; it falls as K grows. Every chain has noise of its own, whatever its
    batch.

    Arguments: as of `evaluate_bound`.
    Raises:
        ValueError: fewer than two samples, a budget that does not allow them, data or outputs that do not fit.
    Source: Burda et al. 2016, "Importance weighted autoencoders", equation 8.
    """
    model.check(levels)
    if num_samples < 2:
        raise ValueError(
            f"`num_samples` must be at least 2, got {num_samples}: the error bar comes from two independent bounds."
        )
    samples, num_dims = num_samples // 2, levels[0].numel()
    cost = samples * (term.num_steps + isinstance(decoder, GaussianDecoder))

    def draw(images: Tensor, repetitions: Tensor) -> Tensor:
        chains = torch.arange(len(images) * samples)
        log_weights = []
        for flat in chains.split(batch_size):
            row = flat // samples
            index, number = images[row], flat % samples
            seeds = [("chain", *part) for part in torch.stack([index, repetitions[row], number]).T.tolist()]
            generators = [torch.Generator().manual_seed(mix_seed(seed, *part)) for part in seeds]
            log_weights.append(
                _chain_log_weights(model, levels, term, decoder, prior_log_snr, index, generators, device, progress)
            )
        bounds = math.log(samples) - torch.cat(log_weights).reshape(-1, samples).logsumexp(1)
        return torch.stack([torch.full_like(bounds, cost), bounds])

    found = repeat(
        draw,
        len(levels),
        num_dims,
        2,
        batch_size=max(1, batch_size // samples),
        budget=Budget(target_standard_error, max_model_evaluations),
        cost=cost,
        runner=runner,
    )
    return LikelihoodReport(
        method="importance_weighted",
        nats=found.values[0],
        prior=None,
        diffusion=None,
        reconstruction=None,
        num_dims=num_dims,
        standard_error=found.standard_error,
        is_bound=True,
        num_model_evaluations=found.num_model_evaluations,
        settings={"num_importance_samples": samples, "num_repetitions": found.number},
    )


def _chain_log_weights(
    model: DenoisingModel,
    levels: Tensor,
    term: DiscreteTerm,
    decoder: Decoder,
    prior_log_snr: float,
    index: Tensor,
    generators: list[torch.Generator],
    device: torch.device | str,
    progress: Callable[[int], object] | None,
) -> Tensor:
    """ln p(x, z_0..z_T) - ln q(z_0..z_T | x) of one chain for each row: (M,) float64."""
    k = levels[index].to(device)
    x = model.encode(k)

    def draw() -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(device)

    noise = draw()
    log_snr = torch.full((len(x),), prior_log_snr, dtype=torch.float64)
    z = diffuse(x, noise, log_snr)
    log_sigma = 0.5 * float(torch.nn.functional.logsigmoid(-as_float64(prior_log_snr)))
    log_weight = 0.5 * sum64(noise**2) - 0.5 * sum64(z**2) + x[0].numel() * log_sigma
    for site in range(term.num_steps, 0, -1):
        at = torch.full((len(x),), float(site), dtype=torch.float64)
        s, t = term.grid[site - 1], term.grid[site]
        log_snr = t.expand(len(x))
        value, output = model.outputs(z, log_snr, index)
        difference = x - model.denoised(value, z, log_snr)
        posterior = posterior_coefficients(t, s)
        if output is not None:
            reverse = learned_variance_of(output, term.reverse_variance, posterior.variance, forward_variance(s, t))
        else:
            reverse = term.variance(at[:1]).to(difference.device)
            reverse = expand_to(reverse, difference) if term.bands is None else term.bands.spread(reverse)
        noise = draw()
        excess = term.coordinates(
            float(posterior.variance.sqrt()) * as_float64(noise) + float(posterior.x) * as_float64(difference)
        )
        ratio = float(posterior.variance) / reverse + torch.zeros_like(excess)
        log_weight += 0.5 * sum64(as_float64(noise) ** 2 - excess**2 / reverse + ratio.log())
        z = float(posterior.z) * z + float(posterior.x) * x + float(posterior.variance.sqrt()) * noise
        if progress is not None:
            progress(len(x))
    at_0 = torch.full((len(x),), float(term.grid[0]), dtype=torch.float64)
    if isinstance(decoder, GaussianDecoder):
        value, output = model.outputs(z, at_0, index)
        log_weight -= decoder.nats(model, k, model.denoised(value, z, at_0), output).to("cpu", torch.float64)
        if progress is not None:
            progress(len(x))
    elif isinstance(decoder, SoftmaxDecoder) and model.num_levels is not None:
        log_weight += softmax_log_likelihood(
            k, z, at_0, num_levels=model.num_levels, pixel_encoding=model.pixel_encoding
        ).to("cpu", torch.float64)
    else:
        alpha, _ = alpha_sigma(at_0)
        rest = as_float64(x) - as_float64(z) / expand_to(alpha, as_float64(z))
        log_weight -= 0.5 * (
            math.exp(decoder.log_snr_0) * sum64(rest**2) + x[0].numel() * (math.log(2 * math.pi) - decoder.log_snr_0)
        )
    return log_weight
