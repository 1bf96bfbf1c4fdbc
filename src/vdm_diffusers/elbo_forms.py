r"""One bound for the whole family: VAE, Markovian hierarchical VAE, and diffusion as their special case.

A Markovian hierarchy has latents z_1, ..., z_L above the data x = z_0:

    encoder   q(z_1..L | x) = prod_l q(z_l | z_{l-1})        decoder   p(x, z_1..L) = p(z_L) prod_l p(z_{l-1} | z_l)

with every conditional Gaussian but the likelihood p(x | z_1), and p(z_L) = N(0, I). Its evidence lower bound is

    -ln p(x) <= E_q [ -ln p(x | z_1) + sum_{l<L} ln q(z_l | z_{l-1}) / p(z_l | z_{l+1}) + ln q(z_L | z_{L-1}) / p(z_L)
    ].

L = 1 is the VAE. A diffusion model is the hierarchy with three restrictions (`diffusion_hierarchy`): latents have the
size of the data, the encoder is a fixed linear Gaussian, and the last latent is standard normal. Then the encoder's
Bayesian inverse q(z_{l-1} | z_l, x) is known, and the same bound can be written in a second form:

    form           term of layer l < L                                          term of layer L
    log_ratio      ln q(z_l | z_{l-1}) - ln p(z_l | z_{l+1})                    ln q(z_L | z_{L-1}) - ln p(z_L)
    consistency    the same                                                     KL(q(z_L | z_{L-1}) || p(z_L))
    matching       KL(q(z_l | z_{l+1}, x) || p(z_l | z_{l+1}))                  KL(q(z_L | x) || p(z_L))

averaged over draws of the encoder. All are unbiased for the one bound. Where one of the L terms is drawn, as training
does, the first forms' variance grows with L^2, for each term has the noise of z_l in both densities; `matching` has
integrated it out. (Summed over a whole trajectory that noise telescopes, and the forms differ little.) (Beware of the
first form as textbooks print it, with KL(q(z_l | z_{l-1}) || p(z_l | z_{l+1})) averaged over z_{l-1} and z_{l+1}:
given z_{l-1} the other two are not independent, so that it is another number, larger for a good decoder.)

Source: Luo 2022, "Understanding Diffusion Models: A Unified Perspective", the sections on hierarchical VAEs and on
variational diffusion models; Kingma & Welling 2014 (VAE); Sohl-Dickstein et al. 2015; Burda et al. 2016 (K samples).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .elbo import Bound
from .gaussian import Path, gaussian_kl, marginal, posterior, transition
from .numerics import as_float64, expand_to, noise_like, shown, sum_except_batch

Form = Literal["log_ratio", "consistency", "matching"]
FORMS: tuple[str, ...] = get_args(Form)


class Normal(NamedTuple):
    """N(mean, variance), independent over the dimensions: mean (B, ...), variance of its shape, () or (B,)."""

    mean: Tensor
    variance: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """mean + sqrt(variance) noise, differentiable in both (the reparameterisation of Kingma & Welling 2014)."""
        return self.mean + expand_to(self.variance.sqrt(), self.mean) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """ln N(z; mean, variance), summed over all dimensions but the first: (B,) nats."""
        variance = expand_to(self.variance, self.mean)
        return -0.5 * sum_except_batch((z - self.mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other), summed over all dimensions but the first: (B,) nats, in closed form."""
        q, p = expand_to(self.variance, self.mean), expand_to(other.variance, other.mean)
        return sum_except_batch(gaussian_kl(self.mean, q, other.mean, p))


