"""Likelihood of images under a pipeline, a checkpoint's network and scheduler, or a network of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_diffusers.decoders import PixelEncoding
from vdm_diffusers.evaluation.adapters import eval_mode
from vdm_diffusers.evaluation.candidates import Candidate, Space
from vdm_diffusers.evaluation.chains import Grid
from vdm_diffusers.evaluation.latent_models import evaluate_latent_model
from vdm_diffusers.evaluation.methods import EstimationMethod, ImportanceWeighted, Method, ProbabilityFlow
from vdm_diffusers.evaluation.sharing import rank_and_size, resume_folder, run_shared, shared_seed
from vdm_diffusers.likelihood import (
    DiscreteTerm,
    GaussianDecoder,
    LikelihoodReport,
    evaluate_bound,
    evaluate_importance_weighted,
)
from vdm_diffusers.models import HierarchicalVAE, VariationalAutoencoder
from vdm_diffusers.numerics import as_generator, whole_number
from vdm_diffusers.pipelines import LatentVDMPipeline
from vdm_diffusers.probability_flow import Dequantization, Divergence, evaluate_flow


def evaluate_likelihood(
    model: Any,
    images: Any,
    *,
    scheduler: Any = None,
    method: Method | EstimationMethod | None = None,
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
    variance_reduction: bool | None = None,
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    dequantization: Dequantization | None = None,
    divergence: Divergence | None = None,
    tolerance: float | None = None,
    resume_dir: str | Path | None = None,
    accelerator: Any = None,
    prompts: str | Sequence[str] | None = None,
    space: Space | None = None,
) -> LikelihoodReport:
    r"""Bits/dim of images under a diffusion model, with the error of the estimate.

    The chain of a bound is that of ancestral sampling, also where the scheduler samples with another `stochasticity`
    (except 0).

    The first two methods estimate the bound -ln p(x) <= prior + diffusion + reconstruction:

    - `"continuous"`: the diffusion term is an integral over log SNR (VDM). Default for schedules given in log SNR.
    - `"discrete"`: the bound of a chain of `num_steps` steps. Default for tables of betas, with the table's own steps.
    - `"importance_weighted"`: the K-sample bound of that chain, tighter, from K = `num_samples` // 2 whole chains,
      twice.
    - `"ode"`: -ln p of the probability-flow ODE, another model with the same network; `num_samples` trajectories an
      image.

    A schedule given in log SNR ends at `z_0`, and its pixels are decoded by VDM's softmax, whose expectation is
    computed exactly. A table of betas ends at `x_1` with DDPM's discretised Gaussian around the network's `x_hat`, of
    the posterior variance of the second step (or the network's own, if learned); in continuous time it is interpolated
    linearly in log SNR. Nothing is clipped.

    Args:
        model: a [`VDMPipeline`]; a [`VariationalAutoencoder`], [`HierarchicalVAE`] or [`LatentVDMPipeline`], whose own
            (joint) bound is evaluated in `num_samples` passes; any pipeline with `unet` and `scheduler` that works on
            pixels, or, with `scheduler`, any callable `(sample, timestep) -> prediction` that returns a tensor or an
            object with `.sample`. A module is put into eval mode meanwhile. It is given the sample in its own dtype on
            its own device (a mere callable: float32, CPU) and timesteps `(B,)`: int64 if they are whole numbers, else
            float32.
        images: integers `0..num_levels-1` as uint8 or another integer dtype, `(N, C, H, W)`; an iterable of such
            batches, or of PIL images; or a `datasets.Dataset` with a column of images. Each image is counted once.
        scheduler: what the model was trained with, a [`VDMScheduler`] or one of Diffusers' with a table of betas.
            Default: the pipeline's.
        method: a word from above, or an object with options of its own: [`Continuous`], [`Discrete`],
            [`ImportanceWeighted`], [`ProbabilityFlow`]. The words take their options from the arguments here; an
            option of another method is refused.
        num_steps: steps of the discrete chain. Default: the scheduler's `num_train_timesteps`.
        grid: where they are: `"time"`, uniform in t (in a table's index); `"log_snr"`, uniform in log SNR;
            `"optimal"`, chosen by dynamic programming for the smallest bound (needs the scheduler's
            `optimal_variance`); or the log SNRs themselves, decreasing, both ends included. Default: the scheduler's
            `step_grid`, else `"time"`; with `variance_type="optimal"`, which is worth little on others, `"optimal"`
            for fewer steps than `num_train_timesteps` and `"log_snr"` for more. In a table of betas every step is an
            entry of the table.
        num_samples: evaluations of the model for an image, spread over time, more where they are worth more.
        num_levels: number of levels of a pixel. Default: the pipeline's own, else 256. `None`: the data are
            continuous, floats as the model takes them, with a Gaussian decoder; read `nats_per_dim`.
        pixel_encoding: `"bin_center"` or `"endpoint"`, how the model was trained to see level k. Default: a
            `VDMPipeline`'s own; `"endpoint"` for other pipelines, which is what Diffusers trains with; `"bin_center"`
            for a model without a pipeline.
        batch_size: evaluations at a time. The result does not depend on it.
        class_labels: one for all images, one for each, or the name of a dataset's column.
        model_kwargs: further arguments of the model. A tensor of N rows has one for each image, a tensor of one row
            one for all.
        generator: of the noise, or a seed. The result depends on its seed alone, not on the batch size.
        progress_bar: show one.
        variance_type: the reverse variance of the discrete chain, instead of the scheduler's.
        clip_denoised: clamp the predicted image to [-1, 1]. That is another model, with a bound of its own.
        variance_reduction: learn from the first evaluations where further ones are worth most, and use control
            variates. False: the plain stratified average, in which images do not touch each other.
        target_standard_error: bits/dim; go on beyond `num_samples` until `standard_error` should be at most this.
            Independent evaluations decide it, so that the figure stays unbiased; the error reported may come out a
            little above.
        max_model_evaluations: in all; where to stop whether or not the target is reached. (For the ODE, whose cost
            shows only as it runs, two trajectories an image come first, and as many of the others as should fit.)
        dequantization: for the ODE: `"none"` (the noise of `z_0` and the softmax decoder), `"uniform"` or
            `"truncated_normal"`; all give bounds on the flow's -ln p of the integers. See
            `vdm_diffusers.probability_flow`.
        divergence: for the ODE: `"hutchinson"` (one fixed probe a trajectory, unbiased) or `"exact"` (D backward
            passes a step).
        tolerance: of the ODE's solver, relative and absolute.
        resume_dir: a folder for partial results: an evaluation with the same arguments, images and weights that was
            cut off goes on from there, with another target or limit too. Without `generator` the seed is then 0.
        accelerator: an `accelerate.Accelerator`, whose processes share the work, batch by batch, and all get the same
            report. Images and arguments must be the same everywhere; the figure is that of one process.
        prompts: for a text-to-image pipeline, one for all images or one for each; "" by default. The pipeline itself
            encodes them.
        space: `"latent"`: the likelihood of the latents that a pipeline's `vae` makes of the images (their means), a
            density in nats for each number of a latent (`nats_per_dim`). It is not one of the images: the
            autoencoder's own likelihood is missing.

    Returns:
        [`LikelihoodReport`]: `bits_per_dim`, `standard_error` (of the estimate, for these images), `sampling_error`
        (between images), and for each image, in nats, `nats`, `prior`, `diffusion`, `reconstruction`.

    Raises:
        ValueError: if there is no finite bound, or the figure would not be one: deterministic sampling, latents,
            guidance, images that are floats, of another size, or of more levels; a learned variance that the method
            cannot use.

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
    num_samples, batch_size, max_model_evaluations = (
        whole_number(name, value)
        for name, value in (
            ("num_samples", num_samples),
            ("batch_size", batch_size),
            ("max_model_evaluations", max_model_evaluations),
        )
    )
    options = {
        "num_steps": num_steps,
        "grid": grid,
        "variance_type": variance_type,
        "dequantization": dequantization,
        "divergence": divergence,
        "tolerance": tolerance,
        "variance_reduction": variance_reduction,
    }
    if isinstance(model, LatentVDMPipeline | VariationalAutoencoder | HierarchicalVAE):
        given = options | {"scheduler": scheduler, "model_kwargs": model_kwargs, "resume_dir": resume_dir}
        given |= {"class_labels": class_labels, "accelerator": accelerator, "prompts": prompts, "space": space}
        shared: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "progress_bar": progress_bar}
        limits: dict[str, Any] = {
            "target_standard_error": target_standard_error,
            "max_model_evaluations": max_model_evaluations,
        }
        return evaluate_latent_model(model, images, method, given, generator=generator, **shared, **limits)
    candidate = Candidate.of(
        model,
        images,
        scheduler=scheduler,
        method=method,
        options=options,
        num_levels=num_levels,
        pixel_encoding=pixel_encoding,
        batch_size=batch_size,
        class_labels=class_labels,
        model_kwargs=model_kwargs,
        clip_denoised=clip_denoised,
        prompts=prompts,
        space=space,
    )
    seed = 0 if generator is None and resume_dir is not None else shared_seed(generator, accelerator)
    return _estimate(
        candidate,
        resume_dir,
        accelerator,
        progress_bar,
        num_samples=num_samples,
        seed=seed,
        target_standard_error=target_standard_error,
        max_model_evaluations=max_model_evaluations,
    )


def _estimate(
    candidate: Candidate, resume_dir: str | Path | None, accelerator: Any, progress_bar: bool, **limits: Any
) -> LikelihoodReport:
    """The report of one model: `limits` are num_samples, seed, and when to stop."""
    way, term, decoder, denoiser = candidate.way, candidate.term, candidate.decoder, candidate.denoiser
    schedule, levels, batch_size = candidate.chain.noise_schedule, candidate.levels, candidate.batch_size
    num_samples = limits["num_samples"]
    settings = candidate.settings(num_samples)
    per_image = num_samples
    if isinstance(term, DiscreteTerm) and isinstance(way, ImportanceWeighted):
        per_image = num_samples // 2 * 2 * (term.num_steps + isinstance(decoder, GaussianDecoder))
    own: dict[str, Any] = {}  # that the figure depends on besides the settings
    if isinstance(way, ProbabilityFlow):
        own = {"dequantization": way.dequantization, "divergence": way.divergence}
        own |= {"rtol": way.tolerance, "atol": way.tolerance}
    elif not isinstance(way, ImportanceWeighted):
        own = {"variance_reduction": way.variance_reduction}
    folder = None
    if resume_dir is not None:
        identity = settings | own | {"method": way.name, "batch_size": batch_size, "seed": limits["seed"]}
        folder = resume_folder(Path(resume_dir), candidate.network, denoiser, levels, identity, term, decoder)
    with (
        eval_mode(candidate.network),
        torch.no_grad(),
        tqdm(total=len(levels) * per_image, disable=not progress_bar or rank_and_size(accelerator)[0] > 0) as bar,
    ):
        common: dict[str, Any] = {
            "batch_size": batch_size,
            "device": candidate.device,
            "progress": bar.update,
            "runner": partial(run_shared, folder, accelerator),
        }
        common |= limits | own
        if isinstance(way, ProbabilityFlow):
            own_decoder = decoder if isinstance(decoder, GaussianDecoder) else None
            report = evaluate_flow(
                denoiser, levels, schedule.log_snr_max, schedule.log_snr_min, decoder=own_decoder, **common
            )
        else:
            estimator = evaluate_importance_weighted if isinstance(way, ImportanceWeighted) else evaluate_bound
            report = estimator(denoiser, levels, cast(Any, term), decoder, schedule.log_snr_min, **common)
    if "variance_reduction" in own:
        settings["variance_reduction"] = own["variance_reduction"]
    report.settings.update(settings)
    return report
