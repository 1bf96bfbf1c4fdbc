r"""The score s(z_t) = grad ln q(z_t): what it says of the clean data, and steps that follow it.

For z_t = alpha x + sigma eps, whatever the distribution of x (Tweedie's formula and its second order):

    E[x | z_t]   = (z_t + sigma^2 s(z_t)) / alpha
    Cov[x | z_t] = (sigma^2 / alpha^2) (I + sigma^2 grad s(z_t)),

so a network that predicts the noise (eps_hat = -sigma s) or the data (x_hat, the mean above) is a score model, and the
other way round; `vdm_diffusers.prediction.convert` goes between them. A score also gives a Markov chain that leaves
q(z_t) unchanged (Langevin's), which corrects what the steps of a sampler got wrong: a predictor-corrector sampler
alternates the two.

A score model is a callable `score(z_t, log_snr)`: (B, ...) and () float64 on the CPU -> (B, ...).

Source: Efron 2011, "Tweedie's formula and selection bias"; Luo 2022, "Understanding Diffusion Models: A Unified
Perspective", the sections on three equivalent interpretations and on score-based models; Song et al. 2021,
"Score-based generative modeling through stochastic differential equations", section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .gaussian import Path, alpha_sigma, posterior
from .numerics import as_float64, linear_combination, noise_like, shown
from .prediction import convert

ScoreFunction = Callable[[Tensor, Tensor], Tensor]


def tweedie_mean(z_t: Tensor, score: Tensor, log_snr: Tensor | float, *, path: Path = "vp") -> Tensor:
    """E[x | z_t] = (z_t + sigma^2 score) / alpha, of z_t's shape.

    Arguments:
        z_t: (B, ...) the noisy data. score: (B, ...) grad ln q(z_t) there.
        log_snr: () or (B,), of z_t.
    Raises:
        ValueError: shapes that differ, or log_snr = -inf (on the CPU), where z_t says nothing of x.
    Source: Efron 2011, equation 1.4 (for alpha = 1).
    """
    return convert(score, z_t, log_snr, source="score", target="sample", path=path)


def tweedie_covariance(score: ScoreFunction, z_t: Tensor, log_snr: Tensor | float, *, path: Path = "vp") -> Tensor:
    """Cov[x | z_t] = (sigma^2 / alpha^2) (I + sigma^2 grad s(z_t)): (B, D, D) with D the number of dimensions of a
    sample.

    The Jacobian takes D backward passes; where D is large use `tweedie_covariance_product`. A true score's Jacobian is
    symmetric, a network's need not be: its symmetric part is returned.

    Arguments:
        score: a score model that treats the samples of a batch independently.
        z_t: (B, ...). log_snr: () of all of them.
    Raises:
        ValueError: a log_snr that is not one number, or -inf.
    """
    log_snr, factor, variance = _covariance_coefficients(z_t, log_snr, path)
    with torch.enable_grad():
        z = z_t.detach().requires_grad_()
        flat = score(z, log_snr).flatten(1)
        rows = [
            torch.autograd.grad(flat[:, i].sum(), z, retain_graph=True)[0].flatten(1) for i in range(flat.shape[1])
        ]
    jacobian = torch.stack(rows, dim=1)
    identity = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return factor * (identity + variance * (jacobian + jacobian.mT) / 2)


def tweedie_covariance_product(
    score: ScoreFunction, z_t: Tensor, log_snr: Tensor | float, vector: Tensor, *, path: Path = "vp"
) -> Tensor:
    """Cov[x | z_t] v for v of z_t's shape, by one backward pass. See `tweedie_covariance`.

    With v of independent signs, the average of v . Cov v is the trace of the covariance: E|x - E[x | z_t]|^2.
    """
    log_snr, factor, variance = _covariance_coefficients(z_t, log_snr, path)
    with torch.enable_grad():
        z = z_t.detach().requires_grad_()
        (product,) = torch.autograd.grad(score(z, log_snr), z, grad_outputs=vector)
    return factor * (vector + variance * product)


def langevin_step(z_t: Tensor, score: Tensor, step_size: Tensor | float, noise: Tensor) -> Tensor:
    """One step of Langevin's chain: z + h s(z) + sqrt(2 h) noise, which leaves q(z_t) unchanged as h -> 0.

    Arguments:
        z_t, score, noise: (B, ...), noise standard normal. step_size: h, () or (B,).
    Raises:
        ValueError: shapes that do not fit.
    """
    step_size = as_float64(step_size)
    drifted = linear_combination(torch.ones_like(step_size), z_t, step_size, score)
    return linear_combination(torch.ones_like(step_size), drifted, (2 * step_size).sqrt(), noise)


def corrector_step_size(log_snr: Tensor | float, signal_to_noise_ratio: float = 0.16, *, path: Path = "vp") -> Tensor:
    """h = 2 (r sigma_t)^2: the step at which Langevin's drift has r times the length of its noise. Float64, of
    log_snr's shape.

    Song et al. take h = 2 (r |noise| / |score|)^2 of the batch at hand. Here both lengths stand for their
    expectations, sqrt(D) and sqrt(D) / sigma_t, so that a sample depends neither on its neighbours nor on its own
    noise through h.

    Raises:
        ValueError: a ratio that is not positive.
    Source: Song et al. 2021, appendix G, algorithms 4 and 5 (r = 0.16 for CIFAR-10).
    """
    if not signal_to_noise_ratio > 0:
        raise ValueError(f"`signal_to_noise_ratio` must be positive, got {signal_to_noise_ratio}.")
    return 2 * (signal_to_noise_ratio * alpha_sigma(log_snr, path)[1]) ** 2


def predictor_corrector(
    score: ScoreFunction,
    z_t: Tensor,
    log_snrs: Tensor,
    *,
    corrector_steps: int = 1,
    signal_to_noise_ratio: float = 0.16,
    generator: torch.Generator | None = None,
    path: Path = "vp",
) -> Tensor:
    """Sample by alternating an ancestral step (predictor) and Langevin steps at the level it arrived at (corrector).

    Arguments:
        score: a score model.
        z_t: (B, ...) at log_snrs[0], for instance standard normal noise.
        log_snrs: (n,) increasing, from noisy to clean. The last may be +inf: the result is then the mean E[x | z].
        corrector_steps: Langevin steps after each predictor step; 0 leaves the ancestral sampler.
        signal_to_noise_ratio: see `corrector_step_size`.
    Returns:
        (B, ...) a sample at log_snrs[-1].
    Raises:
        ValueError: a grid that does not increase, a negative number of steps.
    Source: Song et al. 2021, algorithm 1, with the exact posterior as predictor.
    """
    log_snrs = as_float64(log_snrs)
    if corrector_steps < 0:
        raise ValueError(f"`corrector_steps` must not be negative, got {corrector_steps}.")
    if log_snrs.ndim != 1 or len(log_snrs) < 2 or not bool((log_snrs[1:] > log_snrs[:-1]).all()):
        raise ValueError(
            f"`log_snrs` must be at least two numbers that increase, from noisy to clean, got {shown(log_snrs)}."
        )
    for log_snr_t, log_snr_s in pairwise(log_snrs):
        x_hat = tweedie_mean(z_t, score(z_t, log_snr_t), log_snr_t, path=path)
        mean, variance = posterior(z_t, x_hat, log_snr_t, log_snr_s, path=path)
        z_t = linear_combination(torch.ones_like(variance), mean, variance.sqrt(), noise_like(z_t, generator))
        if log_snr_s.isinf():
            continue
        step_size = corrector_step_size(log_snr_s, signal_to_noise_ratio, path=path)
        for _ in range(corrector_steps):
            z_t = langevin_step(z_t, score(z_t, log_snr_s), step_size, noise_like(z_t, generator))
    return z_t


def _covariance_coefficients(z_t: Tensor, log_snr: Tensor | float, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    log_snr = as_float64(log_snr)
    if log_snr.ndim or log_snr == -torch.inf:
        raise ValueError(f"`log_snr` must be one number above -inf for all of the batch, got {shown(log_snr)}.")
    alpha, sigma = alpha_sigma(log_snr, path)
    return log_snr, ((sigma / alpha) ** 2).to(z_t), (sigma**2).to(z_t)