def standard_normal(like: Tensor) -> Normal:
    """N(0, I) of `like`'s shape."""
    return Normal(torch.zeros_like(like), torch.ones((), dtype=like.dtype, device=like.device))


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """A Markovian hierarchy of L Gaussian layers, as the functions that make up its encoder and decoder.

    Attributes:
        num_layers: L >= 1.
        encode: (l, z_{l-1}) -> q(z_l | z_{l-1}) for l = 1..L, where z_0 = x.
        decode: (l, z_l) -> p(z_{l-1} | z_l) for l = 2..L. (p(x | z_1) is passed where it is needed: it knows the
            integers.)
        invert: (l, z_l, x) -> q(z_{l-1} | z_l, x) for l = 2..L, where it is known in closed form, else None.
        marginal: (l, x) -> q(z_l | x), likewise.
    """

    num_layers: int
    encode: Callable[[int, Tensor], Normal]
    decode: Callable[[int, Tensor], Normal]
    invert: Callable[[int, Tensor, Tensor], Normal] | None = None
    marginal: Callable[[int, Tensor], Normal] | None = None


@dataclass(frozen=True, eq=False)
class HierarchicalBound:
    """The bound's terms for one draw of the encoder: `layers`, L tensors, and `reconstruction`, all (B,) in nats."""

    layers: tuple[Tensor, ...]
    reconstruction: Tensor

    @property
    def nats(self) -> Tensor:
        """The estimate of the bound on -ln p(x), (B,)."""
        return torch.stack(self.layers).sum(0) + self.reconstruction

    @property
    def terms(self) -> Bound:
        """Layer by layer as the three terms of a diffusion model: the last layer is the prior's, the others the
        diffusion's.
        """
        middle = torch.stack(self.layers).sum(0) - self.layers[-1] if len(self.layers) > 1 else 0 * self.layers[-1]
        return Bound(prior=self.layers[-1], diffusion=middle, reconstruction=self.reconstruction)


def draw_latents(
    hierarchy: Hierarchy, x: Tensor, *, generator: torch.Generator | None = None
) -> tuple[list[Tensor], list[Normal]]:
    """A draw z_1, ..., z_L of the encoder, and the conditionals q(z_l | z_{l-1}) it came from."""
    latents, conditionals = [x], []
    for layer in range(1, hierarchy.num_layers + 1):
        conditionals.append(hierarchy.encode(layer, latents[-1]))
        latents.append(conditionals[-1].draw(noise_like(conditionals[-1].mean, generator)))
    return latents[1:], conditionals


