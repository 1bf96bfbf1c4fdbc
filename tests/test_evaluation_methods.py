"""The front door: method objects, options where they mean something, and models with a learned encoder."""

import pytest
import torch

from vdm_diffusers import (
    Continuous,
    Discrete,
    HierarchicalVAE,
    ImportanceWeighted,
    LatentVDMPipeline,
    ProbabilityFlow,
    VariationalAutoencoder,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_latent_likelihood,
    evaluate_likelihood,
)

IMAGES = torch.randint(0, 17, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0))


def evaluate(**options):
    settings = {"num_levels": 17, "num_samples": 4, "generator": 3, "progress_bar": False}
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", prediction_type="epsilon")
    return evaluate_likelihood(lambda z, t: 0.9 * z, IMAGES, scheduler=scheduler, **settings, **options)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (Continuous(variance_reduction=False), {"method": "continuous", "variance_reduction": False}),
        (Discrete(num_steps=7, grid="log_snr"), {"method": "discrete", "num_steps": 7, "grid": "log_snr"}),
        (ImportanceWeighted(num_steps=5), {"method": "importance_weighted", "num_steps": 5}),
        (
            ProbabilityFlow(dequantization="uniform", divergence="exact", tolerance=1e-3),
            {"method": "ode", "dequantization": "uniform", "divergence": "exact", "tolerance": 1e-3},
        ),
    ],
)
def test_an_object_and_its_words_are_the_same(way, words):
    one, other = evaluate(method=way), evaluate(**words)
    assert torch.equal(one.nats, other.nats)
    assert one.settings == other.settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Discrete(), "num_steps": 5}, r"method=Discrete\(num_steps=...\)"),
        ({"method": "continuous", "num_steps": 5}, "'discrete' or 'importance_weighted'"),
        ({"method": "continuous", "tolerance": 1e-5}, "'ode'"),
        ({"method": "discrete", "divergence": "hutchinson"}, "'ode'"),
        ({"method": 3}, "Continuous, Discrete, ImportanceWeighted, ProbabilityFlow object, got 3"),
        ({"method": "exact"}, "`method` must be one of"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**options)


def test_objects_check_their_own_options():
    with pytest.raises(ValueError, match="dequantization"):
        ProbabilityFlow(dequantization="nonsense")
    with pytest.raises(ValueError, match="tolerance"):
        ProbabilityFlow(tolerance=0)
    with pytest.raises((ValueError, TypeError), match="num_steps"):
        Discrete(num_steps=2.5)


def autoencoder():
    return VariationalAutoencoder(
        in_channels=1, sample_size=4, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, num_levels=17
    )


def test_models_with_an_encoder_go_through_the_same_door():
    vae = autoencoder()
    seed = torch.Generator().manual_seed(3).initial_seed()
    report = evaluate_likelihood(vae, IMAGES, num_samples=4, generator=3, progress_bar=False)
    direct = evaluate_latent_likelihood(vae.eval().bound, IMAGES, num_repeats=4, seed=seed)
    assert torch.equal(report.nats, direct.nats) and report.method == "elbo"
    tight = evaluate_likelihood(vae, IMAGES, method=ImportanceWeighted(), num_samples=64, progress_bar=False)
    assert tight.method == "importance_weighted"
    assert tight.bits_per_dim < report.bits_per_dim + 4 * (report.standard_error + tight.standard_error)
    unet = VDMUNet2DModel(
        in_channels=2, sample_size=2, hidden_channels=8, layers_per_block=1, norm_num_groups=4, fourier_exponents=()
    )
    pipe = LatentVDMPipeline(vae, unet, VDMScheduler(beta_schedule="log_snr_linear"))
    assert evaluate_likelihood(pipe, IMAGES, num_samples=4, progress_bar=False).bits_per_dim > 0
    with pytest.raises(ValueError, match="num_steps"):
        evaluate_likelihood(vae, IMAGES, num_steps=5)
    with pytest.raises(ValueError, match="'importance_weighted' is none of a LatentVDMPipeline"):
        evaluate_likelihood(pipe, IMAGES, method="importance_weighted")


def test_a_hierarchy_goes_through_it_too():
    model = HierarchicalVAE(
        in_channels=1,
        sample_size=4,
        num_layers=2,
        latent_channels=2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_levels=17,
    )
    assert evaluate_likelihood(model, IMAGES, num_samples=3, progress_bar=False).standard_error > 0
