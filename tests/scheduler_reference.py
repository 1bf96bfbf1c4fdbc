"""Diffusion coefficients in 40-digit arithmetic by the textbook formulas, written without a look at the code they
judge.
"""

from __future__ import annotations

import itertools

import mpmath as mp
import torch

mp.mp.dps = 40


def betas(name: str, num_steps: int, start: float = 1e-4, end: float = 0.02) -> list[mp.mpf]:
    """The beta tables of Diffusers, exactly (Ho et al. 2020; Nichol & Dhariwal 2021, equation 17)."""
    start, end, n = mp.mpf(start), mp.mpf(end), num_steps
    if name == "linear":
        return [start + (end - start) * i / (n - 1) for i in range(n)]
    if name == "scaled_linear":
        a, b = mp.sqrt(start), mp.sqrt(end)
        return [(a + (b - a) * i / (n - 1)) ** 2 for i in range(n)]
    if name == "sigmoid":
        return [(end - start) / (1 + mp.exp(6 - mp.mpf(12) * i / (n - 1))) + start for i in range(n)]
    if name == "squaredcos_cap_v2":
        f = [mp.cos((mp.mpf(i) / n + mp.mpf("0.008")) / mp.mpf("1.008") * mp.pi / 2) ** 2 for i in range(n + 1)]
    elif name == "exp":
        f = [mp.exp(-mp.mpf(12) * i / n) for i in range(n + 1)]
    elif name == "laplace":
        f = []
        for i in range(n + 1):
            t = mp.mpf(i) / n
            log_snr = -mp.mpf("0.5") * (-1 if t > 0.5 else 1) * mp.log(1 - 2 * abs(mp.mpf("0.5") - t) + mp.mpf("1e-6"))
            f.append(mp.sqrt(1 / (1 + mp.exp(-log_snr))))
    return [min(1 - f[i + 1] / f[i], mp.mpf("0.999")) for i in range(n)]


def alpha_bars(betas: list[mp.mpf]) -> list[mp.mpf]:
    """alpha_bar_i = prod_{j <= i} (1 - beta_j)."""
    return list(itertools.accumulate((1 - b for b in betas), lambda x, y: x * y))


def zero_terminal(alpha_bars: list[mp.mpf]) -> list[mp.mpf]:
    """Lin et al. 2024, algorithm 1."""
    roots = [mp.sqrt(a) for a in alpha_bars]
    return [((r - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for r in roots]


def log_snr(alpha_bar: mp.mpf) -> mp.mpf:
    return mp.log(alpha_bar) - mp.log(1 - alpha_bar) if alpha_bar else mp.mpf("-inf")


def posterior(alpha_bar_t: mp.mpf, alpha_bar_s: mp.mpf) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """Coefficients of z_t and of x in the mean of q(z_s | z_t, x), and its variance (Ho et al.

    2020, equations 6 and 7).
    """
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    z = mp.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    x = mp.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t)
    return z, x, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta


def to_tensor(values: list[mp.mpf]) -> torch.Tensor:
    """Rounded to float64, correctly."""
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at |values| (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp(min=info.smallest_normal)))
    return info.eps * 2**exponent
