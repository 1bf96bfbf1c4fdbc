"""The variational autoencoder and the likelihoods that it brings: exact probabilities, its bound, Diffusers'
interface.
"""

import math

import mpmath
import pytest
import torch
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from vdm_diffusers.decoders import (
    bernoulli_log_likelihood,
    bin_width,
    discretized_gaussian_log_likelihood,
    discretized_logistic_log_likelihood,
    encode_pixels,
    level_values,
)
from vdm_diffusers.models import VariationalAutoencoder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_logistic(level, mean, scale, num_levels, encoding):
    with mpmath.workdps(60):
        if encoding == "bin_center":
            x, half = mpmath.mpf(2 * level + 1 - num_levels) / num_levels, mpmath.mpf(1) / num_levels
        else:
            x, half = mpmath.mpf(2 * level - num_levels + 1) / (num_levels - 1), mpmath.mpf(1) / (num_levels - 1)
        cdf = lambda edge: 1 / (1 + mpmath.exp(-(edge - mean) / mpmath.mpf(scale)))  # noqa: E731
        upper = 1 if level == num_levels - 1 else cdf(x + half)
        lower = 0 if level == 0 else cdf(x - half)
        return mpmath.log(upper - lower)


@pytest.mark.parametrize("encoding", ["bin_center", "endpoint"])
@pytest.mark.parametrize(("num_levels", "level"), [(256, 0), (256, 1), (256, 130), (256, 255), (17, 16), (2, 1)])
def test_logistic_matches_fifty_digits(encoding, num_levels, level):
    for mean in (-3.0, -0.99, 0.013, 1.5):
        for scale in (1e-3, 0.02, 0.5, 100.0):
            actual = discretized_logistic_log_likelihood(
                torch.tensor([[level]]),
                torch.tensor([[mean]], dtype=torch.float64),
                scale,
                num_levels=num_levels,
                pixel_encoding=encoding,
            )
            expected = exact_logistic(level, mpmath.mpf(mean), scale, num_levels, encoding)
            # far in a tail ln p is a difference of edge and mean over the scale, right to its last places
            assert abs(float(actual) - float(expected)) <= 1e-12 * max(1.0, abs(float(expected)), 1 / scale)


def test_logistic_probabilities_sum_to_one():
    levels = torch.arange(17)[:, None]
    mean = torch.full((17, 1), 0.31, dtype=torch.float64)
    for scale in (0.01, 0.3, 7.0):
        total = discretized_logistic_log_likelihood(levels, mean, scale, num_levels=17).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-13)


def test_logistic_takes_a_scale_for_every_pixel_and_has_finite_gradients_everywhere():
    shape = (11, 7, 5, 3)
    levels = torch.randint(256, shape, generator=generator())
    levels[:3], levels[3:6] = 0, 255
    mean = (6 * torch.randn(shape, generator=generator(1))).requires_grad_()
    log_scale = (3 * torch.randn(shape, generator=generator(2)) - 3).requires_grad_()
    value = discretized_logistic_log_likelihood(levels, mean, log_scale.exp())
    assert value.shape == (11,)
    frozen_mean, frozen_scale = mean.detach(), log_scale.detach().exp()
    one = sum(
        float(discretized_logistic_log_likelihood(levels[4:5, c, h], frozen_mean[4:5, c, h], frozen_scale[4:5, c, h]))
        for c in range(7)
        for h in range(5)
    )
    assert float(value[4].detach()) == pytest.approx(one, rel=1e-12)
    for gradient in torch.autograd.grad(value.sum(), (mean, log_scale)):
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) > 0


def test_bernoulli_matches_fifty_digits():
    for logit in (-800.0, -3.0, 0.0, 1e-9, 40.0):
        for level in (0, 1):
            with mpmath.workdps(60):
                p = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
                expected = float(mpmath.log(p if level else 1 - p))
            actual = bernoulli_log_likelihood(torch.tensor([[level]]), torch.tensor([[logit]], dtype=torch.float64))
            assert float(actual) == pytest.approx(expected, rel=1e-13, abs=0)


