"""Likelihood of images under a pipeline, a checkpoint's network and scheduler, or a network of one's own."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import PIL.Image
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from vdm_diffusers.decoders import PIXEL_ENCODINGS, PixelEncoding
from vdm_diffusers.likelihood import (
    ContinuousTerm,
    Decoder,
    DenoisingModel,
    DensityDecoder,
    DiffusionTerm,
    DiscreteTerm,
    GaussianDecoder,
    LikelihoodReport,
    SoftmaxDecoder,
    evaluate_bound,
    evaluate_importance_weighted,
    measure_mse,
    sample_chain,
)
from vdm_diffusers.models.labels import default_label, num_classes
from vdm_diffusers.probability_flow import Dequantization, Divergence, evaluate_flow
from vdm_diffusers.reverse_variance import (
    OptimalVariance,
    ReverseVariance,
    forward_variance,
    optimal_grid,
    posterior_variance,
)
from vdm_diffusers.schedulers.grids import even_entries
from vdm_diffusers.schedulers.scheduling_vdm import MAX_KNOTS, VDMScheduler

Method = Literal["continuous", "discrete", "ode", "importance_weighted"]
METHODS: tuple[str, ...] = get_args(Method)
Grid = Literal["time", "log_snr", "optimal"]

_REVERSE_VARIANCES: dict[str, ReverseVariance] = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "forward",
    "fixed_large_log": "forward",
    "optimal": "optimal",
    "learned": "learned",
    "learned_range": "learned_range",
}
_DECODERS = {SoftmaxDecoder: "softmax", GaussianDecoder: "discretized_gaussian", DensityDecoder: "gaussian_density"}
_BATCH_ELEMENTS = 1 << 18  # of the default batch size: keeps the CPU's caches and a small GPU's memory in view
_PIL_LEVELS = {"L": 256, "RGB": 256, "RGBA": 256, "LA": 256, "1": 2}


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
    generator: torch.Generator | None = None,
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
        num_samples: evaluations of the model for an image, spread evenly over time. If there are enough for every step of the
            chain, the steps are summed, as many times over as `num_samples` allows.
        num_levels: number of levels of a pixel. Default: the pipeline's own, else 256. `None`: the data are continuous, floats as the
            model takes them, with a Gaussian decoder; read `nats_per_dim`.
        pixel_encoding: `"bin_center"` or `"endpoint"`, how the model was trained to see level k. Default: a `VDMPipeline`'s own;
            `"endpoint"` for other pipelines, which is what Diffusers trains with; `"bin_center"` for a model without a pipeline.
        batch_size: evaluations at a time. The result does not depend on it.
        class_labels: one for all images, one for each, or the name of a dataset's column.
        model_kwargs: further arguments of the model. A tensor of N rows has one for each image, a tensor of one row one for all.
        generator: of the noise. The result depends on its seed alone, not on the batch size.
        progress_bar: show one.
        variance_type: the reverse variance of the discrete chain, instead of the scheduler's.
        clip_denoised: clamp the predicted image to [-1, 1]. That is another model, with a bound of its own.
        variance_reduction: learn from the first evaluations where further ones are worth most, and use control variates. False:
            the plain stratified average, in which images do not touch each other.
        target_standard_error: bits/dim; go on beyond `num_samples` until `standard_error` is at most this.
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
    network, scheduler, num_levels, pixel_encoding = _unpack(model, scheduler, num_levels, pixel_encoding)
    chain = _adopt(scheduler)
    if method is None:
        method = "continuous" if chain.is_log_snr_schedule else "discrete"
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    is_chain = method in ("discrete", "importance_weighted")
    if is_chain and chain.config.get("stochasticity", 1.0) != 1.0:
        raise ValueError(
            f"`scheduler` has stochasticity={chain.config.stochasticity}, and method={method!r} is the bound of ancestral sampling's "
            "chain. Set stochasticity=1.0 in its config."
        )
    chain_only: dict[str, Any] = {"num_steps": num_steps, "grid": grid}
    for name, value in chain_only.items():
        if value is not None and not is_chain:
            raise ValueError(f"`{name}` belongs to method='discrete', got {value} with method={method!r}.")
    schedule = chain.noise_schedule
    kind = _reverse_variance(variance_type or chain.config.variance_type, is_chain, num_steps, chain)
    term: DiffusionTerm | None = None
    if method == "continuous":
        term = ContinuousTerm(schedule.log_snr_max, schedule.log_snr_min)
    elif is_chain:
        log_snrs = chain_log_snrs(chain, num_steps, grid, kind)
        term = DiscreteTerm(log_snrs, kind, _optimal(chain) if kind == "optimal" else None)
    decoder = _decoder(chain, kind, num_levels)
    learned = kind if kind in ("learned", "learned_range") else None
    levels, denoiser, device, batch_size = _prepare(
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
        "dtype": str(_device_and_dtype(network)[1]).removeprefix("torch."),
    }
    seed = 0 if generator is None and resume_dir is not None else _shared_seed(generator, accelerator)
    per_image = num_samples
    if isinstance(term, DiscreteTerm) and method == "importance_weighted":
        per_image = num_samples // 2 * 2 * (term.num_steps + isinstance(decoder, GaussianDecoder))
    with (
        _eval_mode(network),
        torch.no_grad(),
        tqdm(total=len(levels) * per_image, disable=not progress_bar or _rank_and_size(accelerator)[0] > 0) as bar,
    ):
        own: dict[str, Any] = {}  # that the figure depends on besides the settings
        if method == "ode":
            own = {"dequantization": dequantization, "divergence": divergence, "rtol": tolerance, "atol": tolerance}
        elif method != "importance_weighted":
            own = {"variance_reduction": variance_reduction}
        folder = None
        if resume_dir is not None:
            identity = settings | own | {"method": method, "batch_size": batch_size, "seed": seed}
            folder = _resume_folder(Path(resume_dir), network, denoiser, levels, identity, term, decoder)
        common: dict[str, Any] = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "seed": seed,
            "device": device,
            "target_standard_error": target_standard_error,
            "max_model_evaluations": max_model_evaluations,
            "progress": bar.update,
            "runner": partial(_run_shared, folder, accelerator),
        } | own
        if method == "ode":
            report = evaluate_flow(denoiser, levels, schedule.log_snr_max, schedule.log_snr_min, **common)
        else:
            estimator = evaluate_importance_weighted if method == "importance_weighted" else evaluate_bound
            report = estimator(denoiser, levels, cast(Any, term), decoder, schedule.log_snr_min, **common)
    if "variance_reduction" in own:
        settings["variance_reduction"] = variance_reduction
    report.settings.update(settings)
    return report


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
    r"""What `variance_type="optimal"` needs: E|x - x_hat|^2 / D of a network, measured on training images, against log SNR.

    The reverse variance posterior + (coefficient of x)^2 E|x - x_hat|^2 / D gives the smallest bound that any variance of this form can,
    whatever the network; with `per_frequency` that of the best one for each band of frequencies, which is smaller still. It pays with few
    steps on a grid to match, which the scheduler and [`evaluate_likelihood`] then choose by default (`step_grid`, `grid`). On a
    linear-beta grid uniform in t it may give samples that look worse, though their likelihood is higher.

    Args: as in [`evaluate_likelihood`]; besides
        images: a few hundred training images. None: the network's own samples, `num_images` of them by ancestral sampling in `num_steps` steps
            (with as many evaluations each), rounded to levels if there are any. They are those of the model, not of the data: what it has
            not learned is missing.
        per_frequency: one mse for each channel and each of at most 32 radial bands of the cosine transform, for images of this one size.
            Bands of low frequency hold few coefficients: let `num_samples` times the images be some hundred times `num_knots`.
        form: `"error"`, E|x - x_hat|^2, optimal for every network; `"analytic"`, Analytic-DPM's
            sigma^2/alpha^2 (1 - E|eps_hat|^2 / D), which looks at the network's answers alone and equals it for an exact network only.
            Default: `"error"` with images, `"analytic"` without.
        num_knots: number of log SNRs, equally spaced over the schedule; at most 64 with `per_frequency`.
        num_samples: evaluations of the model for an image, spread over the knots.
        sample_shape: (C, H, W) of the model's own samples. Default: from the model's config.

    Returns:
        `{"log_snr": [...], "mse": [...]}`, with `"shape": [C, H, W]` if by frequency, for the scheduler's config, where it travels with the
        checkpoint: `VDMScheduler.from_config(scheduler.config, variance_type="optimal", optimal_variance=...)`.

    Raises:
        ValueError: besides those of [`evaluate_likelihood`], a model without images that does not say its samples' shape; more knots than
            a scheduler takes.

    Source: Bao et al. 2022, "Analytic-DPM", theorem 1; Bao et al. 2022, "Estimating the Optimal Covariance with Imperfect Mean".
    """
    network, scheduler, num_levels, pixel_encoding = _unpack(model, scheduler, num_levels, pixel_encoding)
    chain = _adopt(scheduler)
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
    levels, denoiser, device, batch_size = _prepare(
        network, chain, images, class_labels, num_levels, pixel_encoding, model_kwargs, batch_size, None, False
    )
    schedule = chain.noise_schedule
    low = schedule.log_snr_min
    if not math.isfinite(low):  # zero terminal SNR: the entry before, where the network still sees something
        low = float(chain.log_snr(float(chain.config.num_train_timesteps - 2)))
    knots = torch.linspace(low, schedule.log_snr_max, num_knots, dtype=torch.float64)
    seed = _seed(generator)
    grid = (
        None
        if has_images
        else chain_log_snrs(chain, num_steps, "log_snr" if math.isfinite(schedule.log_snr_min) else "time")
    )
    total = len(levels) * (num_samples + (0 if grid is None else len(grid)))
    with _eval_mode(network), torch.no_grad(), tqdm(total=total, disable=not progress_bar) as bar:
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
                "without `images` `sample_shape=(C, H, W)` is needed: the model's config does not say how large its samples are."
            )
        sample_shape = (channels, *((size, size) if isinstance(size, int) else size))
    return tuple(int(n) for n in sample_shape)


def _prepare(
    network: Callable[..., Any],
    scheduler: Any,
    images: Any,
    class_labels: Any,
    num_levels: int | None,
    pixel_encoding: PixelEncoding,
    model_kwargs: dict[str, Any] | None,
    batch_size: int | None,
    learned: Literal["learned", "learned_range"] | None,
    clip_denoised: bool,
) -> tuple[Tensor, DenoisingModel, torch.device, int]:
    """The images as integers, the network as the core calls it, its device, and how many evaluations to do at a time."""
    _check_kwargs(model_kwargs)
    levels, labels = _load_images(images, class_labels, num_levels)
    _check_size(network, levels)
    labels = _load_labels(network, labels, len(levels))
    device, dtype = _device_and_dtype(network)
    if batch_size is None:
        batch_size = max(1, min(512, _BATCH_ELEMENTS // levels[0].numel()))
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    denoiser = DenoisingModel(
        predict=_Predictor(network, scheduler, device, dtype, labels, model_kwargs or {}, len(levels)),
        prediction_type=scheduler.config.prediction_type,
        num_levels=num_levels,
        pixel_encoding=pixel_encoding,
        learned_variance=learned,
        clip_denoised=clip_denoised,
    )
    return levels, denoiser, device, batch_size


# --- model and scheduler -----------------------------------------------------------------------------------------------


def _unpack(
    model: Any, scheduler: Any, num_levels: int | str | None, pixel_encoding: str
) -> tuple[Callable[..., Any], Any, int | None, PixelEncoding]:
    """Network, scheduler, levels and encoding of a pipeline or of a model with its scheduler."""
    components = getattr(model, "components", None)
    own: dict[str, Any] = {"num_levels": 256, "pixel_encoding": "bin_center"}
    if isinstance(components, dict):
        latent = [name for name in ("vae", "vqvae", "movq", "prior_prior") if components.get(name) is not None]
        if latent:
            raise ValueError(
                f"`model` is a {type(model).__name__} with `{latent[0]}`, a model of latents. The likelihood of pixels under it would need "
                "the autoencoder's own likelihood: a pixel decoder on latents gives a number that means nothing."
            )
        if components.get("unet") is None:
            raise ValueError(
                f"`model`, a {type(model).__name__}, has no `unet`. Pass the network itself, with `scheduler`."
            )
        scheduler = components.get("scheduler") if scheduler is None else scheduler
        if "num_levels" in model.config and "pixel_encoding" in model.config:
            own = {"num_levels": model.config.num_levels, "pixel_encoding": model.config.pixel_encoding}
            if num_levels not in ("auto", own["num_levels"]):
                raise ValueError(
                    f"`num_levels` must be the pipeline's own, {own['num_levels']}, got {num_levels}: its decoder has as many. "
                    "Leave it out."
                )
        else:
            own["pixel_encoding"] = "endpoint"
        model = components["unet"]
    if scheduler is None:
        raise ValueError("`scheduler` is needed with a model that is no pipeline: what the model was trained with.")
    if not callable(model):
        raise ValueError(f"`model` must be a pipeline or a callable (sample, timestep), got {type(model).__name__}.")
    levels = own["num_levels"] if num_levels == "auto" else num_levels
    encoding = own["pixel_encoding"] if pixel_encoding == "auto" else pixel_encoding
    if levels is not None and (not isinstance(levels, int) or isinstance(levels, bool) or levels < 2):
        raise ValueError(
            f"`num_levels` must be a whole number of at least 2 (None for continuous data), got {levels!r}."
        )
    if encoding not in PIXEL_ENCODINGS:
        raise ValueError(f"`pixel_encoding` must be one of {', '.join(PIXEL_ENCODINGS)}, got {encoding!r}.")
    return model, scheduler, levels, cast(PixelEncoding, encoding)


def _adopt(scheduler: Any) -> Any:
    """A scheduler that knows its log SNRs: the given one, or a `VDMScheduler` with a stock scheduler's table of betas."""
    config = scheduler.config
    if not hasattr(scheduler, "is_log_snr_schedule"):  # by name: a class from a checkpoint's own code is another one
        missing = [key for key in ("beta_schedule", "num_train_timesteps") if key not in config]
        if missing:
            raise ValueError(
                f"`scheduler`, a {type(scheduler).__name__}, has no table of betas (no `{missing[0]}` in its config), which "
                "the bound is computed from. Pass a VDMScheduler that says what the model was trained with."
            )
        scheduler = VDMScheduler.from_config(config)
        config = scheduler.config
    if config.get("stochasticity", 1.0) == 0:
        raise ValueError(
            "`scheduler` has stochasticity=0: deterministic sampling has no finite ELBO. Set stochasticity=1.0 in its config: the "
            "bound is that of ancestral sampling."
        )
    return scheduler


