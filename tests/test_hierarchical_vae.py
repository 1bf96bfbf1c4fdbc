"""The Markovian hierarchical VAE: its bound by layers, and the restrictions under which it is a diffusion model."""

import math

import pytest
import torch

from vdm_diffusers.decoders import softmax_log_likelihood
from vdm_diffusers.elbo import bits_per_dim, discrete_weight, prior_kl, squared_error
from vdm_diffusers.elbo_forms import draw_latents, hierarchical_bound, standard_normal
from vdm_diffusers.gaussian import diffuse
from vdm_diffusers.models import HierarchicalVAE, VariationalAutoencoder

LOG_SNRS = (7.0, 4.0, 1.0, -2.0, -6.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(**config):
    torch.manual_seed(0)
    defaults = {
        "sample_size": (8, 4),
        "in_channels": 2,
        "num_layers": 3,
        "latent_channels": 3,
        "block_out_channels": (8, 16),
        "num_levels": 17,
    }
    model = HierarchicalVAE(**{**defaults, **config})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.double()


def images(count=5):
    return torch.randint(17, (count, 2, 8, 4), generator=generator())


def test_bound_by_layers_is_the_log_ratio_of_the_joint_densities():
    model = make()
    levels = images()
    hierarchy, x, log_likelihood = model._bound_arguments(levels)
    (z_1, z_2, z_3), q = draw_latents(hierarchy, x, generator=generator(1))
    bound = hierarchical_bound(hierarchy, x, log_likelihood, form="log_ratio", latents=[z_1, z_2, z_3])
    normal = lambda n: torch.distributions.Normal(n.mean, n.variance.sqrt())  # noqa: E731
    log = lambda n, z: normal(n).log_prob(z).flatten(1).sum(1)  # noqa: E731
    log_p = log_likelihood(z_1) + log(hierarchy.decode(2, z_2), z_1) + log(hierarchy.decode(3, z_3), z_2)
    log_p = log_p + torch.distributions.Normal(0, 1).log_prob(z_3).flatten(1).sum(1)
    log_q = log(q[0], z_1) + log(q[1], z_2) + log(q[2], z_3)
    torch.testing.assert_close(bound.nats, log_q - log_p, rtol=1e-12, atol=1e-10)
    closed = hierarchical_bound(hierarchy, x, log_likelihood, latents=[z_1, z_2, z_3])
    torch.testing.assert_close(closed.layers[2], q[2].kl(standard_normal(z_3)))
    assert len(closed.layers) == 3
    torch.testing.assert_close(closed.terms.diffusion, closed.layers[0] + closed.layers[1], rtol=1e-12, atol=1e-12)


def test_one_layer_is_a_variational_autoencoder():
    model = make(num_layers=1)
    vae = VariationalAutoencoder((8, 4), 2, 3, (8, 16), num_levels=17).double()
    vae.decoder.load_state_dict(model.decoder.state_dict())
    vae.encoder.load_state_dict(model.encoder.state_dict())
    levels = images()
    hierarchy, x, log_likelihood = model._bound_arguments(levels)
    bound = hierarchical_bound(hierarchy, x, log_likelihood, latents=[torch.ones(5, 3, 4, 2).double()])
    torch.testing.assert_close(-bound.reconstruction, vae.log_likelihood(levels, torch.ones(5, 3, 4, 2).double()))
    mine, its = (each.bound(levels, generator=generator(1)).nats for each in (model, vae))
    torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_new_layers_leave_the_bound_of_the_vae_as_it_is():
    """Reversible at first: for every draw the layers above z_1 amount to -ln N(z_1; 0, I), as in a VAE."""
    torch.manual_seed(0)
    model = HierarchicalVAE((8, 4), 2, 5, 3, (8, 16), num_levels=17).double()
    hierarchy, x, log_likelihood = model._bound_arguments(images())
    latents, conditionals = draw_latents(hierarchy, x, generator=generator())
    bound = hierarchical_bound(hierarchy, x, log_likelihood, form="log_ratio", latents=latents)
    of_the_vae = conditionals[0].log_prob(latents[0]) - standard_normal(latents[0]).log_prob(latents[0])
    torch.testing.assert_close(sum(bound.layers), of_the_vae, rtol=1e-12, atol=1e-10)


def test_three_restrictions_give_the_discrete_elbo_number_for_number():
    """The model's own bound against the core's weights on |eps - eps_hat|^2, its prior term and its decoder."""
    model = make(num_layers=5, encoder_log_snrs=LOG_SNRS)
    assert model.latent_shape == (2, 8, 4)
    levels = images()
    hierarchy, x, log_likelihood = model._bound_arguments(levels)
    noise = torch.randn(5, *x.shape, dtype=torch.float64, generator=generator(3))
    latents = [diffuse(x, n, log_snr) for n, log_snr in zip(noise, LOG_SNRS, strict=True)]
    bound = hierarchical_bound(hierarchy, x, log_likelihood, form="matching", latents=latents)
    for i in range(4):
        eps_hat = latents[i + 1] + model.decoders[str(i + 2)](latents[i + 1])
        expected = discrete_weight(LOG_SNRS[i], LOG_SNRS[i + 1]) * squared_error(noise[i + 1], eps_hat)
        torch.testing.assert_close(bound.layers[i], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(bound.terms.prior, prior_kl(x, LOG_SNRS[-1]), rtol=1e-12, atol=1e-14)
    decoder = softmax_log_likelihood(levels, latents[0], LOG_SNRS[0], num_levels=17)
    torch.testing.assert_close(bound.terms.reconstruction, -decoder, rtol=0, atol=0)


def test_the_restricted_model_s_two_forms_agree():
    model = make(num_layers=5, encoder_log_snrs=LOG_SNRS)
    levels = images(1).expand(600, -1, -1, -1)
    with torch.no_grad():
        first, second = (
            model.bound(levels, form=form, generator=generator(i)).nats
            for i, form in enumerate(("consistency", "matching"))
        )
    error = math.sqrt(float(first.var() + second.var()) / len(levels))
    assert abs(float(first.mean() - second.mean())) < 5 * error


def test_gradients_reach_every_parameter():
    for config in ({}, {"num_layers": 5, "encoder_log_snrs": LOG_SNRS}):
        model = make(**config)
        model(images(), generator=generator()).mean().backward()
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_samples_reconstructions_save_and_load(tmp_path):
    for name, config in (("learned", {}), ("diffusion", {"num_layers": 5, "encoder_log_snrs": LOG_SNRS})):
        model = make(**config).float()
        levels = images()
        for picture in (model.sample(4, generator=generator()), model.reconstruct(levels)):
            assert picture.shape[1:] == levels.shape[1:]
            assert 0 <= int(picture.min()) <= int(picture.max()) < 17
        model.save_pretrained(tmp_path / name)
        again = HierarchicalVAE.from_pretrained(tmp_path / name)
        assert again.is_diffusion == model.is_diffusion
        torch.testing.assert_close(
            again(levels, generator=generator(2)), model(levels, generator=generator(2)), rtol=0, atol=0
        )


def test_restricted_reconstruction_is_the_image_itself():
    # z_1 / alpha_1 at a high SNR without noise is x: nothing of the image is lost on the way
    model = make(num_layers=5, encoder_log_snrs=LOG_SNRS)
    torch.testing.assert_close(model.reconstruct(images()), images())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"sample_size": 9}, "sample_size"),
        ({"encoder_log_snrs": [1.0, 0.0]}, "encoder_log_snrs"),
        ({"likelihood": "softmax"}, "likelihood"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_training_lowers_the_bound():
    torch.manual_seed(0)
    levels = torch.randint(2, (64, 1, 8, 8), generator=generator()).repeat_interleave(4, 0)
    levels = levels * 12 + torch.randint(4, levels.shape, generator=generator(1))
    for config in ({"num_layers": 2, "block_out_channels": (8, 16)}, {"num_layers": 5, "encoder_log_snrs": LOG_SNRS}):
        model = HierarchicalVAE(8, 1, num_levels=17, **config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for step in range(40):
            index = torch.randint(len(levels), (32,), generator=generator(step))
            loss = model(levels[index], generator=generator(step)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(bits_per_dim(loss.detach(), 64)))
        first, last = torch.tensor(losses[:5]), torch.tensor(losses[-10:])
        assert float(last.mean()) < float(first.mean()) - 5 * float(last.std())
