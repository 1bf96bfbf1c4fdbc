"""The bound of the whole family: truth on a linear-Gaussian hierarchy, both forms of the diffusion ELBO, the three
restrictions.
"""

import math

import pytest
import torch

from vdm_diffusers.decoders import encode_pixels, softmax_log_likelihood
from vdm_diffusers.elbo import discrete_weight, discrete_weight_x, prior_kl, squared_error
from vdm_diffusers.elbo_forms import (
    FORMS,
    Hierarchy,
    Normal,
    diffusion_hierarchy,
    draw_latents,
    hierarchical_bound,
    multi_sample_bound,
    sample_hierarchy,
    standard_normal,
)
from vdm_diffusers.gaussian import alpha_sigma, diffuse, transition
from vdm_diffusers.noise_schedules import LinearLogSNRSchedule
from vdm_diffusers.prediction import convert

D, V = 3, 0.25  # dimensions; variance of the likelihood


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def within(samples, expected, z=5.0):
    """Whether the mean of independent samples agrees with a number."""
    return abs(float(samples.mean()) - float(expected)) < z * float(samples.std()) / math.sqrt(len(samples))


class LinearGaussian:
    """x = W_1 z_1 + noise, z_{l-1} = W_l z_l + noise, z_L ~ N(0, I): everything about it has a closed form."""

    def __init__(self, num_layers, seed=0):
        self.weights = [normal((D, D), seed + i) / math.sqrt(D) for i in range(num_layers)]
        self.encoders = [normal((D, D), seed + 50 + i) / math.sqrt(D) for i in range(num_layers)]
        self.variances = [0.3 + 0.2 * i for i in range(num_layers)]

    @property
    def hierarchy(self):
        return Hierarchy(
            len(self.weights),
            encode=lambda i, z: Normal(z @ self.encoders[i - 1].T, torch.full_like(z, self.variances[i - 1])),
            decode=lambda i, z: Normal(z @ self.weights[i - 1].T, torch.full_like(z, V)),
        )

    def log_likelihood(self, x):
        return lambda z: Normal(z @ self.weights[0].T, torch.tensor(V, dtype=z.dtype)).log_prob(x)

    def joint(self):
        """Covariance of (x, z_1, ..., z_L) under the decoder."""
        blocks = torch.eye(D, dtype=torch.float64)
        covariance = blocks
        for weight in reversed(self.weights):
            # the new variable y = W z + n stands before the others: Cov(y, all) = W Cov(z, all)
            cross = weight @ covariance[:D]
            own = weight @ covariance[:D, :D] @ weight.T + V * blocks
            covariance = torch.cat([torch.cat([own, cross], 1), torch.cat([cross.T, covariance], 1)])
        return covariance

    def log_evidence(self, x):
        covariance = self.joint()[:D, :D]
        return torch.distributions.MultivariateNormal(torch.zeros(D, dtype=torch.float64), covariance).log_prob(x)

    def posterior(self, x):
        """p(z_1..L | x): mean (B, L D) and covariance."""
        covariance = self.joint()
        gain = covariance[D:, :D] @ covariance[:D, :D].inverse()
        return x @ gain.T, covariance[D:, D:] - gain @ covariance[:D, D:]

    def encoder_joint(self, x):
        """q(z_1..L | x): mean (B, L D) and covariance."""
        mean, maps = [], []
        z, covariance = x, torch.zeros(0, 0, dtype=torch.float64)
        for weight, variance in zip(self.encoders, self.variances, strict=True):
            z = z @ weight.T
            mean.append(z)
            cross = weight @ covariance[-D:] if len(covariance) else torch.zeros(D, 0, dtype=torch.float64)
            own = (cross[:, -D:] @ weight.T if len(covariance) else 0) + variance * torch.eye(D, dtype=torch.float64)
            covariance = torch.cat([torch.cat([covariance, cross.T], 1), torch.cat([cross, own], 1)])
            maps.append(weight)
        return torch.cat(mean, 1), covariance

    def gap(self, x):
        """KL(q(z | x) || p(z | x)) in closed form."""
        normals = [
            torch.distributions.MultivariateNormal(mean, (covariance + covariance.T) / 2)
            for mean, covariance in (self.encoder_joint(x), self.posterior(x))
        ]
        return torch.distributions.kl_divergence(*normals)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_log_evidence_is_elbo_plus_the_gap(num_layers):
    model = LinearGaussian(num_layers)
    x = normal((D,), 9)[None]
    many = x.expand(60000, D)
    for form in ("log_ratio", "consistency"):
        nats = hierarchical_bound(
            model.hierarchy, many, model.log_likelihood(many), form=form, generator=generator(1)
        ).nats
        assert within(nats, -(model.log_evidence(x) - model.gap(x)))