def _reverse_variance(variance_type: str, is_chain: bool, num_steps: int | None, scheduler: Any) -> ReverseVariance:
    if variance_type not in _REVERSE_VARIANCES:
        raise ValueError(
            f"`variance_type` must be one of {', '.join(_REVERSE_VARIANCES)}, got {variance_type!r}: pass one of them."
        )
    kind = _REVERSE_VARIANCES[variance_type]
    if not kind.startswith("learned"):
        return kind
    if not is_chain:
        raise ValueError(
            f"variance_type={variance_type!r} cannot be used in continuous time, where no reverse variance remains. Take "
            "method='discrete', or variance_type='fixed_small' to leave the network's variance aside."
        )
    steps = scheduler.config.num_train_timesteps
    if kind == "learned" and num_steps not in (None, steps):
        raise ValueError(
            f"variance_type='learned' holds for the {steps} steps that the model was trained with, got num_steps={num_steps}. Take "
            "'learned_range', or variance_type='fixed_small'."
        )
    return kind


def _optimal(scheduler: Any) -> OptimalVariance:
    table = scheduler.config.get("optimal_variance")
    if table is None:
        raise ValueError(
            "variance_type='optimal' and grid='optimal' need the network's mean squared errors: put what estimate_optimal_variance(...) "
            "returns into the scheduler's config, VDMScheduler.from_config(scheduler.config, optimal_variance=...)."
        )
    return OptimalVariance.from_config(table)