def hierarchical_bound(
    hierarchy: Hierarchy,
    x: Tensor,
    log_likelihood: Callable[[Tensor], Tensor],
    *,
    form: Form = "consistency",
    latents: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> HierarchicalBound:
    """An unbiased estimate of the bound from one draw of the encoder, term by term, in one of its forms.

    Arguments:
        x: (B, ...) the data as the encoder takes them.
        log_likelihood: z_1 -> ln p(x | z_1), (B,) nats.
        form: see the module's table; `matching` needs a hierarchy whose encoder can be inverted.
        latents: z_1, ..., z_L to use; None: drawn from the encoder, with noise from `generator`.
    Raises:
        ValueError: unknown form, a form that the encoder does not allow, or another number of latents than layers.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
    top = hierarchy.num_layers
    if latents is None:
        latents, conditionals = draw_latents(hierarchy, x, generator=generator)
    elif len(latents) != top:
        raise ValueError(f"`latents` must be one tensor for each of the {top} layers, got {len(latents)}.")
    else:
        below = [x, *latents[:-1]]
        conditionals = [] if form == "matching" else [hierarchy.encode(i + 1, z) for i, z in enumerate(below)]
    z = {layer + 1: latent for layer, latent in enumerate(latents)}
    prior = standard_normal(z[top])
    if form == "matching":
        if hierarchy.invert is None or hierarchy.marginal is None:
            raise ValueError(
                "form 'matching' needs q(z_l | z_{l+1}, x) in closed form, which a learned encoder does not have: use "
                "'consistency'."
            )
        layers = [
            hierarchy.invert(layer + 1, z[layer + 1], x).kl(hierarchy.decode(layer + 1, z[layer + 1]))
            for layer in range(1, top)
        ]
        layers.append(hierarchy.marginal(top, x).kl(prior))
    else:
        layers = [
            conditionals[layer - 1].log_prob(z[layer]) - hierarchy.decode(layer + 1, z[layer + 1]).log_prob(z[layer])
            for layer in range(1, top)
        ]
        last = conditionals[top - 1]
        layers.append(last.kl(prior) if form == "consistency" else last.log_prob(z[top]) - prior.log_prob(z[top]))
    return HierarchicalBound(layers=tuple(layers), reconstruction=-log_likelihood(z[1]))


def multi_sample_bound(
    hierarchy: Hierarchy,
    x: Tensor,
    log_likelihood: Callable[[Tensor], Tensor],
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The K-sample bound -ln (1/K) sum_k p(x, z^k) / q(z^k | x) on -ln p(x): (B,) nats, never above the ELBO in
    expectation.

    Raises:
        ValueError: fewer than one sample.
    Source: Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", equation 8.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    nats = torch.stack(
        [
            hierarchical_bound(hierarchy, x, log_likelihood, form="log_ratio", generator=generator).nats
            for _ in range(num_samples)
        ]
    )
    return math.log(num_samples) - torch.logsumexp(-nats, dim=0)


def sample_hierarchy(hierarchy: Hierarchy, z_top: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """z_1 of a draw of the decoder that starts at z_L (standard normal for a sample of the model)."""
    z = z_top
    for layer in range(hierarchy.num_layers, 1, -1):
        conditional = hierarchy.decode(layer, z)
        z = conditional.draw(noise_like(conditional.mean, generator))
    return z


def diffusion_hierarchy(
    log_snrs: Tensor | Sequence[float],
    denoise: Callable[[Tensor, Tensor], Tensor],
    *,
    variance: Literal["posterior", "forward"] = "posterior",
    path: Path = "vp",
) -> Hierarchy:
    """A diffusion model as the hierarchy it is: z_l = alpha_l x + sigma_l eps, p(z_{l-1} | z_l) = q(z_{l-1} | z_l, x =
    x_hat).

    Arguments:
        log_snrs: (L,) finite, decreasing: of z_1 (the cleanest) to z_L (nearly standard normal). The chain of VDM's T
            steps has L = T + 1 latents, its z_0 is this z_1; DDPM's chain x_1, ..., x_T has L = T.
        denoise: (z_l, log_snr_l () float64) -> x_hat, of z_l's shape.
        variance: of p(z_{l-1} | z_l): that of q(z_{l-1} | z_l, x), or sigma_{l|l-1}^2 of the forward step.
    Raises:
        ValueError: log SNRs that do not decrease or are not finite; an unknown variance; the ve path, whose last
            latent is not standard normal.
    """
    log_snr = as_float64(log_snrs if isinstance(log_snrs, Tensor) else torch.tensor(list(log_snrs)).double())
    if log_snr.ndim != 1 or not len(log_snr) or not bool(log_snr.isfinite().all() and (log_snr.diff() < 0).all()):
        raise ValueError(f"`log_snrs` must be finite and decrease, from the cleanest latent on, got {shown(log_snr)}.")
    if variance not in ("posterior", "forward"):
        raise ValueError(f"`variance` must be 'posterior' or 'forward', got {variance!r}.")
    if path == "ve":
        raise ValueError("`path` must be 'vp' or 'flow': on the ve path the last latent is not standard normal.")

    def at(layer: int) -> Tensor:
        return log_snr[layer - 1] if layer else torch.tensor(math.inf, dtype=log_snr.dtype)

    def encode(layer: int, z: Tensor) -> Normal:
        return Normal(*transition(z, at(layer - 1), at(layer), path=path))

    def invert(layer: int, z: Tensor, x: Tensor) -> Normal:
        return Normal(*posterior(z, x, at(layer), at(layer - 1), path=path))

    def decode(layer: int, z: Tensor) -> Normal:
        inverse = invert(layer, z, denoise(z, at(layer)))
        return inverse if variance == "posterior" else inverse._replace(variance=encode(layer, z).variance)

    def at_layer(layer: int, x: Tensor) -> Normal:
        return Normal(*marginal(x, at(layer), path=path))

    return Hierarchy(len(log_snr), encode, decode, invert, at_layer)