def test_vae_identity_to_machine_precision():
    """ln p(x) = ELBO + KL(q || p(z | x)) where the ELBO's two terms are themselves closed forms."""
    model = LinearGaussian(1)
    x = normal((11, D), 9)
    q = model.hierarchy.encode(1, x)
    w = model.weights[0]
    # E_q ln p(x | z) of a Gaussian: the log density at the mean, less the spread that W carries over
    reconstruction = model.log_likelihood(x)(q.mean) - 0.5 * model.variances[0] * (w**2).sum() / V
    elbo = reconstruction - q.kl(standard_normal(x))
    torch.testing.assert_close(elbo + model.gap(x), model.log_evidence(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_with_the_true_posterior_as_encoder_every_draw_gives_the_evidence(num_layers):
    """The gap is zero, and the log ratio has no variance at all."""
    model = LinearGaussian(num_layers)
    x = normal((7, D), 3)
    # the posterior of a Markov chain is Markov: q(z_l | z_{l-1}) = p(z_l | z_{l-1}) by Bayes' rule within the decoder
    covariance = model.joint()

    def encode(layer, z):
        below, own = slice((layer - 1) * D, layer * D), slice(layer * D, (layer + 1) * D)
        gain = covariance[own, below] @ covariance[below, below].inverse()
        conditional = covariance[own, own] - gain @ covariance[below, own]
        return z @ gain.T, conditional

    # a full covariance is not a `Normal`: rotate the check instead into explicit densities
    z, log_q, log_p = x, 0.0, 0.0
    density = torch.distributions.MultivariateNormal
    for layer in range(1, num_layers + 1):
        mean, conditional = encode(layer, z)
        q = density(mean, (conditional + conditional.T) / 2)
        z_new = mean + normal(mean.shape, layer) @ torch.linalg.cholesky((conditional + conditional.T) / 2).T
        log_q = log_q + q.log_prob(z_new)
        decoded = model.log_likelihood(z)(z_new) if layer == 1 else model.hierarchy.decode(layer, z_new).log_prob(z)
        log_p = log_p + decoded
        z = z_new
    log_p = log_p + standard_normal(z).log_prob(z)
    torch.testing.assert_close(log_p - log_q, model.log_evidence(x), rtol=1e-11, atol=1e-11)


def test_more_samples_come_nearer_to_the_evidence():
    model = LinearGaussian(1)
    covariance = model.joint()  # an encoder with the posterior's mean, but a variance that is not the posterior's
    model.encoders = [covariance[D:, :D] @ covariance[:D, :D].inverse()]
    x = normal((D,), 4)[None].expand(4000, D)
    bounds = [
        multi_sample_bound(model.hierarchy, x, model.log_likelihood(x), k, generator=generator(k)) for k in (1, 8, 64)
    ]
    means = [float(b.mean()) for b in bounds]
    errors = [float(b.std()) / math.sqrt(len(b)) for b in bounds]
    truth = -float(model.log_evidence(x[:1]))
    assert means[0] - means[1] > 5 * (errors[0] + errors[1])
    assert means[1] - means[2] > 5 * (errors[1] + errors[2])
    assert means[2] > truth - 5 * errors[2]
    assert means[2] - truth < 0.2 * (means[0] - truth)


def test_sampling_reproduces_the_decoders_covariance():
    model = LinearGaussian(3)
    z_1 = sample_hierarchy(model.hierarchy, normal((100000, D), 0), generator=generator(1))
    expected = model.joint()[D : 2 * D, D : 2 * D]
    scale = torch.sqrt(torch.outer(expected.diag(), expected.diag()))
    assert float(((z_1.T.cov() - expected) / scale).abs().max()) < 5 * math.sqrt(2 / len(z_1))


# --- training reaches the optimum ------------------------------------------------------------------------------------


def test_training_reaches_the_exact_optimum():
    """A linear VAE is probabilistic PCA: the best likelihood is known from the eigenvalues, and the ELBO reaches
    it.
    """
    data = normal((500, 4), 0) @ normal((4, 4), 1) * 0.7
    data = data - data.mean(0)
    covariance = data.T @ data / len(data)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    noise = values[2:].mean()
    best = 0.5 * (4 * math.log(2 * math.pi) + values[:2].log().sum() + 2 * noise.log() + 4)  # Tipping & Bishop 1999

    w, a = (0.5 * normal((4, 2), 2)).requires_grad_(), (0.5 * normal((2, 4), 3)).requires_grad_()
    log_v, log_s = (
        torch.zeros((), dtype=torch.float64, requires_grad=True),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
    )

    def negative_elbo():
        q = Normal(data @ a.T, log_s.exp().expand(len(data), 2))
        spread = 0.5 * ((w**2).sum(0) * log_s.exp()).sum() / log_v.exp()  # E_q ln p(x | z) in closed form
        return (q.kl(standard_normal(q.mean)) - Normal(q.mean @ w.T, log_v.exp()).log_prob(data) + spread).mean()

    optimizer = torch.optim.LBFGS(
        [w, a, log_v, log_s],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = negative_elbo()
        loss.backward()
        return loss

    optimizer.step(closure)
    reached = float(negative_elbo().detach())
    # q's covariance is diagonal; at the optimum W can be rotated so that the true posterior's is too, and the gap
    # closes
    assert reached == pytest.approx(float(best), abs=1e-7)


def minimise(loss, parameters):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return float(loss().detach())


def sigma_points(dims):
    """(2 dims, dims): the mean of a quadratic over these is exactly its mean over N(0, I)."""
    return math.sqrt(dims) * torch.cat([torch.eye(dims), -torch.eye(dims)]).double()


def test_training_a_hierarchy_of_two_layers_reaches_the_exact_optimum():
    """The best Gaussian's likelihood is known; the bound of a linear chain with learned encoder comes down to it."""
    data = normal((300, 2), 0) @ normal((2, 2), 1)
    data = data - data.mean(0)
    best = 0.5 * (2 * math.log(2 * math.pi) + torch.logdet(data.T @ data / len(data)) + 2)
    points = sigma_points(4)
    x, noise = data.repeat_interleave(len(points), 0), points.repeat(len(data), 1)
    weights = [(torch.eye(2).double() + 0.3 * normal((2, 2), 2 + i)).requires_grad_() for i in range(4)]
    logs = [torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def conditional(i, z):
        return Normal(z @ weights[i].T, logs[i].exp().expand_as(z))

    hierarchy = Hierarchy(2, encode=lambda i, z: conditional(i - 1, z), decode=lambda i, z: conditional(2, z))

    def loss():
        z_1 = hierarchy.encode(1, x).draw(noise[:, :2])
        z_2 = hierarchy.encode(2, z_1).draw(noise[:, 2:])
        likelihood = lambda z: conditional(3, z).log_prob(x)  # noqa: E731
        return hierarchical_bound(hierarchy, x, likelihood, form="log_ratio", latents=[z_1, z_2]).nats.mean()

    reached = minimise(loss, [*weights, *logs])
    assert reached >= float(best) - 1e-9
    assert reached == pytest.approx(float(best), abs=1e-6)


def test_training_a_linear_denoiser_reaches_the_optimal_bound_which_nears_the_likelihood():
    data = normal((50, 2), 0) @ normal((2, 2), 1)
    data = data - data.mean(0)
    covariance = data.T @ data / len(data)
    evidence = 0.5 * (2 * math.log(2 * math.pi) + torch.logdet(covariance) + 2)
    points = sigma_points(2)
    x, noise = data.repeat_interleave(len(points), 0), points.repeat(len(data), 1)
    gaps = []
    for num_layers in (16, 32):
        log_snrs = torch.linspace(10, -9, num_layers).double()
        alphas, sigmas = alpha_sigma(log_snrs)
        matrices = torch.zeros(num_layers, 2, 2, dtype=torch.float64, requires_grad=True)

        def bound(matrices, log_snrs=log_snrs, alphas=alphas, sigmas=sigmas):
            def denoise(z, log_snr):
                i = int((log_snrs - log_snr).abs().argmin())
                return (z - sigmas[i] * (z @ matrices[i].T)) / alphas[i]

            hierarchy = diffusion_hierarchy(log_snrs, denoise)
            decoder = lambda z: Normal(z / alphas[0], (sigmas[0] / alphas[0]) ** 2).log_prob(x)  # noqa: E731
            latents = [diffuse(x, noise, log_snr) for log_snr in log_snrs]
            return hierarchical_bound(hierarchy, x, decoder, form="matching", latents=latents).nats.mean()

        reached = minimise(lambda: bound(matrices), [matrices])  # noqa: B023
        total = alphas[:, None, None] ** 2 * covariance + sigmas[:, None, None] ** 2 * torch.eye(2).double()
        best = float(bound(sigmas[:, None, None] * torch.linalg.inv(total)))  # E[eps | z] = sigma cov(z)^-1 z
        assert reached == pytest.approx(best, abs=1e-7)
        gaps.append(reached - float(evidence))
    # what is left is the discretisation: half the width of the steps, less than half of it
    assert 0 < gaps[1] < 0.5 * gaps[0]


# --- diffusion as the special case -----------------------------------------------------------------------------------


def gaussian_denoiser(data_variance, path="vp"):
    def denoise(z, log_snr):
        alpha, sigma = alpha_sigma(log_snr, path)
        return float(alpha * data_variance / (alpha**2 * data_variance + sigma**2)) * z

    return denoise


def wrong_denoiser(z, log_snr):
    return torch.tanh(1.7 * z) + 0.1 * z.flip(1)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_three_restrictions_give_the_discrete_elbo_number_for_number(path):
    shape = (5, 2, 3, 1)
    levels = torch.randint(17, shape, generator=generator())
    x = encode_pixels(levels, 17, dtype=torch.float64)
    log_snr = LinearLogSNRSchedule(8.0, -5.0).log_snr(torch.linspace(0, 1, 9, dtype=torch.float64))
    hierarchy = diffusion_hierarchy(log_snr, wrong_denoiser, path=path)
    noise = normal((9, *shape), 7)
    latents = [diffuse(x, n, level, path=path) for n, level in zip(noise, log_snr, strict=True)]
    log_likelihood = lambda z: softmax_log_likelihood(levels, z, log_snr[0], num_levels=17, path=path)  # noqa: E731
    bound = hierarchical_bound(hierarchy, x, log_likelihood, form="matching", latents=latents)

    for i in range(8):
        x_hat = wrong_denoiser(latents[i + 1], log_snr[i + 1])
        from_x = discrete_weight_x(log_snr[i], log_snr[i + 1]) * squared_error(x, x_hat)
        torch.testing.assert_close(bound.layers[i], from_x, rtol=1e-12, atol=0)
        eps_hat = convert(x_hat, latents[i + 1], log_snr[i + 1], source="sample", target="epsilon", path=path)
        from_eps = discrete_weight(log_snr[i], log_snr[i + 1]) * squared_error(noise[i + 1], eps_hat)
        torch.testing.assert_close(bound.layers[i], from_eps, rtol=1e-9, atol=0)
    torch.testing.assert_close(bound.terms.prior, prior_kl(x, log_snr[-1], path=path), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bound.terms.reconstruction, -log_likelihood(latents[0]), rtol=0, atol=0)
    torch.testing.assert_close(bound.terms.nats, bound.nats, rtol=1e-14, atol=0)


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_both_forms_are_the_same_sum_on_every_trajectory(variance):
    """Bayes' rule telescopes: with z_l sampled too, ln q(z_l | z_{l-1}) and ln q(z_{l-1} | z_l, x) sum to one
    number.
    """
    x = normal((6, 4), 0)
    log_snr = torch.tensor([5.0, 3.0, 0.0, -2.0, -6.0], dtype=torch.float64)
    hierarchy = diffusion_hierarchy(log_snr, wrong_denoiser, variance=variance)
    latents, _ = draw_latents(hierarchy, x, generator=generator(5))
    log_likelihood = lambda z: -((z - x) ** 2).sum(1)  # noqa: E731
    first = hierarchical_bound(hierarchy, x, log_likelihood, form="log_ratio", latents=latents).nats
    second = -log_likelihood(latents[0]) + hierarchy.marginal(5, x).log_prob(latents[4])
    second = second - standard_normal(x).log_prob(latents[4])
    for layer in range(2, 6):
        q, p = hierarchy.invert(layer, latents[layer - 1], x), hierarchy.decode(layer, latents[layer - 1])
        second = second + q.log_prob(latents[layer - 2]) - p.log_prob(latents[layer - 2])
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)


def test_latents_of_the_encoder_have_the_diffusion_s_marginals():
    x = torch.full((60000, 1), 1.5, dtype=torch.float64)
    hierarchy = diffusion_hierarchy([4.0, 1.0, -3.0], wrong_denoiser)
    latents, _ = draw_latents(hierarchy, x, generator=generator(2))
    for z, level in zip(latents, (4.0, 1.0, -3.0), strict=True):
        alpha, sigma = alpha_sigma(level)
        assert within(z[:, 0], 1.5 * alpha)
        assert abs(float(z.var() / sigma**2) - 1) < 5 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("denoiser", [gaussian_denoiser(1.0), wrong_denoiser])
@pytest.mark.parametrize("num_latents", [2, 12])
def test_all_forms_are_unbiased_for_the_same_value(denoiser, num_latents):
    x = torch.tensor([[0.7, -1.2]], dtype=torch.float64).expand(40000, 2)
    log_snr = torch.linspace(4, -6, num_latents, dtype=torch.float64)
    hierarchy = diffusion_hierarchy(log_snr, denoiser)
    log_likelihood = lambda z: torch.zeros(len(z), dtype=z.dtype)  # noqa: E731
    draws = {
        form: hierarchical_bound(hierarchy, x, log_likelihood, form=form, generator=generator(i)).nats
        for i, form in enumerate(FORMS)
    }
    for form in ("log_ratio", "consistency"):
        difference = float(draws[form].mean() - draws["matching"].mean())
        error = math.sqrt(sum(float(draws[name].var()) / len(x) for name in (form, "matching")))
        assert abs(difference) < 5 * error


def one_step_variance(bound):
    """Variance of the estimate that draws one of the L terms and multiplies it by L, as training does."""
    terms = torch.stack(bound.layers)
    return float(len(terms) * (terms**2).mean(1).sum() - terms.sum(0).mean() ** 2)


@pytest.mark.parametrize("denoiser", [gaussian_denoiser(1.0), wrong_denoiser])
def test_one_step_of_the_matching_form_has_the_lower_variance_and_the_more_so_the_more_steps(denoiser):
    x = normal((4000, 2), 0)
    ratios = []
    for num_latents in (5, 20, 80):
        log_snr = torch.linspace(4, -6, num_latents, dtype=torch.float64)
        hierarchy = diffusion_hierarchy(log_snr, denoiser)
        first, second = (
            one_step_variance(
                hierarchical_bound(hierarchy, x, lambda z: 0 * z[:, 0], form=form, generator=generator(1))
            )
            for form in ("consistency", "matching")
        )
        ratios.append(first / second)
    assert 1 < ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] > 3 * ratios[1]


def test_a_gaussian_chain_bounds_its_exact_evidence():
    """x ~ N(0, 1), an exact denoiser: the chain's likelihood is a Gaussian's, and the bound is above it by a known
    gap.
    """
    level = torch.linspace(6, -8, 6, dtype=torch.float64)
    denoise = gaussian_denoiser(1.0)
    hierarchy = diffusion_hierarchy(level, denoise)
    alpha, sigma = alpha_sigma(level[0])
    v = float(sigma / alpha) ** 2  # p(x | z_1) = N(z_1 / alpha_1, sigma_1^2 / alpha_1^2)
    # the decoder's marginal variance of z_1, layer by layer, then of x
    variance = 1.0
    for layer in range(6, 1, -1):
        step = hierarchy.decode(layer, torch.ones(1, 1, dtype=torch.float64))
        variance = float(step.mean) ** 2 * variance + float(step.variance)
    evidence_variance = variance / float(alpha) ** 2 + v
    x = normal((20000, 1), 0)
    log_likelihood = lambda z: Normal(z / alpha, torch.tensor(v, dtype=z.dtype)).log_prob(x)  # noqa: E731
    exact = -Normal(torch.zeros_like(x), torch.tensor(evidence_variance, dtype=x.dtype)).log_prob(x)
    nats = hierarchical_bound(hierarchy, x, log_likelihood, form="matching", generator=generator(3)).nats
    gap = nats - exact
    assert float(gap.mean()) > 5 * float(gap.std()) / math.sqrt(
        len(x)
    )  # six latents: a visible gap, on the right side
    k_sample = multi_sample_bound(hierarchy, x, log_likelihood, 100, generator=generator(4)) - exact
    assert abs(float(k_sample.mean())) < 0.15 * float(gap.mean())


def test_the_textbook_s_kl_over_neighbours_is_not_the_bound():
    """E KL(q(z_l | z_{l-1}) || p(z_l | z_{l+1})) over (z_{l-1}, z_{l+1}) is another number: those given, z_l is not
    q(z_l | z_{l-1}).
    """
    x = torch.full((40000, 1), 0.8, dtype=torch.float64)
    level = torch.tensor([3.0, 0.0, -6.0], dtype=torch.float64)
    hierarchy = diffusion_hierarchy(level, gaussian_denoiser(1.0))
    latents, _ = draw_latents(hierarchy, x, generator=generator(0))
    terms = {
        form: hierarchical_bound(hierarchy, x, lambda z: 0 * z[:, 0], form=form, latents=latents)
        for form in ("consistency", "matching")
    }
    printed = [
        Normal(*transition(below, low, own)).kl(hierarchy.decode(layer + 1, above))
        for layer, below, above, low, own in (
            (1, x, latents[1], math.inf, level[0]),
            (2, latents[0], latents[2], level[0], level[1]),
        )
    ]
    printed = sum(printed) + terms["consistency"].layers[-1]
    matching = terms["matching"].nats
    assert within(terms["consistency"].nats - matching, 0)
    assert not within(printed - matching, 0, z=50)
    assert float((printed - matching).mean()) > 0


def test_refusals():
    hierarchy = diffusion_hierarchy([1.0, 0.0], wrong_denoiser)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="form"):
        hierarchical_bound(hierarchy, x, lambda z: z[:, 0], form="second")
    with pytest.raises(ValueError, match="closed form"):
        hierarchical_bound(LinearGaussian(2).hierarchy, torch.zeros(1, D).double(), lambda z: z[:, 0], form="matching")
    with pytest.raises(ValueError, match="latents"):
        hierarchical_bound(hierarchy, x, lambda z: z[:, 0], latents=[x])
    with pytest.raises(ValueError, match="decrease"):
        diffusion_hierarchy([0.0, 1.0], wrong_denoiser)
    with pytest.raises(ValueError, match="variance"):
        diffusion_hierarchy([1.0, 0.0], wrong_denoiser, variance="optimal")
    with pytest.raises(ValueError, match="ve path"):
        diffusion_hierarchy([1.0, 0.0], wrong_denoiser, path="ve")
    with pytest.raises(ValueError, match="num_samples"):
        multi_sample_bound(hierarchy, x, lambda z: z[:, 0], 0)