def chain_log_snrs(
    scheduler: Any,
    num_steps: int | None = None,
    grid: Grid | Sequence[float] | Tensor | None = None,
    kind: ReverseVariance | None = None,
) -> Tensor:
    """The log SNRs of a chain, decreasing, float64: x_1 (or z_0) first, then one for each transition.

    `num_steps` counts evaluations of the network: a chain of a table of betas needs one at x_1, so that it has `num_steps` entries;
    one of a log-SNR schedule has `num_steps + 1`. `kind` is the chain's reverse variance, by default the scheduler's. Other arguments
    and Raises: see `evaluate_likelihood`.
    """
    schedule, trained = scheduler.noise_schedule, scheduler.config.num_train_timesteps
    is_table = not scheduler.is_log_snr_schedule
    steps = trained if num_steps is None else num_steps
    if grid is not None and not isinstance(grid, str):
        log_snrs = torch.as_tensor(grid, dtype=torch.float64)
        if num_steps is not None and num_steps != len(log_snrs) - (not is_table):
            raise ValueError(f"`num_steps` and `grid` disagree: {num_steps}, and {len(log_snrs)} log SNRs.")
        ends = [schedule.log_snr_max, schedule.log_snr_min]
        if log_snrs.ndim != 1 or len(log_snrs) < 2 or log_snrs[[0, -1]].tolist() != ends:
            raise ValueError(f"`grid` must run from {ends[0]} to {ends[1]}, the schedule's own ends.")
        return log_snrs
    if grid not in (None, "time", "log_snr", "optimal"):
        raise ValueError(f"`grid` must be 'time', 'log_snr', 'optimal' or log SNRs, got {grid!r}.")
    low, high = (2, trained) if is_table else (1, 1 << 20)
    if not low <= steps <= high:
        table = ", the length of the scheduler's table" if is_table else ""
        raise ValueError(f"`num_steps` must lie in {low}..{high}{table}, got {steps}.")
    kind = kind or _REVERSE_VARIANCES.get(scheduler.config.variance_type)
    if grid is None:
        grid = cast("Grid | None", scheduler.config.get("step_grid"))
    if grid is None:
        grid = "time" if kind != "optimal" else "optimal" if steps < trained else "log_snr"
    entries = scheduler.log_snr(torch.arange(trained)).double()
    if is_table and (grid == "time" or steps == trained):
        return entries[torch.linspace(0, trained - 1, steps, dtype=torch.float64).round().long()]
    if grid == "optimal":
        candidates = entries if is_table else _between(schedule, max(1024, 2 * steps))
        variance: Literal["posterior", "optimal"] = "posterior" if kind == "posterior" else "optimal"
        return optimal_grid(_optimal(scheduler), steps - is_table, candidates, variance=variance)
    if not is_table:
        uniform = torch.arange(steps + 1, dtype=torch.float64) / steps
        return schedule.log_snr(uniform) if grid == "time" else _between(schedule, steps)
    if not bool(entries.isfinite().all()):
        raise ValueError("grid='log_snr' needs a finite log SNR at both ends: take 'time' with zero terminal SNR.")
    return entries[even_entries(entries, steps)]


