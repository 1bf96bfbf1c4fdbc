"""A model whose likelihood is asked for, put together from what users have: network, chain, method, decoder,
images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vdm_diffusers.decoders import PixelEncoding
from vdm_diffusers.evaluation.adapters import device_and_dtype, prepare, unpack
from vdm_diffusers.evaluation.chains import (
    Scheduler,
    adopt,
    chain_log_snrs,
    decoder_of,
    optimal_of,
    reverse_variance_of,
)
from vdm_diffusers.evaluation.latent_space import PromptedNetwork, in_latent_space, is_latent_pipeline
from vdm_diffusers.evaluation.methods import (
    Continuous,
    Discrete,
    EstimationMethod,
    ImportanceWeighted,
    Method,
    ProbabilityFlow,
    chosen_method,
)
from vdm_diffusers.likelihood import (
    ContinuousTerm,
    Decoder,
    DenoisingModel,
    DensityDecoder,
    DiffusionTerm,
    DiscreteTerm,
    GaussianDecoder,
    SoftmaxDecoder,
)
from vdm_diffusers.reverse_variance import ReverseVariance

Space = Literal["pixel", "latent"]
_DECODERS = {SoftmaxDecoder: "softmax", GaussianDecoder: "discretized_gaussian", DensityDecoder: "gaussian_density"}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model, the way its likelihood is estimated, and the images as it sees them.

    Attributes:
        network: what is called; `denoiser`: the same as the estimators call it.
        chain: the scheduler, one of ours.
        way: the method with its options.
        reverse_variance: of the chain's steps.
        term: the diffusion term, None for the probability flow.
        decoder: of the pixels.
        levels: (N, C, ...) integers, or floats where the data are continuous.
        device, batch_size: where, and how many evaluations at a time.
        pixel_encoding: of the levels.
    """

    network: Callable[..., Any]
    chain: Scheduler
    way: EstimationMethod
    reverse_variance: ReverseVariance
    term: DiffusionTerm | None
    decoder: Decoder
    denoiser: DenoisingModel
    levels: Tensor
    device: torch.device
    batch_size: int

    @classmethod
    def of(
        cls,
        model: Any,
        images: Any,
        *,
        scheduler: Any = None,
        method: Method | EstimationMethod | None = None,
        options: Mapping[str, Any],
        num_levels: int | str | None = "auto",
        pixel_encoding: PixelEncoding | str = "auto",
        batch_size: int | None = None,
        class_labels: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        clip_denoised: bool = False,
        prompts: Any = None,
        space: Space | None = None,
    ) -> Candidate:
        """Arguments and errors as of `evaluate_likelihood`; `options`: those of the method, None where not given."""
        if space not in (None, "pixel", "latent"):
            raise ValueError(f"`space` must be 'pixel' or 'latent', got {space!r}.")
        if prompts is not None or space == "latent":
            if not is_latent_pipeline(model):
                raise ValueError(
                    f"`{'prompts' if prompts is not None else 'space'}` was given, and {type(model).__name__} is no "
                    "pipeline of latents or prompts."
                )
            if model_kwargs or clip_denoised or num_levels not in ("auto", 256):
                raise ValueError(
                    "`model_kwargs`, `clip_denoised` and `num_levels` mean nothing to a pipeline that is told a "
                    "prompt."
                )
            if components_need_space(model, space):
                raise ValueError(
                    f"`model`, a {type(model).__name__}, is one of latents: pass space='latent' for their likelihood, "
                    "in nats of the latents."
                )
            task = in_latent_space(model, images, prompts=prompts, class_labels=class_labels)
            model_kwargs = {name: rows[task.prompt_of] for name, rows in task.kept.items()}
            images = task.latents if task.levels is None else task.levels
            model, scheduler, class_labels = task.network, scheduler or task.scheduler, None
            num_levels, pixel_encoding = task.data["num_levels"], task.data.get("pixel_encoding", "auto")
        network, scheduler, levels_of_a_pixel, encoding = unpack(model, scheduler, num_levels, pixel_encoding)
        chain = adopt(scheduler)
        if method is None:
            method = "continuous" if chain.timeline.entries is None else "discrete"
        way = chosen_method(method, options)
        steps, grid = (way.num_steps, way.grid) if isinstance(way, Discrete | ImportanceWeighted) else (None, None)
        variance_type = None if isinstance(way, ProbabilityFlow) else way.variance_type
        is_chain = isinstance(way, Discrete | ImportanceWeighted)
        kind = reverse_variance_of(variance_type or chain.config.variance_type, is_chain, steps, chain)
        term: DiffusionTerm | None = None
        if isinstance(way, Continuous):
            term = ContinuousTerm(chain.noise_schedule.log_snr_max, chain.noise_schedule.log_snr_min)
        elif is_chain:
            log_snrs = chain_log_snrs(chain, steps, grid, kind)
            term = DiscreteTerm(log_snrs, kind, optimal_of(chain) if kind == "optimal" else None)
        decoder = decoder_of(chain, kind, levels_of_a_pixel)
        learned = kind if kind in ("learned", "learned_range") else None
        levels, denoiser, device, batch_size = prepare(
            network, chain, images, class_labels, levels_of_a_pixel, encoding, model_kwargs, batch_size, learned,
            clip_denoised,
        )  # fmt: skip
        if isinstance(term, DiscreteTerm) and term.optimal is not None:
            term.optimal.check_shape(levels.shape[1:])
        return cls(network, chain, way, kind, term, decoder, denoiser, levels, device, batch_size)

    @property
    def prior_log_snr(self) -> float:
        """Log SNR of z_1."""
        return self.chain.noise_schedule.log_snr_min

    def settings(self, num_samples: int) -> dict[str, Any]:
        """How a figure comes about (JSON primitives)."""
        term, way, schedule = self.term, self.way, self.chain.noise_schedule
        is_chain = isinstance(term, DiscreteTerm)
        by_frequency = isinstance(term, DiscreteTerm) and term.bands is not None
        has_decoder = not isinstance(way, ProbabilityFlow) or way.dequantization == "none"
        settings: dict[str, Any] = {
            "num_steps": term.num_steps + isinstance(self.decoder, GaussianDecoder)
            if isinstance(term, DiscreteTerm)
            else None,
            "num_samples": num_samples,
            "num_levels": self.denoiser.num_levels,
            "pixel_encoding": None if self.denoiser.num_levels is None else self.denoiser.pixel_encoding,
            "prediction_type": self.chain.config.prediction_type,
            "reverse_variance": self.reverse_variance + ("_per_frequency" if by_frequency else "")
            if is_chain
            else None,
            "decoder": _DECODERS[type(self.decoder)] if has_decoder else None,
            "log_snr_max": schedule.log_snr_max,
            "log_snr_min": schedule.log_snr_min,
            "clip_denoised": self.denoiser.clip_denoised,
            "dtype": str(device_and_dtype(self.network)[1]).removeprefix("torch."),
        }
        if isinstance(self.network, PromptedNetwork):
            settings["space"] = "latent" if self.denoiser.num_levels is None else "pixel"
        if is_chain and self.chain.config.get("stochasticity", 1.0) != 1.0:
            stochasticity = self.chain.config.stochasticity
            settings["chain"] = f"ancestral (the scheduler samples with stochasticity {stochasticity})"
        return settings


def components_need_space(pipe: Any, space: Space | None) -> bool:
    """Whether a pipeline's data are latents, and that was not asked for."""
    return pipe.components.get("vae") is not None and space != "latent"
