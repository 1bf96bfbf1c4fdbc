"""What the optimal reverse variance needs: the network's mean squared error, measured on images, against log SNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers.decoders import PixelEncoding
from vdm_diffusers.evaluation.adapters import eval_mode, prepare, unpack
from vdm_diffusers.evaluation.chains import adopt, chain_log_snrs
from vdm_diffusers.evaluation.sharing import draw_seed
from vdm_diffusers.likelihood import measure_mse, sample_chain
from vdm_diffusers.schedulers.configuration import MAX_KNOTS


def estimate_optimal_variance(
    model: Any,
    images: Any = None,
    *,
    scheduler: Any = None,
    per_frequency: bool = False,
    form: Literal["error", "analytic"] | None = None,
    num_knots: int = 64,
    num_samples: int = 16,
    num_images: int = 64,
    num_steps: int = 250,
    num_levels: int | Literal["auto"] | None = "auto",
    pixel_encoding: PixelEncoding | Literal["auto"] = "auto",
    batch_size: int | None = None,
    class_labels: int | Sequence[int] | Tensor | str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    sample_shape: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    progress_bar: bool = True,
) -> dict[str, list[Any]]:
    r"""What `variance_type="optimal"` needs: E|x - x_hat|^2 / D of a network, measured on training images, against log
    SNR.

    The reverse variance posterior + (coefficient of x)^2 E|x - x_hat|^2 / D gives the smallest bound that any variance
    of this form can, whatever the network; with `per_frequency` that of the best one for each band of frequencies,
    which is smaller still. It pays with few steps on a grid to match, which the scheduler and [`evaluate_likelihood`]
    then choose by default (`step_grid`, `grid`). On a linear-beta grid uniform in t it may give samples that look
    worse, though their likelihood is higher.

    Args: as in [`evaluate_likelihood`]; besides
        images: a few hundred training images. None: the network's own samples, `num_images` of them by ancestral
            sampling in `num_steps` steps (with as many evaluations each), rounded to levels if there are any. They are
            those of the model, not of the data: what it has not learned is missing.
        per_frequency: one mse for each channel and each of at most 32 radial bands of the cosine transform, for images
            of this one size. Bands of low frequency hold few coefficients: let `num_samples` times the images be some
            hundred times `num_knots`.
        form: `"error"`, E|x - x_hat|^2, optimal for every network; `"analytic"`, Analytic-DPM's
            sigma^2/alpha^2 (1 - E|eps_hat|^2 / D), which looks at the network's answers alone and equals it for an
            exact network only. Default: `"error"` with images, `"analytic"` without.
        num_knots: number of log SNRs, equally spaced over the schedule; at most 64 with `per_frequency`.
        num_samples: evaluations of the model for an image, spread over the knots.
        sample_shape: (C, H, W) of the model's own samples. Default: from the model's config.

    Returns:
        `{"log_snr": [...], "mse": [...]}`, with `"shape": [C, H, W]` if by frequency, for the scheduler's config,
        where it travels with the checkpoint:
            `VDMScheduler.from_config(scheduler.config, variance_type="optimal", optimal_variance=...)`.

    Raises:
        ValueError: besides those of [`evaluate_likelihood`], a model without images that does not say its samples'
            shape; more knots than a scheduler takes.

    Source: Bao et al. 2022, "Analytic-DPM", theorem 1; Bao et al. 2022, "Estimating the Optimal Covariance with
    Imperfect Mean".
    """
    network, scheduler, num_levels, pixel_encoding = unpack(model, scheduler, num_levels, pixel_encoding)
    chain = adopt(scheduler)
    if form not in (None, "error", "analytic"):
        raise ValueError(f"`form` must be 'error' or 'analytic', got {form!r}.")
    if num_knots < 1 or (per_frequency and num_knots > MAX_KNOTS):
        limit = (
            f"1..{MAX_KNOTS} with per_frequency=True, as the table travels in the config" if per_frequency else "1.."
        )
        raise ValueError(f"`num_knots` must lie in {limit}, got {num_knots}.")
    has_images = images is not None
    if not has_images:
        shape = _own_shape(network, sample_shape)
        images = torch.zeros(num_images, *shape, dtype=torch.float32 if num_levels is None else torch.int32)
    levels, denoiser, device, batch_size = prepare(
        network, chain, images, class_labels, num_levels, pixel_encoding, model_kwargs, batch_size, None, False
    )
    schedule = chain.noise_schedule
    low = schedule.log_snr_min
    if not math.isfinite(low):  # zero terminal SNR: the entry before, where the network still sees something
        low = float(chain.log_snr(float(chain.config.num_train_timesteps - 2)))
    knots = torch.linspace(low, schedule.log_snr_max, num_knots, dtype=torch.float64)
    seed = draw_seed(generator)
    grid = (
        None
        if has_images
        else chain_log_snrs(chain, num_steps, "log_snr" if math.isfinite(schedule.log_snr_min) else "time")
    )
    total = len(levels) * (num_samples + (0 if grid is None else len(grid)))
    with eval_mode(network), torch.no_grad(), tqdm(total=total, disable=not progress_bar) as bar:
        common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": device, "progress": bar.update}
        if grid is not None:
            levels = sample_chain(denoiser, levels, grid, **common)
        optimal = measure_mse(
            denoiser,
            levels,
            knots,
            num_samples=num_samples,
            per_frequency=per_frequency,
            analytic=not has_images if form is None else form == "analytic",
            **common,
        )
    return optimal.to_config()


def _own_shape(network: Any, sample_shape: Sequence[int] | None) -> tuple[int, ...]:
    """(C, H, W) of what the network makes."""
    if sample_shape is None:
        config = getattr(network, "config", None)
        channels, size = (None if config is None else config.get(key) for key in ("in_channels", "sample_size"))
        if channels is None or size is None:
            raise ValueError(
                "without `images` `sample_shape=(C, H, W)` is needed: the model's config does not say how large its "
                "samples are."
            )
        sample_shape = (channels, *((size, size) if isinstance(size, int) else size))
    return tuple(int(n) for n in sample_shape)
