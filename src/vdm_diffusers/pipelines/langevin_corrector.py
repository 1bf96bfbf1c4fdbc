"""Predictor-corrector sampling for a pipeline: Langevin steps after each step of its scheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from vdm_diffusers.models.calling import call_network
from vdm_diffusers.models.labels import default_label
from vdm_diffusers.numerics import noise_like
from vdm_diffusers.prediction import convert
from vdm_diffusers.score import corrector_step_size, langevin_step


class LangevinCorrector:
    r"""A `callback_on_step_end` that lets every step be followed by `num_steps` Langevin steps at the level it arrived
    at.

    The network's prediction, whatever its type, is read as a score. Each corrector step costs one more evaluation of
    the network. After the last step of the grid there is none.

    Args:
        num_steps: Langevin steps after each step of the scheduler.
        signal_to_noise_ratio: r of `score.corrector_step_size`.
        generator: of the Langevin noise.
        class_labels: `(B,)`, for a network with classes: those that the pipeline is given. None: the network's label
            for "no class".

    Raises:
        ValueError: a number of steps below 1.

    Source: Song et al. 2021, "Score-based generative modeling through stochastic differential equations", algorithm 1.

    Example:
    ```py
    >>> corrector = LangevinCorrector(generator=torch.Generator().manual_seed(1))
    >>> images = pipe(16, 50, callback_on_step_end=corrector).images
    ```
    """

    def __init__(
        self,
        num_steps: int = 1,
        signal_to_noise_ratio: float = 0.16,
        generator: torch.Generator | None = None,
        class_labels: torch.Tensor | None = None,
    ):
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
        self.num_steps, self.signal_to_noise_ratio = num_steps, signal_to_noise_ratio
        self.generator, self.class_labels = generator, class_labels

    def __call__(
        self, pipe: DiffusionPipeline, index: int, timestep: torch.Tensor, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the corrected latents. `pipe` has a `unet` and a [`VDMScheduler`]."""
        scheduler, z = pipe.scheduler, callback_kwargs["latents"]
        if index + 1 >= len(scheduler.timesteps):
            return {}
        arrived = scheduler.timesteps[index + 1]
        log_snr = scheduler.log_snr(arrived.cpu())
        step_size = corrector_step_size(log_snr, self.signal_to_noise_ratio)
        labels = default_label(pipe.unet) if self.class_labels is None else self.class_labels
        labels = None if labels is None else torch.as_tensor(labels).to(z.device).expand(len(z))
        for _ in range(self.num_steps):
            output = call_network(pipe.unet, z, arrived, class_labels=labels).to(z)
            score = convert(
                output[:, : z.shape[1]], z, log_snr, source=scheduler.config.prediction_type, target="score"
            )
            z = langevin_step(z, score, step_size, noise_like(z, self.generator))
        return {"latents": z}
