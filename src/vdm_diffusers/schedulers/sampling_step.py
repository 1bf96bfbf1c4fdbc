"""One sampling step: x_hat from the network's output, the mean of p(z_s | z_t), and the noise.

Twice: with coefficients that are numbers, one timestep for the whole batch, which is what a sampling loop does and
costs least; and with coefficients that are tensors, for one timestep for each sample and under torch.compile.
"""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..numerics import compute_dtype, expand_to, linear_combination
from .coefficients import StepSettings
from .sampling_grid import SamplingGrid

Generators = torch.Generator | list[torch.Generator] | None


def step_together(
    grid: SamplingGrid,
    output: Tensor,
    predicted_variance: Tensor | None,
    timestep: Tensor | float,
    sample: Tensor,
    generator: Generators,
    *,
    wants_x_hat: bool = True,
) -> tuple[Tensor, Tensor]:
    """(z_s, x_hat) of a step whose coefficients are numbers: no tensor of them exists, so nothing is copied, cast or
    waited for.

    With wants_x_hat=False the second may be the network's output instead, where nothing needs x_hat.
    """
    index = grid.index_of(timestep)
    if index in grid.undefined:
        grid.raise_undefined(index)
    step = grid.numbers_off_grid(timestep) if index is None else grid.numbers[index]
    shape, dtype = output.shape, output.dtype  # of the noise, drawn as Diffusers draws it
    narrow = sample.dtype.itemsize == 2 and sample.device.type == "cpu"
    if narrow:  # sums of half-precision tensors round their coefficient too on the CPU, unlike on a GPU
        narrow_dtype = torch.promote_types(sample.dtype, dtype)
        sample, output = sample.float(), output.float()

    if wants_x_hat or grid.through_x_hat:
        x_hat = _combine(sample, output, step.x_swap, step.x_ratio, step.x_scale)
        if grid.limits:
            x_hat = limited(grid, x_hat)
    else:
        x_hat = output
    second = x_hat if grid.through_x_hat else output
    if grid.multistep and index is not None:
        current = (
            x_hat if grid.through_x_hat else output.clone()
        )  # a compiled network may write its next output over this one
        if step.multistep and grid.history is not None and grid.history[0] == index - 1:
            second = torch.lerp(grid.history[1], current, 1 + step.multistep)
        grid.history = (index, current)

    z_s = _combine(sample, second, step.mean_swap, step.mean_ratio, step.mean_scale)
    if index is not None:
        grid.step_index = index + 1

    if step.noise:
        noise = randn_tensor(shape, generator=generator, device=output.device, dtype=dtype)
        if predicted_variance is not None:
            noise = noise * learned_deviation(
                predicted_variance, step.log_variance_low, step.log_variance_high, grid.settings
            )
        if step.bands is None:
            z_s.add_(noise, alpha=step.noise)
        else:
            z_s.add_(_colored(grid, noise, step.bands))
    return (z_s.to(narrow_dtype), x_hat.to(narrow_dtype)) if narrow else (z_s, x_hat)


def step_each(
    grid: SamplingGrid,
    output: Tensor,
    predicted_variance: Tensor | None,
    timestep: Tensor | float,
    sample: Tensor,
    generator: Generators,
) -> tuple[Tensor, Tensor]:
    """(z_s, x_hat) of a step whose coefficients are tensors: `timestep` has one for each sample, or torch.compile
    traces.
    """
    if not isinstance(timestep, Tensor):
        timestep = torch.full((), timestep, device=sample.device)
    several = timestep.numel() > 1
    c = grid.coefficients_at(timestep.flatten() if several else timestep.reshape(()), sample)

    x_hat = linear_combination(c.x_z, sample, c.x_output, output)
    if grid.limits:
        x_hat = limited(grid, x_hat)
    second = x_hat if grid.through_x_hat else output
    if grid.multistep:
        if several:
            raise ValueError("`multistep_order=2` needs one timestep for the whole batch: it remembers one step.")
        if grid.history is not None:
            second = x_hat + (c.multistep * (x_hat - grid.history[1])).to(x_hat.dtype)
        grid.history = (-2, x_hat)

    mean = linear_combination(c.mean_z, sample, c.mean_y, second)
    if grid.deterministic:
        return mean, x_hat

    noise = randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)
    if c.bands is not None:
        return mean + _colored(grid, noise, c.bands).to(mean.dtype), x_hat
    deviation = expand_to(c.noise, noise)
    if predicted_variance is not None:
        low, high = expand_to(c.log_variance_low, noise), expand_to(c.log_variance_high, noise)
        predicted = learned_deviation(predicted_variance, low, high, grid.settings)
        deviation = torch.where(
            deviation == 0, 0.0, deviation * predicted
        )  # the bounds may be infinite where none is added
    return (mean + deviation * noise).to(mean.dtype), x_hat


