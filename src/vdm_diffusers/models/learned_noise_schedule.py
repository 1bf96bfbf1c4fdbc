r"""A noise schedule that is learned: a monotone network from time to log SNR, and the gradient that trains it.

In continuous time the expected diffusion loss depends on a schedule's end points alone (Kingma et al. 2021, equation
18). What runs between them decides how far a single draw of the loss scatters around that expectation. With
L = -1/2 l'(t) |eps - eps_hat(z(l), l)|^2 at l = log_snr(t) the schedule's parameters phi therefore minimise E[L^2],
and

    d L^2 / d phi = 2 L (dL/dl dl/dphi + dL/dw dw/dphi),    w = -1/2 l'(t),                (appendix I.2)

whose two factors dL/dl and dL/dw come out of the denoiser's own backward pass: `ScheduleCut` has no need of a second
one. For independent t the minimum is the schedule whose log SNRs have the density

    p(l) proportional to sqrt(E |eps - eps_hat|^4 at l).

The end points, if they are learned too, follow the bound itself.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vdm_diffusers.elbo import continuous_weight
from vdm_diffusers.noise_schedules import LOG_SNR_MAX, LOG_SNR_MIN, NoiseSchedule, check_end_points
from vdm_diffusers.numerics import as_float64

_INITIAL_MARGIN = 0.05  # of half the envelope, between it and a learned end point


class LearnedNoiseSchedule(ModelMixin, ConfigMixin, NoiseSchedule):
    r"""Log SNR as a monotone network of time, exact at both ends.

        log_snr(t) = log_snr_max (1 - p(t)) + log_snr_min p(t),    p(t) = (f(t) - f(0)) / (f(1) - f(0)),
        f(t) = a t + sum_j b_j sigmoid(c_j (t - m_j)),             a, b_j, c_j > 0.

    VDM's network, a linear function plus one hidden layer of sigmoids with positive weights; the weights are kept as
    logarithms. Both differences of f are sums of positive terms (sigmoid(y) - sigmoid(x) = sigmoid(y) sigmoid(-x) (1 -
    e^(x-y))), so that nothing cancels in float32, p(0) = 0 and p(1) = 1 exactly, and the derivative is a closed form.
    A new schedule is linear in log SNR, up to a few thousandths.

    Usable wherever a `NoiseSchedule` is. Trained through `cut`; after training, `table` goes into a scheduler's config
    as `log_snr_table`, and the checkpoint needs no further component.

    Args:
        log_snr_max, log_snr_min: the end points, or with `learn_end_points` the envelope that they stay inside: it is
            what the scheduler's config says, and gives the network's timestep its meaning.
        hidden_features: number of sigmoids.
        learn_end_points: end points of their own, log_snr_max - h sigmoid(r_0) and log_snr_min + h sigmoid(r_1) with h
            half the width of the envelope; they start at 5% of h from it.

    Raises:
        ValueError: end points that are infinite or in the wrong order, fewer than one feature.

    Example (one step of a training loop of one's own):
    ```py
    >>> cut = schedule.cut(low_discrepancy(len(x)))
    >>> z_t = diffuse(x, noise, cut.log_snr)
    >>> eps_hat = model(z_t, scheduler.timestep_from_log_snr(cut.log_snr).float()).sample
    >>> losses = diffusion_loss(eps_hat, x, noise, cut.log_snr, prediction_type="epsilon", elbo_weight=cut.elbo_weight)
    >>> losses.mean().backward()  # the denoiser's gradient
    >>> cut.backward(losses, scale=1 / len(x))  # the schedule's, from what that left behind
    ```

    Source: Kingma et al. 2021, "Variational Diffusion Models", appendices H (network) and I.2 (training).
    """

    __module__ = "vdm_diffusers"

    @register_to_config
    def __init__(
        self,
        log_snr_max: float = LOG_SNR_MAX,
        log_snr_min: float = LOG_SNR_MIN,
        hidden_features: int = 64,
        learn_end_points: bool = False,
    ):
        super().__init__()
        check_end_points(log_snr_max, log_snr_min)
        if hidden_features < 1:
            raise ValueError(f"`hidden_features` must be at least 1, got {hidden_features}.")
        # Equal bumps of f' at equal distances, three beyond either end, add up to a constant: the sigmoids share the
        # rise with the linear term and are ready to move.
        spacing = 1 / hidden_features
        position = (torch.arange(hidden_features) + 0.5) / hidden_features
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.log_weight = nn.Parameter(torch.full((hidden_features,), math.log(spacing)))
        self.log_steepness = nn.Parameter(torch.full((hidden_features,), -math.log(spacing)))
        self.center = nn.Parameter((1 + 6 * spacing) * position - 3 * spacing)
        self.end_points = None
        if learn_end_points:
            start = math.log(_INITIAL_MARGIN / (1 - _INITIAL_MARGIN))
            self.end_points = nn.Parameter(torch.full((2,), start))

    def forward(self, t: Tensor | float) -> Tensor:
        """Log SNR at times t in [0, 1], of t's shape and floating dtype (float32 at least); see `log_snr` for
        float64.
        """
        dtype = t.dtype if isinstance(t, Tensor) and t.is_floating_point() else torch.float32
        return self.log_snr(t).to(torch.promote_types(dtype, torch.float32))

    def log_snr(self, t: Tensor | float) -> Tensor:
        """Log SNR at times t in [0, 1]: float64, of t's shape, on the schedule's device, differentiable.

        Raises:
            ValueError: a time (on the CPU) outside [0, 1].
        """
        highest, lowest = self._ends()
        rise, rest, _ = self._parts(self._times(t))
        return highest * (rest / (rise + rest)) + lowest * (rise / (rise + rest))

    def derivative(self, t: Tensor | float) -> Tensor:
        """d log_snr / dt < 0 in closed form: float64, of t's shape, on the schedule's device, differentiable."""
        highest, lowest = self._ends()
        rise, rest, slope = self._parts(self._times(t))
        return (lowest - highest) * slope / (rise + rest)

    @torch.no_grad()
    def inverse(self, log_snr: Tensor | float) -> Tensor:
        """The time at which `log_snr` is reached (0 or 1 outside the end points), by bisection: float64, of its
        shape.
        """
        log_snr = as_float64(log_snr).to(self.device)
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(54):  # bits of a float64 in [0, 1]
            middle = (low + high) / 2
            later = self.log_snr(middle) > log_snr
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        highest, lowest = self._ends()
        return torch.where(log_snr >= highest, 0.0, torch.where(log_snr <= lowest, 1.0, (low + high) / 2))

    @property
    def log_snr_max(self) -> float:
        """Log SNR at t = 0."""
        return self._ends()[0].item()

    @property
    def log_snr_min(self) -> float:
        """Log SNR at t = 1."""
        return self._ends()[1].item()

    @torch.no_grad()
    def table(self, num_entries: int = 1001) -> list[float]:
        """Log SNR at `num_entries` equally spaced times from 0 to 1: a scheduler's `log_snr_table`.

        Raises:
            ValueError: fewer than two entries.
        """
        if num_entries < 2:
            raise ValueError(f"`num_entries` must be at least 2, got {num_entries}.")
        return self.log_snr(torch.linspace(0, 1, num_entries, dtype=torch.float64)).tolist()

    def cut(self, t: Tensor) -> ScheduleCut:
        """Log SNR and the ELBO's weight at times t (B,), for a training step of the denoiser and of this schedule."""
        return ScheduleCut(self, t)

    def _times(self, t: Tensor | float) -> Tensor:
        t = as_float64(t)
        if t.device.type == "cpu" and t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"`t` must lie in [0, 1], got {float(t.min())} to {float(t.max())}.")
        return t.to(self.device)

    def _ends(self) -> tuple[Tensor, Tensor]:
        highest, lowest = self.config.log_snr_max, self.config.log_snr_min
        if self.end_points is None:
            ends = as_float64(self.center.new_tensor([highest, lowest], dtype=torch.float64))
            return ends[0], ends[1]
        inward = (highest - lowest) / 2 * torch.sigmoid(as_float64(self.end_points))
        return highest - inward[0], lowest + inward[1]

    def _parts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(t) - f(0), f(1) - f(t) and f'(t), each a sum of positive terms."""
        dtype = t.dtype
        slope, weight, steepness = (p.to(dtype).exp() for p in (self.log_slope, self.log_weight, self.log_steepness))
        center, time = self.center.to(dtype), t[..., None]
        here = torch.sigmoid(steepness * (time - center))
        not_here = torch.sigmoid(-steepness * (time - center))
        end, not_start = torch.sigmoid(steepness * (1 - center)), torch.sigmoid(steepness * center)
        rise = weight * here * not_start * -torch.expm1(-steepness * time)
        rest = weight * end * not_here * -torch.expm1(-steepness * (1 - time))
        bumps = weight * steepness * here * not_here
        return slope * t + rise.sum(-1), slope * (1 - t) + rest.sum(-1), slope + bumps.sum(-1)