def test_refusals_of_the_likelihoods():
    levels, mean = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="scale"):
        discretized_logistic_log_likelihood(levels, mean, 0.0)
    with pytest.raises(ValueError, match="levels"):
        discretized_logistic_log_likelihood(levels + 256, mean, 1.0)
    with pytest.raises(ValueError, match="levels"):
        bernoulli_log_likelihood(levels + 2, mean)
    with pytest.raises(ValueError, match="shape"):
        bernoulli_log_likelihood(levels, mean[:, :2])


# --- the model -------------------------------------------------------------------------------------------------------


def make(likelihood="discretized_logistic", **config):
    torch.manual_seed(0)
    defaults = {"sample_size": (8, 4), "in_channels": 3, "latent_channels": 2, "block_out_channels": (8, 16)}
    defaults["num_levels"] = 2 if likelihood == "bernoulli" else 17
    model = VariationalAutoencoder(likelihood=likelihood, **{**defaults, **config})
    for parameter in model.parameters():  # a new model's zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def images(model, count=5, seed=0):
    config = model.config
    return torch.randint(
        config.num_levels, (count, config.in_channels, *config.sample_size), generator=generator(seed)
    )


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "discretized_gaussian", "bernoulli"])
def test_bound_is_the_sum_of_its_definition(likelihood):
    model = make(likelihood).double()
    levels = images(model)
    bound = model.bound(levels, generator=generator(3))
    distribution = model.encode(encode_pixels(levels, model.config.num_levels, dtype=torch.float64)).latent_dist
    torch.testing.assert_close(bound.layers[0], distribution.kl(), rtol=1e-12, atol=1e-12)  # Diffusers' own formula
    z = distribution.mean + distribution.std * torch.randn(
        distribution.mean.shape, generator=generator(3), dtype=torch.float64
    )
    parameters = model.decoder(z)
    if likelihood == "bernoulli":
        expected = torch.distributions.Bernoulli(logits=parameters).log_prob(levels.double()).flatten(1).sum(1)
    else:
        mean, raw = parameters.chunk(2, 1)
        scale = bin_width(17, "bin_center") / 20 + torch.nn.functional.softplus(raw)
        if likelihood == "discretized_gaussian":
            expected = discretized_gaussian_log_likelihood(
                levels, mean, scale**2, num_levels=17, pixel_encoding="bin_center"
            )
        else:
            expected = discretized_logistic_log_likelihood(levels, mean, scale, num_levels=17)
    torch.testing.assert_close(-bound.reconstruction, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bound.nats, bound.terms.prior + bound.terms.reconstruction, rtol=1e-14, atol=0)
    assert bool((bound.terms.diffusion == 0).all())


def test_kl_in_closed_form_and_by_monte_carlo_agree():
    model = make().double()
    levels = images(model, 1).expand(4000, -1, -1, -1)
    with torch.no_grad():
        sampled = model.bound(levels, form="log_ratio", generator=generator(0)).layers[0]
        exact = model.bound(levels[:1], generator=generator(0)).layers[0]
    assert float(sampled.std()) > 0
    assert abs(float(sampled.mean() - exact)) < 5 * float(sampled.std()) / math.sqrt(len(sampled))


def test_more_samples_give_a_tighter_bound():
    model = make().double()
    levels = images(model, 200)
    with torch.no_grad():
        one, fifty = (model.importance_weighted_bound(levels, k, generator=generator(1)) for k in (1, 50))
    difference = one - fifty
    assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(len(difference))


def test_gradients_reach_every_parameter():
    model = make()
    model.bound(images(model), generator=generator()).nats.mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_same_interface_as_autoencoder_kl():
    model = make()
    x = encode_pixels(images(model), 17)
    encoded = model.encode(x)
    assert isinstance(encoded, AutoencoderKLOutput)
    z = encoded.latent_dist.mode()
    assert z.shape == (5, *model.latent_shape) == (5, 2, 4, 2)
    assert model.decode(z).sample.shape == x.shape
    torch.testing.assert_close(model(x).sample, model.decode(z, return_dict=False)[0])
    drawn = [model(x, sample_posterior=True, generator=generator(7)).sample for _ in range(2)]
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert not torch.equal(drawn[0], model(x).sample)


