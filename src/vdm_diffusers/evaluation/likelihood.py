"""Likelihood of images under a pipeline, a checkpoint's network and scheduler, or a network of one's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers.decoders import PixelEncoding
from vdm_diffusers.evaluation.adapters import device_and_dtype, eval_mode, prepare, unpack
from vdm_diffusers.evaluation.chains import Grid, adopt, chain_log_snrs, decoder_of, optimal_of, reverse_variance_of
from vdm_diffusers.evaluation.sharing import rank_and_size, resume_folder, run_shared, shared_seed
from vdm_diffusers.likelihood import (
    ContinuousTerm,
    DensityDecoder,
    DiffusionTerm,
    DiscreteTerm,
    GaussianDecoder,
    LikelihoodReport,
    SoftmaxDecoder,
    evaluate_bound,
    evaluate_importance_weighted,
)
from vdm_diffusers.numerics import as_generator, whole_number
from vdm_diffusers.probability_flow import Dequantization, Divergence, evaluate_flow

Method = Literal["continuous", "discrete", "ode", "importance_weighted"]
METHODS: tuple[str, ...] = get_args(Method)

_DECODERS = {SoftmaxDecoder: "softmax", GaussianDecoder: "discretized_gaussian", DensityDecoder: "gaussian_density"}


def evaluate_likelihood(
    model: Any,
    images: Any,
    *,
    scheduler: Any = None,
    method: Method | None = None,
    num_steps: int | None = None,
    grid: Grid | Sequence[float] | Tensor | None = None,
    num_samples: int = 16,
    num_levels: int | Literal["auto"] | None = "auto",
    pixel_encoding: PixelEncoding | Literal["auto"] = "auto",
    batch_size: int | None = None,
    class_labels: int | Sequence[int] | Tensor | str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    generator: torch.Generator | int | None = None,
    progress_bar: bool = True,
    variance_type: str | None = None,
    clip_denoised: bool = False,
    variance_reduction: bool = True,
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    dequantization: Dequantization = "none",
    divergence: Divergence = "hutchinson",
    tolerance: float = 1e-5,
    resume_dir: str | Path | None = None,
    accelerator: Any = None,
) -> LikelihoodReport:
    r"""Bits/dim of images under a diffusion model, with the error of the estimate.

    The chain of a bound is that of ancestral sampling, also where the scheduler samples with another `stochasticity` (except 0).

    The first two methods estimate the bound -ln p(x) <= prior + diffusion + reconstruction:

    - `"continuous"`: the diffusion term is an integral over log SNR (VDM). Default for schedules given in log SNR.
    - `"discrete"`: the bound of a chain of `num_steps` steps. Default for tables of betas, with the table's own steps.
    - `"importance_weighted"`: the K-sample bound of that chain, tighter, from K = `num_samples` // 2 whole chains, twice.
    - `"ode"`: -ln p of the probability-flow ODE, another model with the same network; `num_samples` trajectories an image.

    A schedule given in log SNR ends at `z_0`, and its pixels are decoded by VDM's softmax, whose expectation is computed exactly. A table
    of betas ends at `x_1` with DDPM's discretised Gaussian around the network's `x_hat`, of the posterior variance of the
    second step (or the network's own, if learned); in continuous time it is interpolated linearly in log SNR. Nothing is clipped.

    Args:
        model: a [`VDMPipeline`], any pipeline with `unet` and `scheduler` that works on pixels, or, with `scheduler`, any
            callable `(sample, timestep) -> prediction` that returns a tensor or an object with `.sample`. A module is put into
            eval mode meanwhile. It is given the sample in its own dtype on its own device (a mere callable: float32,
            CPU) and timesteps `(B,)`: int64 if they are whole numbers, else float32.
        images: integers `0..num_levels-1` as uint8 or another integer dtype, `(N, C, H, W)`; an iterable of such batches, or
            of PIL images; or a `datasets.Dataset` with a column of images. Each image is counted once.
        scheduler: what the model was trained with, a [`VDMScheduler`] or one of Diffusers' with a table of betas. Default:
            the pipeline's.
        method: see above.
        num_steps: steps of the discrete chain. Default: the scheduler's `num_train_timesteps`.
        grid: where they are: `"time"`, uniform in t (in a table's index); `"log_snr"`, uniform in log SNR; `"optimal"`, chosen by dynamic
            programming for the smallest bound (needs the scheduler's `optimal_variance`); or the log SNRs themselves, decreasing, both
            ends included. Default: the scheduler's `step_grid`, else `"time"`; with `variance_type="optimal"`, which is worth little on
            others, `"optimal"` for fewer steps than `num_train_timesteps` and `"log_snr"` for more. In a table of betas every step is an
            entry of the table.
        num_samples: evaluations of the model for an image, spread over time, more where they are worth more.
        num_levels: number of levels of a pixel. Default: the pipeline's own, else 256. `None`: the data are continuous, floats as the
            model takes them, with a Gaussian decoder; read `nats_per_dim`.
        pixel_encoding: `"bin_center"` or `"endpoint"`, how the model was trained to see level k. Default: a `VDMPipeline`'s own;
            `"endpoint"` for other pipelines, which is what Diffusers trains with; `"bin_center"` for a model without a pipeline.
        batch_size: evaluations at a time. The result does not depend on it.
        class_labels: one for all images, one for each, or the name of a dataset's column.
        model_kwargs: further arguments of the model. A tensor of N rows has one for each image, a tensor of one row one for all.
        generator: of the noise, or a seed. The result depends on its seed alone, not on the batch size.
        progress_bar: show one.
        variance_type: the reverse variance of the discrete chain, instead of the scheduler's.
        clip_denoised: clamp the predicted image to [-1, 1]. That is another model, with a bound of its own.
        variance_reduction: learn from the first evaluations where further ones are worth most, and use control variates. False:
            the plain stratified average, in which images do not touch each other.
        target_standard_error: bits/dim; go on beyond `num_samples` until `standard_error` should be at most this. Independent
            evaluations decide it, so that the figure stays unbiased; the error reported may come out a little above.
        max_model_evaluations: in all; where to stop whether or not the target is reached. (For the ODE, whose cost shows only as it
            runs, two trajectories an image come first, and as many of the others as should fit.)
        dequantization: for the ODE: `"none"` (the noise of `z_0` and the softmax decoder), `"uniform"` or `"truncated_normal"`; all give
            bounds on the flow's -ln p of the integers. See `vdm_diffusers.probability_flow`.
        divergence: for the ODE: `"hutchinson"` (one fixed probe a trajectory, unbiased) or `"exact"` (D backward passes a step).
        tolerance: of the ODE's solver, relative and absolute.
        resume_dir: a folder for partial results: an evaluation with the same arguments, images and weights that was cut off goes
            on from there, with another target or limit too. Without `generator` the seed is then 0.
        accelerator: an `accelerate.Accelerator`, whose processes share the work, batch by batch, and all get the same report. Images
            and arguments must be the same everywhere; the figure is that of one process.

    Returns:
        [`LikelihoodReport`]: `bits_per_dim`, `standard_error` (of the estimate, for these images), `sampling_error` (between images),
        and for each image, in nats, `nats`, `prior`, `diffusion`, `reconstruction`.

    Raises:
        ValueError: if there is no finite bound, or the figure would not be one: deterministic sampling, latents, guidance, images
            that are floats, of another size, or of more levels; a learned variance that the method cannot use.

    Example:
    ```py
    >>> pipe = DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")
    >>> report = evaluate_likelihood(pipe, images)
    >>> print(f"{report.bits_per_dim:.3f} +- {report.standard_error:.3f} bits/dim")
    ```

    Source: Kingma et al. 2021, "Variational Diffusion Models", equations 11 to 18; Ho et al. 2020, equations 5 and 13.
    """
    generator = as_generator(generator)
    assert not isinstance(generator, int)
    num_samples, num_steps, batch_size, max_model_evaluations = (
        whole_number(name, value)
        for name, value in (
            ("num_samples", num_samples),
            ("num_steps", num_steps),
            ("batch_size", batch_size),
            ("max_model_evaluations", max_model_evaluations),
        )
    )
    for name, text, allowed in (
        ("dequantization", dequantization, get_args(Dequantization)),
        ("divergence", divergence, get_args(Divergence)),
    ):
        if text not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {text!r}.")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"`tolerance` must be a positive number, got {tolerance}.")
    network, scheduler, num_levels, pixel_encoding = unpack(model, scheduler, num_levels, pixel_encoding)
    chain = adopt(scheduler)
    if method is None:
        method = "continuous" if chain.timeline.entries is None else "discrete"
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    is_chain = method in ("discrete", "importance_weighted")
    _check_options(
        method,
        {
            "num_steps": num_steps,
            "grid": grid,
            "variance_type": variance_type,
            "dequantization": None if dequantization == "none" else dequantization,
            "divergence": None if divergence == "hutchinson" else divergence,
            "tolerance": None if tolerance == 1e-5 else tolerance,
            "variance_reduction": None if variance_reduction else variance_reduction,
        },
    )
    schedule = chain.noise_schedule
    kind = reverse_variance_of(variance_type or chain.config.variance_type, is_chain, num_steps, chain)
    term: DiffusionTerm | None = None
    if method == "continuous":
        term = ContinuousTerm(schedule.log_snr_max, schedule.log_snr_min)
    elif is_chain:
        log_snrs = chain_log_snrs(chain, num_steps, grid, kind)
        term = DiscreteTerm(log_snrs, kind, optimal_of(chain) if kind == "optimal" else None)
    decoder = decoder_of(chain, kind, num_levels)
    learned = kind if kind in ("learned", "learned_range") else None
    levels, denoiser, device, batch_size = prepare(
        network, chain, images, class_labels, num_levels, pixel_encoding, model_kwargs, batch_size, learned, clip_denoised
    )  # fmt: skip
    by_frequency = isinstance(term, DiscreteTerm) and term.bands is not None
    if isinstance(term, DiscreteTerm) and term.optimal is not None:
        term.optimal.check_shape(levels.shape[1:])
    settings: dict[str, Any] = {
        "num_steps": term.num_steps + isinstance(decoder, GaussianDecoder) if isinstance(term, DiscreteTerm) else None,
        "num_samples": num_samples,
        "num_levels": num_levels,
        "pixel_encoding": None if num_levels is None else pixel_encoding,
        "prediction_type": chain.config.prediction_type,
        "reverse_variance": (f"{kind}_per_frequency" if by_frequency else kind) if is_chain else None,
        "decoder": _DECODERS[type(decoder)] if dequantization == "none" else None,
        "log_snr_max": schedule.log_snr_max,
        "log_snr_min": schedule.log_snr_min,
        "clip_denoised": clip_denoised,
        "dtype": str(device_and_dtype(network)[1]).removeprefix("torch."),
    }
    if is_chain and chain.config.get("stochasticity", 1.0) != 1.0:
        settings["chain"] = f"ancestral (the scheduler samples with stochasticity {chain.config.stochasticity})"
    seed = 0 if generator is None and resume_dir is not None else shared_seed(generator, accelerator)
    per_image = num_samples
    if isinstance(term, DiscreteTerm) and method == "importance_weighted":
        per_image = num_samples // 2 * 2 * (term.num_steps + isinstance(decoder, GaussianDecoder))
    with (
        eval_mode(network),
        torch.no_grad(),
        tqdm(total=len(levels) * per_image, disable=not progress_bar or rank_and_size(accelerator)[0] > 0) as bar,
    ):
        own: dict[str, Any] = {}  # that the figure depends on besides the settings
        if method == "ode":
            own = {"dequantization": dequantization, "divergence": divergence, "rtol": tolerance, "atol": tolerance}
        elif method != "importance_weighted":
            own = {"variance_reduction": variance_reduction}
        folder = None
        if resume_dir is not None:
            identity = settings | own | {"method": method, "batch_size": batch_size, "seed": seed}
            folder = resume_folder(Path(resume_dir), network, denoiser, levels, identity, term, decoder)
        common: dict[str, Any] = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "seed": seed,
            "device": device,
            "target_standard_error": target_standard_error,
            "max_model_evaluations": max_model_evaluations,
            "progress": bar.update,
            "runner": partial(run_shared, folder, accelerator),
        } | own
        if method == "ode":
            own_decoder = decoder if isinstance(decoder, GaussianDecoder) else None
            report = evaluate_flow(
                denoiser, levels, schedule.log_snr_max, schedule.log_snr_min, decoder=own_decoder, **common
            )
        else:
            estimator = evaluate_importance_weighted if method == "importance_weighted" else evaluate_bound
            report = estimator(denoiser, levels, cast(Any, term), decoder, schedule.log_snr_min, **common)
    if "variance_reduction" in own:
        settings["variance_reduction"] = variance_reduction
    report.settings.update(settings)
    return report


_MEANS_SOMETHING_WITH = {
    "num_steps": ("discrete", "importance_weighted"),
    "grid": ("discrete", "importance_weighted"),
    "variance_type": ("discrete", "importance_weighted", "continuous"),
    "dequantization": ("ode",),
    "divergence": ("ode",),
    "tolerance": ("ode",),
    "variance_reduction": ("discrete", "continuous"),
}


def _check_options(method: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option, None where it was not given, that means nothing to the method."""
    for name, value in options.items():
        methods = _MEANS_SOMETHING_WITH[name]
        if value is not None and method not in methods:
            raise ValueError(
                f"`{name}` belongs to method={' or '.join(map(repr, methods))}, got {value} with method={method!r}: leave it out."
            )
