r"""The likelihood of a diffusion model as a flow: the probability-flow ODE.

With y = z / alpha = x + s eps, s = sigma / alpha = e^(-log_snr / 2), the ODE with the diffusion's marginals is dy =
eps_hat ds:

    dy / d log_snr = -1/2 s eps_hat(z),     d ln p(y) / d log_snr = 1/2 s alpha tr(d eps_hat / d z),

integrated from log_snr_max, where the data are, to log_snr_min, where p(z_1) = N(0, I). The interval above log_snr_max
is never integrated. It is accounted for by starting from a draw y_0 of q(y_0 | x) instead of x: for any decoder p(x |
y_0)

    -ln p(x) <= E[ln q(y_0 | x) - ln p(y_0) - ln p(x | y_0)].

    data, dequantization          y_0                                       nats of a draw
    integers, none                x_k + s_0 eps, decoded by VDM's softmax   ln q(y_0 | x_k) - ln p(y_0) + E[-ln p(k |
                                  z_0)] or, for a table of betas, by DDPM's Gaussian around the network's x_hat at x_1
    integers, uniform             x_k + bin (u - 1/2) + s_0 eps             -ln p(y_0) - D ln bin
    integers, truncated_normal    x_k + s_0 eps, truncated to the bin       ln q(y_0 | k) - ln p(y_0)
    continuous, none              x + s_0 eps, Gaussian decoder             -ln p(y_0)

Source: Song et al. 2021, "Score-based generative modeling through stochastic differential equations", appendix D.2;
Zheng et al. 2023, "Improved techniques for maximum likelihood estimation for diffusion ODEs" (truncated normal);
Hutchinson 1989 (trace).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vdm_diffusers.decoders import bin_width, log_normal_mass
from vdm_diffusers.gaussian import alpha_sigma
from vdm_diffusers.likelihood import DenoisingModel, GaussianDecoder, LikelihoodReport, expected_softmax_nats
from vdm_diffusers.numerics import sum_except_batch
from vdm_diffusers.prediction import convert
from vdm_diffusers.repetitions import Budget, Runner, mix_seed, repeat, run_all

Dequantization = Literal["none", "uniform", "truncated_normal"]
Divergence = Literal["hutchinson", "exact"]


def evaluate_flow(
    model: DenoisingModel,
    levels: Tensor,
    log_snr_max: float,
    log_snr_min: float,
    *,
    decoder: GaussianDecoder | None = None,
    num_samples: int = 16,
    dequantization: Dequantization = "none",
    divergence: Divergence = "hutchinson",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    target_standard_error: float | None = None,
    max_model_evaluations: int | None = None,
    progress: Callable[[int], object] | None = None,
    runner: Runner = run_all,
) -> LikelihoodReport:
    """-ln p of the flow for each image, from `num_samples` trajectories with draws of y_0 and probes of their own.

    Arguments:
        levels: (N, C, ...) integers, or floats if the model has num_levels=None.
        decoder: DDPM's, for dequantization "none"; None: VDM's softmax.
        dequantization: see the module's table.
        divergence: `hutchinson`, v^T (d eps_hat / d z) v for one Rademacher probe v, fixed along the trajectory; or
            `exact`, D backward passes a step.
        rtol, atol: of the solver, SciPy's Dormand-Prince 5(4). Trajectories of a batch share their steps, which the
            one with the largest error sets. Results therefore depend on the batch, by less than the tolerance in a
            step of any image.
        batch_size: trajectories at a time.
        seed: of the draws and probes, which do not depend on the batch.
        target_standard_error: bits/dim; go on with further trajectories until the error is at most this.
        max_model_evaluations: where to stop. What a trajectory costs is the solver's choice: the first two of every
            image show it, and as many follow as should fit.
        progress: called with the number of trajectories done, after every batch.
        runner: see `vdm_diffusers.repetitions`.
    Raises:
        ImportError: SciPy is missing. ValueError: arguments that do not fit; a solver that gives up.
    """
    try:
        from scipy.integrate import RK45, solve_ivp
    except ImportError as error:
        raise ImportError("method='ode' needs SciPy: pip install scipy.") from error
    model.check(levels)
    for name, value, allowed in (
        ("dequantization", dequantization, get_args(Dequantization)),
        ("divergence", divergence, get_args(Divergence)),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    if model.num_levels is None and dequantization != "none":
        raise ValueError(f"continuous data are not dequantized, got dequantization={dequantization!r}.")
    if not (math.isfinite(log_snr_max) and math.isfinite(log_snr_min)):
        raise ValueError(
            f"the ODE needs finite end points, got log_snr from {log_snr_max} to {log_snr_min}: take "
            "method='discrete'."
        )
    if num_samples < 2:
        raise ValueError(
            f"`num_samples` must be at least 2, got {num_samples}: the error bar comes from their scatter."
        )

    num_dims = levels[0].numel()

    class PerImage(RK45):
        """Accepts a step by the worst image, where SciPy's mean over a batch lets the many hide the one."""

        def _estimate_error_norm(self, stages: Any, step: float, scale: Any) -> float:
            error = np.square(self._estimate_error(stages, step) / scale)
            size = len(error) // (num_dims + 1)
            worst = error[: size * num_dims].reshape(size, num_dims).mean(1)
            return float(np.sqrt(np.maximum(worst, error[size * num_dims :]).max()))

    def draw(images: Tensor, repetitions: Tensor) -> Tensor:
        data, size, calls = levels[images], len(images), 0
        draws = [
            _draw(model, one, log_snr_max, dequantization, mix_seed(seed, "ode", *number))
            for one, number in zip(data, torch.stack([images, repetitions]).T.tolist(), strict=True)
        ]
        start, probe, offset = (torch.stack(parts) for parts in zip(*draws, strict=True))

        def derivative(log_snr: float, state: object) -> object:
            nonlocal calls
            calls += 1
            y = torch.as_tensor(state)[: size * num_dims].reshape(start.shape)
            slope, change = _derivative(model, y, log_snr, images, probe, divergence, device)
            return torch.cat([slope.flatten(), change]).numpy()

        initial = torch.cat([start.flatten(), torch.zeros(size, dtype=torch.float64)]).numpy()
        solution = solve_ivp(
            derivative,
            (log_snr_max, log_snr_min),
            initial,
            method=PerImage,
            rtol=rtol,
            atol=atol,
            t_eval=[log_snr_min],
        )
        if not solution.success:
            raise ValueError(
                f"the ODE's solver gave up: {solution.message} Is the network smooth between its timesteps?"
            )
        final = torch.as_tensor(solution.y[:, -1])
        alpha, _ = alpha_sigma(log_snr_min)
        z = alpha * final[: size * num_dims].reshape(size, num_dims)
        log_density_1 = -0.5 * (z**2).sum(1) + num_dims * (alpha.log() - 0.5 * math.log(2 * math.pi))
        nats = offset - (log_density_1 - final[size * num_dims :])
        if decoder is not None and dequantization == "none" and model.num_levels is not None:
            at, z_1 = torch.full((size,), log_snr_max, dtype=torch.float64), float(alpha_sigma(log_snr_max)[0]) * start
            value, variance = model.outputs(z_1.to(device, torch.float32), at, images)
            x_hat = model.denoised(value, z_1.to(value), at)
            nats = nats + decoder.nats(model, data.to(value.device), x_hat, variance).to("cpu", torch.float64)
            calls += 1
        if progress is not None:
            progress(size)
        return torch.stack([torch.full_like(nats, calls), nats])

    found = repeat(
        draw,
        len(levels),
        num_dims,
        num_samples,
        batch_size=batch_size,
        budget=Budget(target_standard_error, max_model_evaluations),
        cost=None,
        runner=runner,
    )
    nats = found.values[0]
    if model.num_levels is not None and dequantization == "none" and decoder is None:
        table = expected_softmax_nats(log_snr_max, model.num_levels, model.pixel_encoding)
        nats = nats + torch.cat([sum_except_batch(table[part.long()]) for part in levels.split(1024)])
    return LikelihoodReport(
        method="ode",
        nats=nats,
        prior=None,
        diffusion=None,
        reconstruction=None,
        num_dims=num_dims,
        standard_error=found.standard_error,
        is_bound=True,
        num_model_evaluations=found.num_model_evaluations,
        settings={
            "dequantization": dequantization,
            "divergence": divergence,
            "rtol": rtol,
            "atol": atol,
            "num_repetitions": found.number,
        },
    )