def _between(schedule: Any, num_steps: int) -> Tensor:
    """Log SNRs equally spaced from one end of a schedule to the other, both exact: (num_steps + 1,)."""
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    return (1 - t) * schedule.log_snr_max + t * schedule.log_snr_min


def _decoder(scheduler: Any, kind: ReverseVariance, num_levels: int | None) -> Decoder:
    if num_levels is None:
        return DensityDecoder(scheduler.noise_schedule.log_snr_max)
    if scheduler.is_log_snr_schedule:
        return SoftmaxDecoder(scheduler.noise_schedule.log_snr_max)
    first, second = scheduler.log_snr(torch.tensor([0.0, 1.0])).double()
    variance = posterior_variance(first, second)
    if kind == "optimal":  # E|x - x_hat|^2 / D at x_1, which is zero for an exact network of a few known images
        variance = _optimal(scheduler).overall.at(first).clamp(min=1e-12)
    return GaussianDecoder(
        log_snr_1=float(first),
        variance=float(variance),
        upper_variance=float(forward_variance(torch.inf, first)),
        learned=kind if kind in ("learned", "learned_range") else None,
    )


class _Predictor:
    """The network as the estimators call it: (z_t, log_snr, index of the images) -> output."""

    def __init__(
        self,
        network: Callable[..., Any],
        scheduler: Any,
        device: torch.device,
        dtype: torch.dtype,
        labels: Tensor | None,
        model_kwargs: dict[str, Any],
        num_images: int,
    ):
        self.network, self.scheduler, self.device, self.dtype = network, scheduler, device, dtype
        self.per_image = {} if labels is None else {"class_labels": labels.to(device)}
        self.shared: dict[str, Any] = {}
        for name, value in model_kwargs.items():
            if isinstance(value, Tensor) and value.ndim and len(value) in (1, num_images):
                self.per_image[name] = value.to(device).expand(num_images, *value.shape[1:])
            else:
                self.shared[name] = value

    def __call__(self, z_t: Tensor, log_snr: Tensor, index: Tensor) -> Tensor:
        timestep = self.scheduler.timestep_from_log_snr(log_snr)
        whole = timestep.round()
        # a table's own entries, through log SNR and back, are whole numbers but for rounding
        timestep = torch.where((timestep - whole).abs() < 1e-6, whole, timestep)
        timestep = timestep.long() if bool((timestep == whole).all()) else timestep.to(torch.float32)
        arguments = {name: value[index.to(self.device)] for name, value in self.per_image.items()}
        output = self.network(z_t.to(self.dtype), timestep.to(self.device), **arguments, **self.shared)
        if isinstance(output, tuple):
            output = output[0]
        return output if isinstance(output, Tensor) else output.sample