def test_save_and_load(tmp_path):
    model = make(scaling_factor=0.7)
    model.save_pretrained(tmp_path)
    again = VariationalAutoencoder.from_pretrained(tmp_path)
    levels = images(model)
    torch.testing.assert_close(
        again.bound(levels, generator=generator()).nats,
        model.bound(levels, generator=generator()).nats,
        rtol=0,
        atol=0,
    )
    assert again.config.scaling_factor == 0.7
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")] == []


def test_pictures_have_levels_of_the_model():
    model = make()
    levels = images(model)
    traversal = model.latent_traversal(levels[:1], values=[-2.0, 0.0, 2.0], dimensions=[0, 5])
    for picture in (model.sample(5, generator=generator()), model.reconstruct(levels), traversal.flatten(0, 1)):
        assert picture.shape[1:] == levels.shape[1:]
        assert not picture.is_floating_point()
        assert 0 <= int(picture.min()) <= int(picture.max()) < 17
    assert traversal.shape[:2] == (2, 3)
    # the narrowest latent first, by default
    assert model.latent_traversal(levels[:1], values=[0.0]).shape[0] == 8
    torch.testing.assert_close(model.sample(3, generator=generator(1)), model.sample(3, generator=generator(1)))


def test_bernoulli_decodes_probabilities_between_the_two_levels():
    model = make("bernoulli")
    z = torch.randn(3, *model.latent_shape, generator=generator())
    low, high = level_values(2).tolist()
    expected = low + (high - low) * torch.sigmoid(model.decoder(z))
    torch.testing.assert_close(model.decode(z).sample, expected)
    torch.testing.assert_close(model.decode_levels(z), (model.decoder(z) > 0).long())


def test_latents_can_be_a_vector():
    model = VariationalAutoencoder(8, 1, 6, (8, 8, 8, 8), num_levels=17)
    assert model.latent_shape == (6, 1, 1)
    assert model.bound(torch.randint(17, (2, 1, 8, 8)), generator=generator()).nats.shape == (2,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 9}, "sample_size"),
        ({"block_out_channels": (8, 12)}, "norm_num_groups"),
        ({"likelihood": "gaussian"}, "likelihood"),
        ({"likelihood": "bernoulli", "num_levels": 17}, "num_levels=2"),
    ],
)
def test_refusals_of_the_model(config, message):
    with pytest.raises(ValueError, match=message):
        VariationalAutoencoder(**{"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), **config})


def test_training_makes_the_bound_better_than_independent_pixels():
    """Two kinds of images with noise: the latent must carry which, and the bound falls below what pixels alone
    allow.
    """
    torch.manual_seed(0)
    kind = torch.randint(2, (256,), generator=generator())
    pattern = torch.randint(2, (2, 1, 8, 8), generator=generator(5))
    levels = torch.where(torch.rand(256, 1, 8, 8, generator=generator(6)) < 0.05, 1 - pattern[kind], pattern[kind])
    frequency = levels.double().mean(0)
    independent = (
        -(levels * frequency.log() + (1 - levels) * (1 - frequency).log()).nan_to_num().flatten(1).sum(1).mean()
    )
    model = VariationalAutoencoder(8, 1, 2, (8, 16), likelihood="bernoulli", num_levels=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(100):
        index = torch.randint(256, (32,), generator=generator(step))
        loss = model.bound(levels[index], generator=generator(step)).nats.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        final = model.bound(levels, generator=generator(9)).nats.mean()
    noise = 64 * -(0.05 * math.log(0.05) + 0.95 * math.log(0.95))  # the flips' entropy, which no model avoids
    assert float(independent) > noise + 10
    assert float(final) < 0.5 * (float(independent) + noise + math.log(2))
