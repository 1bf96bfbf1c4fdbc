"""A chain run forwards for its own statistics: samples, and the mean squared errors that an optimal variance is made
of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ..decoders import decode_pixels
from ..frequency import RadialBands
from ..gaussian import diffuse, posterior_coefficients
from ..numerics import as_float64
from ..prediction import convert
from ..repetitions import mix_seed
from ..reverse_variance import OptimalVariance
from .denoising_model import DenoisingModel, sum64
from .placement import draw_noise, noise_of


def sample_chain(
    model: DenoisingModel,
    levels: Tensor,
    grid: Tensor,
    *,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """As many samples as there are in `levels`, of its shape and dtype, by ancestral sampling with the posterior
    variance.

    Arguments:
        levels: (N, C, ...) says how many, how large, and whether integers are wanted. Its values do not matter.
        grid: (K + 1,) decreasing log SNRs. The last step, from grid[0], returns x_hat, rounded to the nearest level.
    """
    parts = []
    for index in torch.arange(len(levels)).split(batch_size):
        generators = [torch.Generator().manual_seed(mix_seed(seed, "sample", i)) for i in index.tolist()]
        z = draw_noise(generators, levels.shape[1:]).to(device)
        for i in range(len(grid) - 1, -1, -1):
            log_snr = grid[i].expand(len(index))
            value, _ = model.outputs(z, log_snr, index)
            x_hat = model.denoised(value, z, log_snr)
            if i > 0:
                c = posterior_coefficients(grid[i], grid[i - 1])
                z = (
                    float(c.z) * z
                    + float(c.x) * x_hat
                    + float(c.variance.sqrt()) * draw_noise(generators, levels.shape[1:]).to(device)
                )
            if progress is not None:
                progress(len(index))
        parts.append(x_hat.float().cpu())
    x = torch.cat(parts)
    return x if model.num_levels is None else decode_pixels(x, model.num_levels, model.pixel_encoding).to(levels.dtype)


def measure_mse(
    model: DenoisingModel,
    levels: Tensor,
    knots: Tensor,
    *,
    num_samples: int,
    per_frequency: bool = False,
    analytic: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> OptimalVariance:
    r"""E|x - x_hat|^2 / D at the given log SNRs (K,), each averaged over equally many evaluations, `num_samples` an
    image.

    Arguments:
        per_frequency: for each radial band of the cosine transform of each channel of images (N, C, H, W), not for all
            together.
        analytic: from the network's answers alone, as if it were exact: E Cov[x | z_t] = sigma^2/alpha^2 (1 - E
            eps_hat^2), clipped to what data in [-1, 1] can have. The 1 is estimated by the square of the noise that is
            in z_t, which takes most of the variance away. Otherwise from the errors of x_hat, which is right for every
            network.
    Raises:
        ValueError: fewer evaluations than knots; per_frequency and images that are not (N, C, H, W).
    Source: Bao et al. 2022, "Analytic-DPM", theorem 1 (analytic); Bao et al. 2022, "Estimating the Optimal Covariance
        with Imperfect Mean", theorem 3 (errors).
    """
    count, total = len(levels), len(levels) * num_samples
    if total < len(knots):
        raise ValueError(
            f"{len(knots)} log SNRs need as many evaluations at least, got {count} images x {num_samples}."
        )
    if per_frequency and levels.ndim != 4:
        raise ValueError(f"`per_frequency` needs images (N, C, H, W), got shape {tuple(levels.shape)}.")
    bands = RadialBands.of(*levels.shape[2:]) if per_frequency else None

    def squares(value: Tensor) -> Tensor:
        """(M,), or (M, C, bands) float64 on the CPU."""
        if bands is None:
            return sum64(value**2)
        return bands.sums(bands.transform(as_float64(value)) ** 2).to("cpu", torch.float64)

    # An image's evaluations are spread over the knots, and every knot sees images from everywhere. An image has the
    # same noise at each: a curve whose neighbouring values err alike tells a grid where it falls, and not where it
    # happened to come out low.
    repeats = max(1, num_samples // len(knots))
    position = torch.arange(total).reshape(num_samples, count).T.flatten()
    index_of_knot = position * len(knots) // total
    shape = (len(knots),) if bands is None else (len(knots), levels.shape[1], len(bands.counts))
    sums, number = torch.zeros(shape, dtype=torch.float64), index_of_knot.bincount(minlength=len(knots))
    for flat in torch.arange(total).split(batch_size):
        index, column = flat // num_samples, flat % num_samples
        k = levels[index].to(device)
        x = model.encode(k)
        noise = noise_of(index, column % repeats, x.shape[1:], seed, -1).to(device)
        log_snr = knots[index_of_knot[flat]]
        z_t = diffuse(x, noise, log_snr)
        value, _ = model.outputs(z_t, log_snr, index)
        if analytic:
            eps_hat = convert(value, z_t, log_snr, source=model.prediction_type, target="epsilon")
            square, to_x = squares(noise) - squares(eps_hat), torch.exp(-log_snr)
        else:
            error, to_x = model.error(value, x, noise, z_t, log_snr)
            square = squares(error)
        sums.index_add_(0, index_of_knot[flat], to_x.reshape(-1, *[1] * (square.ndim - 1)) * square)
        if progress is not None:
            progress(len(flat))
    mse = sums / number.reshape(-1, *[1] * (sums.ndim - 1)) / (levels[0].numel() if bands is None else bands.counts)
    if analytic:  # a frequency of H W pixels in [-1, 1] may hold the power of all of them
        largest = math.inf if model.num_levels is None else 1 if bands is None else levels[0, 0].numel()
        mse = mse.clamp(0, largest)
    return OptimalVariance(
        knots, mse, None if bands is None else cast("tuple[int, int, int]", tuple(levels.shape[1:]))
    )
