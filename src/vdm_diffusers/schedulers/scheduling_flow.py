"""VDMFlowScheduler: FlowMatchEulerDiscreteScheduler's interface and samples, with the exact posterior of the flow
path behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..gaussian import posterior
from ..noise_schedules import NoiseSchedule
from ..numerics import as_float64, compute_dtype, expand_to, linear_combination, on_cpu
from ..prediction import PredictionType, check_prediction_type, convert
from ..step_grids import GRIDS, place_steps
from ..timelines import FlowTimeline, log_snr_of_flow
from .adoption import adopted_flow
from .coefficients import StepSettings
from .configuration import plain, unset_keys
from .flow_sigmas import (
    SPACINGS,
    TIME_SHIFTS,
    Numbers,
    flow_table,
    numbers,
    place_sigmas,
    stretched,
    time_shift,
)
from .sampling_grid import SamplingGrid
from .sampling_step import step_together
from .updates import reverse_coefficients


@dataclass
class VDMFlowSchedulerOutput(BaseOutput):
    """What a step returns: the sample at the next, smaller sigma, the model's next input.

    The data that the model predicts are `convert_prediction(model_output, timestep, sample, target="sample")`.
    """

    prev_sample: Tensor


class VDMFlowScheduler(SchedulerMixin, ConfigMixin):
    r"""Samples flow-matching models, z = (1 - sigma) x + sigma eps, whose network is fed T sigma and predicts eps - x.

    Takes every configuration of `FlowMatchEulerDiscreteScheduler`
    (`VDMFlowScheduler.from_config(pipe.scheduler.config)`), and gives its samples by default. Coefficients are made in
    float64 once for each grid. A flow is the variance-preserving path with its latents rescaled, so that everything
    exact there is exact here:

        z_s = (sigma_s / sigma_t) r z_t + (1 - sigma_s) (1 - q r) x_hat + eta sqrt(variance) eps,    see
        `schedulers.updates`.

    Arguments:
        num_train_timesteps: T. shift: of the sigmas, static. use_dynamic_shifting, time_shift_type: shift by `mu` of
            `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines, which compute `mu` from them.
        invert_sigmas: the model's time is 1 - sigma and it predicts x - eps (Mochi).
        shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: see `schedulers.flow_sigmas`.
        stochastic_sampling: all noise is drawn anew in each step; the same as stochasticity=inf.
        stochasticity: 0, the default, is Euler's step, which is DDIM's here; 1 is ancestral, a draw of the posterior
            q(z_s | z_t, x_hat); in between and above as in `VDMScheduler`.
        multistep_order: 2 is the two-step update of Adams and Bashforth: the velocity is extrapolated in sigma, in
            which a flow is nearly straight. (DPM-Solver++'s 2M extrapolates x_hat in log SNR, where the usual grids
            end in one very long step: it is used for models that predict something else than the velocity.)
        prediction_type: what the model predicts. Flow models predict "flow_prediction".
        variance_type: "fixed_small", or "optimal", which needs `optimal_variance` and stochasticity.
        optimal_variance: what `estimate_optimal_variance` returns.
        step_grid: None or "time" places steps as Diffusers does; "log_snr" evenly in log SNR, "optimal" for the
            smallest bound.

    Raises:
        ValueError: values out of range; several spacings at once; "optimal" without `optimal_variance`.

    Source: Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2023, "Flow Matching"; Esser et al. 2024; Lu et
    al. 2022.
    """

    __module__ = "vdm_diffusers"

    _compatibles: list[str] = []
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        stochasticity: float = 0.0,
        multistep_order: int = 1,
        prediction_type: str = "flow_prediction",
        variance_type: str = "fixed_small",
        optimal_variance: dict[str, list] | None = None,
        step_grid: Literal["time", "log_snr", "optimal"] | None = None,
    ):
        config = {key: plain(key, value) for key, value in self.config.items() if not key.startswith("_")}
        unset = unset_keys(VDMFlowScheduler.__init__, self.config)
        self.register_to_config(**config, **unset, _class_name=type(self).__name__)
        _check(self.config)
        self._shift = float(config["shift"])
        static = None if config["use_dynamic_shifting"] else self._shift
        table = flow_table(config["num_train_timesteps"], static)
        self.sigma_max, self.sigma_min = float(table[0].float()), float(table[-1].float())
        self.num_inference_steps: int | None = None
        self.sigmas: Tensor
        self._use(table, None, torch.device("cpu"))
        self.sigmas = self.sigmas[:-1]  # of the training chain, as its users know them: without the end

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler with this config, which any flow scheduler of Diffusers may have written:
        `vdm_diffusers.schedulers.adoption`.

        Raises:
            ValueError: the config is of a model on another path, or with another time; names the class to use.
        """
        if isinstance(config, Mapping):
            config = adopted_flow(config, cls.__name__)
        return super().from_config(cast("dict[str, Any]", config), return_unused_kwargs, **kwargs)

    # --- the steps ---------------------------------------------------------------------------------------------------

    @property
    def timeline(self) -> FlowTimeline:
        """What the timesteps mean."""
        return FlowTimeline(self.config.num_train_timesteps, self._shift, bool(self.config.invert_sigmas))

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Log SNR against time, for sigmas that are even and then shifted."""
        return self.timeline.noise_schedule

    def log_snr(self, timesteps: Tensor | float) -> Tensor:
        """Log SNR at `timesteps` of any shape, 2 ln((1 - sigma) / sigma), float64."""
        return self.timeline.log_snr(timesteps)

    def timestep_from_log_snr(self, log_snr: Tensor | float) -> Tensor:
        """What the network is fed at `log_snr`, float64."""
        return self.timeline.timestep(log_snr)

    @property
    def shift(self) -> float:
        """The static shift."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Set the static shift, for the next `set_timesteps`."""
        if not 0 < shift < math.inf:
            raise ValueError(f"`shift` must be a positive number, got {shift}.")
        self._shift = float(shift)

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """The dynamic shift of sigmas `t` by `mu`, of the configured type; `sigma` is the power of its odds."""
        return time_shift(self.config.time_shift_type, mu, sigma, t)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Sigmas `t` stretched so that the last is `shift_terminal`."""
        return stretched(t, self.config.shift_terminal)

    @on_cpu
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Numbers | None = None,
        mu: float | None = None,
        timesteps: Numbers | None = None,
    ) -> None:
        """Choose the steps of the sampler, and make their coefficients.

        Arguments:
            num_inference_steps: their number, placed as the config says.
            device: where `timesteps` and `sigmas` go.
            sigmas: the sigmas themselves, descending in (0, 1], before the shift.
            mu: of the dynamic shift.
            timesteps: what the network is fed. Without `sigmas`, sigma is timesteps / T, shifted; with both, each is
                as given.
        Raises:
            ValueError: see `flow_sigmas.place_sigmas`; a step grid that needs what is not there.
        """
        config = self.config
        by_grid = config.step_grid not in (None, "time")
        if by_grid and sigmas is None and timesteps is None and num_inference_steps is not None:
            placed = place_steps(
                FlowTimeline(config.num_train_timesteps, self._shift),
                num_inference_steps,
                config.step_grid,
                optimal=self._settings().optimal,
                variance="optimal" if config.variance_type == "optimal" else "posterior",
                ends_at_mean=True,
            )
            values = torch.sigmoid(-placed.log_snrs / 2)
            values[0] = 1.0  # the sample that one begins with is noise alone
        else:
            values = torch.from_numpy(
                place_sigmas(
                    config,
                    num_steps=num_inference_steps,
                    sigmas=sigmas,
                    timesteps=timesteps,
                    mu=mu,
                    shift=self._shift,
                    ends=(self.sigma_max, self.sigma_min),
                )
            )
        fed = None if timesteps is None else torch.from_numpy(numbers(timesteps))
        self._use(values, fed, torch.device("cpu" if device is None else device))
        self.num_inference_steps = len(values)

    def _use(self, sigmas: Tensor, timesteps: Tensor | None, device: torch.device) -> None:
        """Make the grid of these sigmas (n,), as float32 has them: the network is fed T sigma, or `timesteps`."""
        sigmas = sigmas.float()
        inverted, total = bool(self.config.invert_sigmas), self.config.num_train_timesteps
        public = 1 - sigmas if inverted else sigmas
        if timesteps is None or inverted:
            timesteps = public * total
        self.sigmas = torch.cat([public, torch.full((1,), float(inverted))]).to(device)
        exact = (1 - public.double()) if inverted else public.double()
        log_snrs = torch.cat([log_snr_of_flow(exact), torch.tensor([math.inf], dtype=torch.float64)])
        self._log_snrs = log_snrs
        self._grid = SamplingGrid(
            FlowTimeline(total, self._shift, inverted),
            timesteps.float(),
            self._settings(),
            device=device,
            log_snrs=log_snrs,
        )
        self._grid.counted = True
        self._timesteps = self._grid.timesteps

    def _settings(self) -> StepSettings:
        config = self.config
        return StepSettings(
            prediction_type=config.prediction_type,
            variance_type=config.variance_type,
            stochasticity=math.inf if config.stochastic_sampling else config.stochasticity,
            multistep_order=config.multistep_order,
            final_step="mean",
            clip_sample=False,
            clip_sample_range=1.0,
            thresholding=False,
            dynamic_thresholding_ratio=1.0,
            sample_max_value=1.0,
            optimal_variance=config.optimal_variance,
        )

    @property
    def timesteps(self) -> Tensor:
        """(n,) float32, what the network is fed. Assigned to, it is what pipelines see; the sigmas stay."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value

    @property
    def step_index(self) -> int | None:
        """The index of the next step, once the first is taken."""
        return self._grid.step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step, where `set_begin_index` has set it."""
        return self._grid.begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which entry of `timesteps` sampling begins (image-to-image), without reading a timestep."""
        self._grid.begin_index = begin_index

    def index_for_timestep(self, timestep: Tensor | float, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep: where it stands twice, the second.

        Raises:
            ValueError: it is not there.
        """
        schedule = self._grid.host if schedule_timesteps is None else schedule_timesteps
        found = (schedule == torch.as_tensor(timestep, device=schedule.device)).nonzero()
        if not len(found):
            raise ValueError(
                f"timestep {float(timestep):g} is not one of the {len(schedule)} of `set_timesteps`: pass one of "
                "`scheduler.timesteps`."
            )
        return int(found[min(1, len(found) - 1)])

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> VDMFlowSchedulerOutput | tuple[Tensor]:
        """One step of the sampler: from the sample at `timesteps[i]` to the one at the next sigma.

        i is counted from the first step on, which `set_begin_index` or the timestep places. No timestep on a device is
        read.

        Arguments:
            model_output: (B, ...) the model's prediction, of the sample's shape.
            timestep: one of `timesteps`.
            sample: (B, ...) the noisy sample that the model saw.
            s_churn, s_tmin, s_tmax, s_noise: taken for the peer's sake, which does nothing with them either. See
                `stochasticity`.
            generator: one, or a list of B.
            per_token_timesteps: (B, L) what the network was fed for each token of samples (B, L, C): each goes to the
                next smaller sigma of the grid. Pipelines then pass the negative prediction, as the peer expects.
            return_dict: False gives the tuple (prev_sample,).
        Returns:
            prev_sample in the model output's dtype (float64 where the sample is), for the next call of the model.
        Raises:
            ValueError: an integer index for a timestep; shapes that do not fit; all steps are taken.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.dtype.is_floating_point):
            raise ValueError("`timestep` must be one of `scheduler.timesteps`, not its index in them.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
        if per_token_timesteps is not None:
            prev_sample = self._step_by_token(model_output, per_token_timesteps, sample, generator)
        else:
            prev_sample, _ = step_together(
                self._grid, model_output, None, timestep, sample, generator, wants_x_hat=False
            )
            if prev_sample.dtype != model_output.dtype and sample.dtype != torch.float64:
                prev_sample = prev_sample.to(model_output.dtype)
        if not return_dict:
            return (prev_sample,)
        return VDMFlowSchedulerOutput(prev_sample=prev_sample)

    def _step_by_token(self, model_output: Tensor, timesteps: Tensor, sample: Tensor, generator: Any) -> Tensor:
        """Steps from a sigma of each token's own to the next smaller one of the grid."""
        z, y = sample.to(compute_dtype(sample)), -model_output.to(compute_dtype(sample))
        sigma = timesteps.to(z) / self.config.num_train_timesteps
        grid = self.sigmas.to(z)
        below = torch.where(grid < sigma[..., None] - 1e-6, grid, 0.0).amax(-1)
        settings = self._settings()
        x_hat = z - expand_to(sigma, z) * y
        self._grid.step_index = 1 + (self._grid.step_index or 0)
        if settings.stochasticity == 0:
            return z + expand_to(below - sigma, z) * y
        c = reverse_coefficients(log_snr_of_flow(sigma), log_snr_of_flow(below), settings.stochasticity, path="flow")
        still = expand_to(below >= sigma, z, torch.bool)
        noise = randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        deviation = torch.where(below > 0, c.stochasticity * c.posterior_variance.sqrt(), 0.0)
        mean = expand_to(c.z, z) * z + expand_to(c.x, z) * x_hat
        return torch.where(still, z, mean + expand_to(deviation, z) * noise)

    # --- the exact maths as methods ----------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Nothing: the model is fed the sample itself. Here for interchange with schedulers that scale."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """z = (1 - sigma) sample + sigma noise, for training and for image-to-image.

        Arguments:
            sample, noise: (B, ...). timestep: (B,) or one. As the peer has it, a run that has begun uses its own place
                instead. A timestep off the grid is taken as T sigma.
        Raises:
            ValueError: no noise.
        """
        if noise is None:
            raise ValueError("`noise` must be passed: draw it with torch.randn_like(sample).")
        sigma = self._sigmas_at(torch.as_tensor(timestep, device=sample.device).reshape(-1))
        return linear_combination(1 - sigma, sample, sigma, noise)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise`, with the arguments of other schedulers' `add_noise`."""
        return self.scale_noise(original_samples, timesteps, noise)

    def _sigmas_at(self, timesteps: Tensor) -> Tensor:
        """(B,) float64 sigmas, of the run's place if it has one."""
        place = self.begin_index if self.step_index is None else self.step_index
        grid = torch.sigmoid(-self._log_snrs / 2).to(timesteps.device)
        if place is not None:
            return grid[place].expand(len(timesteps))
        schedule = self._grid.host.to(timesteps)
        same = schedule == timesteps[:, None]
        number = same.cumsum(1)
        found = same & (number == number[:, -1:].clamp(max=2))  # where it stands twice, the second
        fraction = timesteps.double() / self.config.num_train_timesteps
        off_grid = 1 - fraction if self.config.invert_sigmas else fraction
        return torch.where(same.any(1), grid[found.int().argmax(1)], off_grid)

    def posterior_mean_variance(
        self,
        sample: Tensor,
        pred_original_sample: Tensor,
        timestep: Tensor | float,
        prev_timestep: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """q(z_s | z_t, x) = N(mean, variance I) on the flow path; timesteps are T sigma. Never clips.

        Raises:
            ValueError: timesteps out of range or order.
        """
        ends = (self.log_snr(timestep), self.log_snr(prev_timestep))
        return posterior(sample, pred_original_sample, *ends, path="flow")

    def convert_prediction(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, *, target: PredictionType
    ) -> Tensor:
        """The model's output as a prediction of type `target` on the flow path. Never clips.

        Raises:
            ValueError: an unknown type, or a timestep at which the output does not determine the target.
        """
        output = -model_output if self.config.invert_sigmas else model_output
        return convert(
            output,
            sample,
            self.log_snr(as_float64(timestep)),
            source=self.config.prediction_type,
            target=target,
            path="flow",
        )


def _check(config: Mapping[str, Any]) -> None:
    check_prediction_type(config["prediction_type"])
    spacings = [name for name in SPACINGS if config[name]]
    if len(spacings) > 1:
        raise ValueError(f"only one of {', '.join(SPACINGS)} can be used, got {' and '.join(spacings)}.")
    for key, choices in [
        ("time_shift_type", TIME_SHIFTS),
        ("multistep_order", (1, 2)),
        ("variance_type", ("fixed_small", "optimal")),
        ("step_grid", (*GRIDS, None)),
    ]:
        if config[key] not in choices:
            raise ValueError(f"`{key}` must be one of {', '.join(map(str, choices))}, got {config[key]!r}.")
    count = config["num_train_timesteps"]
    if not isinstance(count, int) or isinstance(count, bool) or not 3 <= count <= 1_000_000:
        raise ValueError(f"`num_train_timesteps` must be an integer in 3..1000000, got {count!r}.")
    if not 0 < config["shift"] < math.inf:
        raise ValueError(f"`shift` must be a positive number, got {config['shift']}.")
    if not 0 <= config["stochasticity"] < math.inf:
        raise ValueError(
            "`stochasticity` must be a finite number that is not negative (0 deterministic, 1 ancestral), got "
            f"{config['stochasticity']}. For noise that is all new, set stochastic_sampling=True."
        )
    terminal = config["shift_terminal"]
    if terminal is not None and not 0 <= terminal < 1:
        raise ValueError(f"`shift_terminal` must lie in [0, 1), got {terminal}.")
    needs_table = config["variance_type"] == "optimal" or config["step_grid"] == "optimal"
    if needs_table and config["optimal_variance"] is None:
        raise ValueError(
            "variance_type='optimal' and step_grid='optimal' need `optimal_variance`: pass what "
            "estimate_optimal_variance(...) returns."
        )