def mean_each(grid: SamplingGrid, output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
    """The means of first-order steps from one timestep for each sample (B,), without noise."""
    c = grid.coefficients_at(timesteps.flatten(), sample)
    second = output
    if grid.through_x_hat:
        second = linear_combination(c.x_z, sample, c.x_output, output)
        second = limited(grid, second) if grid.limits else second
    return linear_combination(c.mean_z, sample, c.mean_y, second)


def split_output(grid: SamplingGrid, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prediction and, if the network gives it, the variance, each of the sample's shape.

    Raises:
        ValueError: shapes that do not fit, or tensors of whole numbers.
    """
    if not (model_output.dtype.is_floating_point and sample.dtype.is_floating_point):
        raise ValueError(
            f"`model_output` and `sample` must be floating-point, got {model_output.dtype} and {sample.dtype}."
        )
    variance_type = grid.settings.variance_type
    if model_output.shape == sample.shape:
        if grid.learned:
            raise ValueError(
                f"`variance_type={variance_type!r}` needs a model with twice the sample's channels, got "
                f"{tuple(model_output.shape)} for both. If the model has no variances, set "
                "variance_type='fixed_small'."
            )
        return model_output, None
    doubled = sample.ndim > 1 and model_output.shape == (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
    if not (grid.learned and doubled):
        raise ValueError(
            f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, or twice its channels with "
            f"variance_type 'learned' or 'learned_range', got {tuple(model_output.shape)} and {variance_type!r}."
        )
    prediction, variance = model_output.chunk(2, dim=1)
    return prediction, variance


def limited(grid: SamplingGrid, x_hat: Tensor) -> Tensor:
    """x_hat clipped, in its own memory, or thresholded."""
    if grid.clip is not None:
        return x_hat.clamp_(-grid.clip, grid.clip)
    return thresholded(x_hat, grid.settings.dynamic_thresholding_ratio, grid.settings.sample_max_value)


def thresholded(sample: Tensor, ratio: float, max_value: float) -> Tensor:
    """Dynamic thresholding: x_hat is clipped to [-s, s] and divided by s, s a quantile of |x_hat| of each sample.

    s = clamp(quantile(ratio), 1, max_value). Source: Saharia et al. 2022, "Imagen", section 2.3.
    """
    values = sample.to(compute_dtype(sample))
    s = values.flatten(1).abs().quantile(ratio, dim=1)
    s = expand_to(s.clamp(min=1, max=max_value), values)
    return (values.clamp(-s, s) / s).to(sample.dtype)


def learned_deviation(predicted: Tensor, low: Tensor | float, high: Tensor | float, settings: StepSettings) -> Tensor:
    """The standard deviation that a network predicts, between two log-variances: the root of the exponential of its
    own.
    """
    predicted = predicted.to(compute_dtype(predicted))
    if settings.variance_type == "learned":
        return torch.exp(predicted / 2)
    return torch.exp(predicted * ((high - low) / 4) + (high + low) / 4)  # half of low + (predicted + 1)/2 (high - low)


def _colored(grid: SamplingGrid, noise: Tensor, deviations: Tensor) -> Tensor:
    """White noise (B, C, H, W) with the standard deviations (C, bands), or (B, C, bands), in the cosine transform.

    Raises:
        ValueError: images of another shape than those whose frequencies were measured.
    """
    assert grid.optimal is not None and grid.radial_bands is not None
    grid.optimal.check_shape(noise.shape[1:])
    bands, white = grid.radial_bands, noise.to(compute_dtype(noise))
    return bands.inverse(bands.spread(deviations.to(white)) * bands.transform(white)).to(noise.dtype)


def _combine(z: Tensor, y: Tensor, swap: float, ratio: float, scale: float) -> Tensor:
    """scale * (z + ratio y), or with `swap` scale * (y + ratio z): a new tensor."""
    first, second = (y, z) if swap else (z, y)
    if ratio == 0:
        return first * scale
    result = torch.add(first, second, alpha=ratio)
    return result if scale == 1 else result.mul_(scale)
