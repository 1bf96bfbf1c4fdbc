"""A model whose likelihood is asked for, put together from what users have: network, chain, method, decoder, images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    ) -> Candidate:
        """Arguments and errors as of `evaluate_likelihood`; `options`: those of the method, None where not given."""
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
        if is_chain and self.chain.config.get("stochasticity", 1.0) != 1.0:
            stochasticity = self.chain.config.stochasticity
            settings["chain"] = f"ancestral (the scheduler samples with stochasticity {stochasticity})"
        return settings