def _draw(
    model: DenoisingModel, data: Tensor, log_snr_max: float, dequantization: Dequantization, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y_0 and a probe, of the image's shape, and what has to be added to -ln p(y_0): float64."""
    generator = torch.Generator().manual_seed(seed)
    x = model.encode(data).double()
    deviation = math.exp(-log_snr_max / 2)
    probe = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    offset = torch.zeros((), dtype=torch.float64)
    if model.num_levels is None:
        return x + deviation * noise, probe, offset
    width = bin_width(model.num_levels, model.pixel_encoding)
    if dequantization == "uniform":
        u = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        return x + width * u + deviation * noise, probe, offset - x.numel() * math.log(width)
    log_normalizer = 0.5 * math.log(2 * math.pi) + math.log(deviation)
    if dequantization == "truncated_normal":
        edge = torch.tensor(width / 2 / deviation, dtype=torch.float64)
        low = torch.special.ndtr(-edge)
        u = low + (1 - 2 * low) * torch.rand(x.shape, generator=generator, dtype=torch.float64)
        noise = torch.special.ndtri(u)
        log_normalizer += float(log_normal_mass(-edge, edge))
    offset = -0.5 * (noise**2).sum() - x.numel() * log_normalizer
    return x + deviation * noise, probe, offset


def _derivative(
    model: DenoisingModel,
    y: Tensor,
    log_snr: float,
    index: Tensor,
    probe: Tensor,
    divergence: Divergence,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """dy / d log_snr and d ln p(y) / d log_snr of a batch, float64 on the CPU."""
    alpha, sigma = (float(v) for v in alpha_sigma(log_snr))
    at = torch.full((len(y),), log_snr, dtype=torch.float64)
    with torch.enable_grad():
        z = (alpha * y).to(device=device, dtype=torch.float32).requires_grad_()
        value, _ = model.outputs(z, at, index)
        if model.clip_denoised:
            x_hat = model.denoised(value, z, at)
            eps = (z - alpha * x_hat) / sigma
        else:
            eps = convert(value, z, at, source=model.prediction_type, target="epsilon")
        flat = eps.flatten(1)
        if not flat.requires_grad:
            raise ValueError(
                "the model's output does not depend on its input as far as autograd can see (a constant, or a call "
                "under no_grad or "
                "of detached values): method='ode' needs the divergence. Take method='continuous'."
            )
        if divergence == "hutchinson":
            v = probe.to(z).flatten(1)
            (gradient,) = torch.autograd.grad((flat * v).sum(), z)
            trace = (gradient.flatten(1) * v).double().sum(1)
        else:
            trace = torch.zeros(len(y), dtype=torch.float64, device=z.device)
            for i in range(flat.shape[1]):
                (gradient,) = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i + 1 < flat.shape[1])
                trace += gradient.flatten(1)[:, i].double()
    scale = 0.5 * sigma / alpha
    return -scale * eps.detach().to("cpu", torch.float64), scale * alpha * trace.to("cpu", torch.float64)