def _device_and_dtype(network: Callable[..., Any]) -> tuple[torch.device, torch.dtype]:
    """Where the model takes its sample, and in what dtype."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if parameter is None:
        return torch.device("cpu"), torch.float32
    dtype = getattr(
        network, "dtype", parameter.dtype
    )  # Diffusers' models know theirs when weights are stored in another
    if getattr(network, "takes_float32_sample", False):
        dtype = torch.promote_types(dtype, torch.float32)
    return parameter.device, dtype


@contextmanager
def _eval_mode(network: Callable[..., Any]) -> Iterator[None]:
    modes = {m: m.training for m in network.modules()} if isinstance(network, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_kwargs(model_kwargs: dict[str, Any] | None) -> None:
    guidance = [name for name in model_kwargs or {} if "guidance" in name]
    if guidance:
        raise ValueError(
            f"`model_kwargs` holds {guidance[0]!r}. Guidance changes the samples, not the likelihood that the model was trained for: "
            "the guided network's bound is of another, unnormalised model."
        )


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


# --- sharing and keeping the work --------------------------------------------------------------------------------------


def _rank_and_size(accelerator: Any) -> tuple[int, int]:
    """This process and how many there are."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def _shared_seed(generator: torch.Generator | None, accelerator: Any) -> int:
    """A seed drawn from `generator`: the first process's, everywhere."""
    seed = [_seed(generator)]
    if _rank_and_size(accelerator)[1] > 1:
        torch.distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def _run_shared(
    folder: Path | None, accelerator: Any, work: Sequence[tuple[str, Callable[[], Tensor]]]
) -> list[Tensor]:
    """Every process does its share and gets all results; what is found in `folder` is not done again."""
    rank, size = _rank_and_size(accelerator)
    mine = {}
    for number, (name, compute) in enumerate(work):
        if number % size == rank:
            mine[number] = compute() if folder is None else _kept(folder / f"{name}.safetensors", compute)
    everything: list[dict[int, Tensor]] = [mine]
    if size > 1:
        everything = [{}] * size
        torch.distributed.all_gather_object(everything, mine)
    results = {number: result for part in everything for number, result in part.items()}
    return [results[number] for number in range(len(work))]


