"""The one way in which this package calls a denoising network: samplers, correctors, likelihoods and training."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vdm_diffusers.numerics import at_least_float32


def device_and_dtype(network: Callable[..., Any]) -> tuple[torch.device, torch.dtype]:
    """Where a network takes its sample, and in what dtype: that of its weights, unless it says that it reads the last
    bits.

    A mere callable gets float32 on the CPU.
    """
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if parameter is None:
        return torch.device("cpu"), torch.float32
    # Diffusers' models know their dtype also where the weights are stored in another
    dtype = getattr(network, "dtype", parameter.dtype)
    if getattr(network, "takes_float32_sample", False):
        dtype = at_least_float32(dtype)
    return parameter.device, dtype


def call_network(network: Callable[..., Any], sample: Tensor, timestep: Tensor | float, **arguments: Any) -> Tensor:
    """What a network answers to a noisy sample: `(B, C or 2 C, ...)` in float32 or better, on the sample's device.

    Args:
        network: a model of this package or of Diffusers, or any callable `(sample, timestep, **arguments)` that
            returns a tensor, a tuple that begins with one, or an object with `.sample`.
        sample: `(B, C, ...)`; it is given to the network in the network's dtype and on its device.
        timestep: `()` or `(B,)`. The network gets `(B,)`: int64 if they are integers, or on the CPU whole numbers;
            else float32.
        arguments: `class_labels` and whatever else the network takes; None means "not given".

    Raises:
        ValueError: the network takes whole timesteps alone (an embedding that is indexed by them) and got a fraction.
    """
    device, dtype = device_and_dtype(network)
    time = torch.as_tensor(timestep)
    if time.is_floating_point():
        # a table's own entries, through log SNR and back, are whole numbers but for rounding
        close = 1e-6 if time.dtype == torch.float64 else 0.0
        # an accelerator is not waited for
        is_whole = time.device.type == "cpu" and bool(((time - time.round()).abs() <= close).all())
        time = time.round().long() if is_whole else time.to(torch.float32)
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        output = network(sample.to(device, dtype), time.to(device).expand(len(sample)), **given)
    except (RuntimeError, IndexError, TypeError) as error:
        if time.is_floating_point() and re.search(r"\b(Long|Int|ints?|integers?|indices)\b", str(error)):
            raise ValueError(
                f"the network failed on a fractional timestep ({error}): it seems to take whole ones alone, as an "
                "embedding that is "
                "indexed does. Take method='discrete', whose steps are the table's own."
            ) from error
        raise
    if isinstance(output, tuple):
        output = output[0]
    output = output if isinstance(output, Tensor) else output.sample
    return output.to(sample.device, at_least_float32(output.dtype))


def in_own_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` in the dtype of the module's weights, returned in float32 or better: likelihoods are not summed in
    half precision.
    """
    dtype = next(module.parameters()).dtype
    output = module(x.to(dtype))
    return output.to(at_least_float32(output.dtype))
