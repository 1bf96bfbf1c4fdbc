"""Small numerical helpers that the exact core shares: precision, broadcasting, and checks that cost nothing.

Coefficients are float64 on the CPU and are cast once, where they meet a tensor. Half-precision tensors are computed
with in float32 and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Makes `function` create its tensors on the CPU, fit for autograd, whatever default device or inference mode is
    set around.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapper


def as_float64(value: Tensor | Sequence[float] | float) -> Tensor:
    """`value` as a float64 tensor on its own device, or the CPU for numbers; float32 where the device has no float64
    (MPS).
    """
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which to combine `tensors`: their common one, but at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def expand_to(coefficient: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A coefficient of shape () or (B,) shaped to broadcast over `like` of shape (B, ...), on its device.

    Raises ValueError if the coefficient's shape is not the beginning of the tensor's shape.
    """
    if coefficient.ndim > like.ndim or any(
        c not in (1, n) for c, n in zip(coefficient.shape, like.shape, strict=False)
    ):
        raise ValueError(
            f"a coefficient of shape {tuple(coefficient.shape)} does not go with a tensor of shape "
            f"{tuple(like.shape)}: pass one value for all, or one for each element of the batch (shape "
            f"{tuple(like.shape[:1])})."
        )
    coefficient = coefficient.to(device=like.device, dtype=dtype or compute_dtype(like))
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def linear_combination(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y for coefficients of shape () or (B,), rounded once to the common dtype of x and y.

    Raises ValueError if x and y, or a coefficient and the two, do not have shapes that go together.
    """
    if x.shape != y.shape:
        raise ValueError(f"the two tensors must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    dtype = compute_dtype(x, y)
    result = expand_to(a, x, dtype) * x.to(dtype) + expand_to(b, y, dtype) * y.to(dtype)
    return result.to(torch.promote_types(x.dtype, y.dtype))


def sum_except_batch(x: Tensor) -> Tensor:
    """Sum over all dimensions but the first: (B, ...) -> (B,)."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def minus_log1p(x: Tensor) -> Tensor:
    """x - ln(1 + x) for x > -1, without the cancellation at small x, where it is x^2 / 2 - x^3 / 3 + ..."""
    small = x.abs() < 0.01
    y = torch.where(small, x, 0.0)
    series = torch.zeros_like(y)
    for k in range(9, 1, -1):
        series = y * ((-1) ** k / k + series)
    return torch.where(small, y * series, x - torch.log1p(x))


def on_host(*tensors: Tensor) -> bool:
    """Whether the values may be looked at for free: on the CPU, and not while torch.compile traces."""
    return not torch.compiler.is_compiling() and all(tensor.device.type == "cpu" for tensor in tensors)


def as_generator(generator: Any) -> Any:
    """A generator, a list of them, or None as it is; a whole number becomes a generator with that seed.

    Raises ValueError for anything else.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, (list, tuple)) and all(isinstance(one, torch.Generator) for one in generator):
        return list(generator)
    if isinstance(generator, Integral) and not isinstance(generator, bool):
        return torch.Generator().manual_seed(int(generator))
    raise ValueError(f"`generator` must be a torch.Generator or a seed, got {type(generator).__name__}.")


def whole_number(name: str, value: Any) -> Any:
    """A whole number of any type (NumPy's too) as an int; None stays. Raises ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    return int(value)


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device, drawn where the generator lives.

    So a generator on the CPU gives the same noise to every device.
    """
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def take(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for an index of any shape, zero dimensions too, where torch.compile would read a number."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape + table.shape[1:])


def shown(values: Tensor) -> str:
    """Values for an error message: all of up to eight, the extremes of more."""
    if values.numel() <= 8:
        return str(values.tolist())
    return f"{values.numel()} values from {float(values.min())} to {float(values.max())}"