def _kept(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor in `file`, or one computed now and written there, whole or not at all."""
    if file.exists():
        return load_file(file)["result"]
    result = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({"result": result}, unfinished)
    unfinished.replace(file)
    return result


def _resume_folder(
    parent: Path,
    network: Callable[..., Any],
    model: DenoisingModel,
    levels: Tensor,
    identity: dict[str, Any],
    term: DiffusionTerm | None,
    decoder: Decoder,
) -> Path:
    """A folder that only an evaluation of the same weights, images and settings finds again."""
    digest = hashlib.sha256(repr((sorted(identity.items()), decoder, tuple(levels.shape))).encode())
    tensors = [levels, *(network.state_dict().values() if isinstance(network, nn.Module) else ())]
    if isinstance(model.predict, _Predictor):
        tensors += [value for _, value in sorted(model.predict.per_image.items())]
    if isinstance(term, DiscreteTerm):
        tensors += [term.grid, *([term.optimal.log_snr, term.optimal.mse] if term.optimal is not None else [])]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return parent / digest.hexdigest()[:24]


# --- images ------------------------------------------------------------------------------------------------------------


def _load_images(images: Any, class_labels: Any, num_levels: int | None) -> tuple[Tensor, Any]:
    """All images as one integer tensor (N, C, H, W), and the labels, read from the data set if they name a column."""
    if isinstance(images, PIL.Image.Image):
        images = [images]
    if _is_dataset(images):
        column = _image_column(images)
        if isinstance(class_labels, str):
            class_labels = list(images[class_labels])
        images = (row[column] for row in images.select_columns([column]))
    elif isinstance(class_labels, str):
        raise ValueError(f"`class_labels` names a column, {class_labels!r}, but `images` is no datasets.Dataset.")
    batches = [images] if isinstance(images, Tensor) else images
    if not isinstance(batches, Iterable):
        raise ValueError(
            "`images` must be an integer tensor (N, C, H, W), batches of them, PIL images, or a datasets.Dataset, got "
            f"{type(images).__name__}."
        )
    parts: list[Tensor] = []
    for batch in batches:
        part = _to_levels(batch, num_levels)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"all of `images` must have one size, got {tuple(parts[0].shape[1:])} and {tuple(part.shape[1:])}: resize them "
                "as the model's training data were."
            )
        parts.append(part)
    levels = torch.cat(parts) if parts else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    if len(levels) == 0:
        raise ValueError("`images` holds no image.")
    return levels, class_labels


def _to_levels(batch: Any, num_levels: int | None) -> Tensor:
    """One tensor batch or PIL image as integers (B, C, H, W) on the CPU, in the smallest dtype."""
    if num_levels is None:
        if not (
            isinstance(batch, Tensor)
            and batch.is_floating_point()
            and batch.ndim == 4
            and bool(batch.isfinite().all())
        ):
            raise ValueError(
                "with `num_levels=None` `images` must be finite floats (N, C, H, W), as the model takes them."
            )
        return batch.detach().cpu().float()
    if isinstance(batch, PIL.Image.Image):
        mode_levels = _PIL_LEVELS.get(batch.mode)
        if mode_levels is None:
            raise ValueError(
                f"`images` holds a PIL image of mode {batch.mode!r}, whose values are no levels 0..255: convert it to 'L' or 'RGB', "
                "or pass integer tensors."
            )
        if mode_levels != num_levels:
            raise ValueError(
                f"`images` holds PIL images of {mode_levels} levels, but `num_levels` is {num_levels}: pass integer tensors of levels "
                f"0..{num_levels - 1}."
            )
        width, height = batch.size
        data = bytearray(batch.convert("L").tobytes() if batch.mode == "1" else batch.tobytes())
        tensor = torch.frombuffer(data, dtype=torch.uint8).reshape(1, height, width, -1).permute(0, 3, 1, 2)
        return tensor.clamp(max=1) if batch.mode == "1" else tensor.contiguous()
    if not isinstance(batch, Tensor):
        raise ValueError(f"`images` must hold integer tensors (N, C, H, W) or PIL images, got {type(batch).__name__}.")
    if batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise ValueError(
            f"`images` must be integers 0..{num_levels - 1}, got {batch.dtype}. Likelihoods in bits/dim are of integers; for images in "
            f"[0, 1] pass (images * {num_levels - 1}).round().to(torch.uint8)."
        )
    if batch.ndim != 4:
        raise ValueError(f"`images` must have shape (N, C, H, W), got {tuple(batch.shape)}.")
    batch = batch.detach().cpu()
    if batch.numel() and not 0 <= int(batch.min()) <= int(batch.max()) < num_levels:
        raise ValueError(
            f"`images` must hold levels in 0..{num_levels - 1}, got {int(batch.min())}..{int(batch.max())}. Is `num_levels` right?"
        )
    return batch.to(torch.uint8 if num_levels <= 256 else torch.int32)


def _is_dataset(images: Any) -> bool:
    return all(hasattr(images, name) for name in ("features", "column_names", "select_columns"))


def _image_column(dataset: Any) -> str:
    """The column of a datasets.Dataset that holds images, found by its feature type."""
    columns = [name for name, feature in dataset.features.items() if type(feature).__name__ == "Image"]
    if len(columns) != 1:
        raise ValueError(
            f"`images` must have one column of images, got {columns or 'none'} among {dataset.column_names}: choose with "
            "dataset.select_columns(...), or cast_column(name, datasets.Image())."
        )
    return columns[0]


def _check_size(network: Callable[..., Any], levels: Tensor) -> None:
    """Raise ValueError unless the images have the size that the model's config states."""
    config = getattr(network, "config", None)
    channels, size = (
        (config.get(key) for key in ("in_channels", "sample_size")) if config is not None else (None, None)
    )
    if channels is not None and channels != levels.shape[1]:
        raise ValueError(f"`images` must have the model's {channels} channels, got shape {tuple(levels.shape)}.")
    if size is not None:
        expected = (size, size) if isinstance(size, int) else tuple(size)
        if expected != tuple(levels.shape[2:]):
            raise ValueError(
                f"`images` must have the model's size {expected[0]}x{expected[1]}, got {levels.shape[2]}x{levels.shape[3]}: a bound at "
                "another size is one of a model that nobody trained. Resize the images as the training data were."
            )


def _load_labels(network: Callable[..., Any], class_labels: Any, num_images: int) -> Tensor | None:
    classes, default = num_classes(network), default_label(network)
    if class_labels is None:
        if default is not None:
            return torch.full((num_images,), default)
        if classes is not None:
            raise ValueError(f"`class_labels` are needed: the model has {classes} classes.")
        return None
    labels = torch.as_tensor(class_labels)
    if labels.is_floating_point() or labels.ndim > 1 or (labels.ndim == 1 and len(labels) != num_images):
        raise ValueError(
            f"`class_labels` must be one whole number, or one for each of the {num_images} images, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}."
        )
    return labels.long().expand(num_images)