class ScheduleCut:
    """A learned schedule's values at the times of a batch, cut from its graph, and the way back.

    The loss is computed from `log_snr` and `elbo_weight`, two leaves. The denoiser's backward pass leaves there,
    besides its own gradients, what each loss has to do with its time; `backward` carries that across the cut.

    Attributes:
        t: (B,) the times.
        log_snr: (B,) float64. It must be used for everything that depends on time: z_t, the network's timestep, the
            loss.
        elbo_weight: (B,) float64, -1/2 d log_snr / dt.
    """

    def __init__(self, schedule: LearnedNoiseSchedule, t: Tensor):
        self.t = t
        self._schedule = schedule
        self._outputs = (schedule.log_snr(t), continuous_weight(schedule.derivative(t)))
        self.log_snr, self.elbo_weight = (output.detach().requires_grad_() for output in self._outputs)

    def backward(self, losses: Tensor, *, scale: float) -> None:
        """Add to the schedule's parameters' `.grad` the gradient of the mean squared loss; to its end points' that of
        the mean.

        Call it once, after the denoiser's backward pass.

        Arguments:
            losses: (B,) the losses of this batch, with the ELBO's weight.
            scale: what each of them was multiplied by in the number that was backpropagated: 1 / B for their mean.
        Raises:
            RuntimeError: the backward pass did not reach `log_snr` and `elbo_weight`.
        Source: Kingma et al. 2021, appendix I.2.
        """
        to_log_snr, to_weight = self.log_snr.grad, self.elbo_weight.grad
        if to_log_snr is None or to_weight is None:
            missing = "log_snr" if to_log_snr is None else "elbo_weight"
            raise RuntimeError(
                f"no gradient has reached `{missing}` of this cut: compute z_t, the timestep and the loss from the "
                "cut's own "
                "`log_snr` and `elbo_weight`, and call `backward` on the loss first."
            )
        mean = [gradient / (scale * len(losses)) for gradient in (to_log_snr, to_weight)]
        twice = 2 * losses.detach().to(to_log_snr)
        ends = self._schedule.end_points
        interior = [p for p in self._schedule.parameters() if p is not ends]
        _accumulate(interior, self._outputs, [twice * gradient for gradient in mean], retain_graph=ends is not None)
        if ends is not None:
            _accumulate([ends], self._outputs, mean)


def _accumulate(
    parameters: list[nn.Parameter], outputs: tuple[Tensor, ...], gradients: list[Tensor], retain_graph: bool = False
) -> None:
    found = torch.autograd.grad(outputs, parameters, gradients, retain_graph=retain_graph)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
