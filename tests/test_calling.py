"""One way to call a network: every caller gives it what it takes, and gets float32 or better."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from vdm_diffusers import (
    HierarchicalVAE,
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
    evaluate_likelihood,
)
from vdm_diffusers.models.calling import call_network
from vdm_diffusers.numerics import as_generator, whole_number
from vdm_diffusers.pipelines.langevin_corrector import LangevinCorrector


def unet(**options):
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "fourier_exponents": (2,)}
    model = VDMUNet2DModel(sample_size=4, in_channels=1, **sizes, **options)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return model.eval()


def dit():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4, "patch_size": 2}
    return DiTTransformer2DModel(sample_size=4, in_channels=1, out_channels=1, num_embeds_ada_norm=3, **sizes).eval()


def stock():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        **blocks,
    ).eval()


LOG_SNR = {"beta_schedule": "log_snr_linear", "log_snr_max": 8.0, "log_snr_min": -5.0}
NETWORKS = {"VDM U-Net": unet, "DiT": dit, "stock U-Net": stock}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_sampler_corrector_and_bound_call_every_network_in_its_own_dtype(make, dtype):
    pipe = VDMPipeline(make().to(dtype), VDMScheduler(**LOG_SNR), num_levels=17)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, args[1].shape)))
    corrector = LangevinCorrector(generator=torch.Generator().manual_seed(0))
    images = pipe(2, 3, generator=1, output_type="pt", callback_on_step_end=corrector).images
    report = evaluate_likelihood(pipe, (images * 16).round().to(torch.uint8), num_samples=4, progress_bar=False)
    expected = torch.float32 if getattr(pipe.unet, "takes_float32_sample", False) else dtype
    assert {kind for kind, _ in seen} == {expected} and all(len(shape) == 1 for _, shape in seen)
    assert bool(images.isfinite().all()) and bool(report.nats.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["vae", "hierarchy", "diffusion hierarchy", "latent"])
def test_every_bound_works_in_half_precision_and_is_summed_in_float32(kind, dtype):
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "in_channels": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 2,
    }
    sizes |= {"num_levels": 17}
    if kind == "vae":
        model = VariationalAutoencoder(**sizes)
    elif kind == "hierarchy":
        model = HierarchicalVAE(num_layers=2, **sizes)
    elif kind == "diffusion hierarchy":
        model = HierarchicalVAE(num_layers=3, encoder_log_snrs=(6.0, 0.0, -6.0), **sizes)
    else:
        vae = VariationalAutoencoder(**sizes)
        prior = VDMUNet2DModel(
            sample_size=4,
            in_channels=2,
            hidden_channels=8,
            layers_per_block=1,
            norm_num_groups=4,
            fourier_exponents=(),
        )
        model = LatentVDMPipeline(vae.eval(), prior.eval(), VDMScheduler(**LOG_SNR))
        model.set_progress_bar_config(disable=True)
    levels = torch.randint(0, 17, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    reference = model.bound(levels, generator=torch.Generator().manual_seed(2)).nats
    model = model.to(dtype)
    found = model.bound(levels, generator=torch.Generator().manual_seed(2)).nats
    assert found.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(found, reference.to(found), rtol=0.05, atol=1.0)
    if kind == "latent":
        assert len(model(2, 2, generator=torch.Generator().manual_seed(0), output_type="pt").images) == 2
        return
    weighted = model.importance_weighted_bound(levels, 2, generator=torch.Generator().manual_seed(2))
    assert weighted.dtype in (torch.float32, torch.float64) and bool(weighted.isfinite().all())
    assert model.sample(2, generator=torch.Generator().manual_seed(0)).shape == (2, 1, 8, 8)


def test_timesteps_are_whole_where_they_are_and_fractions_that_cannot_be_are_explained():
    seen = []

    def network(sample, timestep):
        seen.append(timestep)
        return (sample,)

    sample = torch.zeros(3, 1, 2, 2)
    call_network(network, sample, torch.tensor([5.0, 6.0 + 1e-9, 7.0], dtype=torch.float64))
    call_network(network, sample, 0.5)
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [5, 6, 7]
    assert seen[1].dtype == torch.float32 and seen[1].shape == (3,)

    class Indexed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(1000, 1)

        def forward(self, sample, timestep):
            return sample * self.embedding(timestep)[:, :, None, None]

    images = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8)
    for method in ("continuous", "ode"):
        with pytest.raises(ValueError, match=r"whole ones alone.*method='discrete'"):
            evaluate_likelihood(Indexed(), images, scheduler=DDPMScheduler(), method=method, progress_bar=False)
    report = evaluate_likelihood(Indexed(), images, scheduler=DDPMScheduler(), num_samples=4, progress_bar=False)
    assert bool(report.nats.isfinite().all())


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_a_callback_stops_the_sampling_by_either_name(name):
    pipe = VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17)
    pipe.set_progress_bar_config(disable=True)
    steps = []

    def stop(pipe, index, timestep, tensors):
        steps.append(index)
        setattr(pipe, name, index == 1)
        return {}

    pipe(1, 5, callback_on_step_end=stop)
    assert steps == [0, 1]
    steps.clear()
    pipe(1, 3)
    assert not pipe.interrupt


def test_from_pipe_is_the_name_and_the_old_one_says_so():
    source = DDPMPipeline(stock(), DDPMScheduler())
    pipe = VDMPipeline.from_pipe(source)
    assert pipe.unet is source.unet and (pipe.config.num_levels, pipe.config.pixel_encoding) == (256, "endpoint")
    again = VDMPipeline.from_pipe(VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17))
    assert (again.config.num_levels, again.config.pixel_encoding) == (17, "bin_center")
    with pytest.warns(FutureWarning, match="from_pipe"):
        assert VDMPipeline.from_pipeline(source).unet is source.unet


MASK = np.array([[0, 0, 1, 1]] * 4)


@pytest.mark.parametrize(
    "mask",
    [
        torch.from_numpy(MASK),
        MASK.astype(bool),
        MASK.astype(np.float32),
        PIL.Image.fromarray((MASK * 255).astype(np.uint8)),
    ],
    ids=["tensor", "bool array", "float array", "PIL"],
)
def test_masks_of_every_form(mask):
    pipe = VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17)
    pipe.set_progress_bar_config(disable=True)
    image = torch.randint(0, 17, (1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    found = pipe(1, 2, image=image, mask=mask, generator=0, output_type="pt").images * 16
    assert torch.equal(found.round().long()[..., :2], image[..., :2])


@pytest.mark.parametrize("mask", [torch.full((4, 4), torch.nan), torch.full((4, 4), 0.5), [[0, 1]]], ids=str)
def test_masks_that_mean_nothing_are_refused(mask):
    pipe = VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17)
    with pytest.raises(ValueError, match="`mask` must"):
        pipe(1, 2, image=torch.zeros(1, 1, 4, 4).long(), mask=mask)


def test_numbers_and_seeds_of_every_kind():
    assert whole_number("n", np.int64(3)) == 3 and whole_number("n", None) is None
    for value in (2.0, True, "4"):
        with pytest.raises(ValueError, match="`n` must be a whole number"):
            whole_number("n", value)
    drawn = [
        torch.rand(2, generator=as_generator(seed)) for seed in (5, np.int64(5), torch.Generator().manual_seed(5))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="`generator` must be"):
        as_generator("5")


def forms_of_images():
    from datasets import Array3D, Dataset, Features

    levels = torch.randint(0, 17, (6, 1, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    features = Features({"pixels": Array3D((1, 4, 4), "uint8")})
    dataset = Dataset.from_dict({"pixels": levels.numpy()}, features=features)
    return levels, {
        "uint16": levels.to(torch.uint16),
        "array": levels.numpy(),
        "array with channels last": np.moveaxis(levels.numpy(), 1, -1),
        "list of images": list(levels),
        "batches with labels": [(levels[:4], torch.arange(4)), (levels[4:], torch.arange(2))],
        "column of arrays": dataset,
        "dataset in torch's format": dataset.with_format("torch"),
    }


def test_images_of_every_form_give_one_figure():
    levels, forms = forms_of_images()
    pipe = VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17)
    options = {"num_samples": np.int64(4), "batch_size": np.int32(3), "progress_bar": False, "generator": 4}
    expected = evaluate_likelihood(pipe, levels, **options).nats
    for name, images in forms.items():
        assert torch.equal(evaluate_likelihood(pipe, images, **options).nats, expected), name


@pytest.mark.parametrize(
    ("low", "hint"), [(0, r"\(images \* 255\)"), (-1, r"\(\(images \+ 1\) / 2 \* 255\)"), (-7, "from")]
)
def test_the_hint_for_floats_fits_their_range(low, hint):
    images = torch.linspace(low, 1, 16).reshape(1, 1, 4, 4)
    with pytest.raises(ValueError, match=hint):
        evaluate_likelihood(stock(), images, scheduler=DDPMScheduler())


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("continuous", {"num_steps": 5}),
        ("continuous", {"grid": "time"}),
        ("continuous", {"dequantization": "uniform"}),
        ("discrete", {"divergence": "exact"}),
        ("discrete", {"tolerance": 1e-3}),
        ("ode", {"variance_type": "fixed_large"}),
        ("ode", {"variance_reduction": False}),
        ("importance_weighted", {"variance_reduction": False}),
        ("continuous", {"dequantization": "nonsense"}),
        ("discrete", {"divergence": "nonsense"}),
    ],
)
def test_an_option_that_means_nothing_is_refused(method, option):
    pipe = VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17)
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}`"):
        evaluate_likelihood(pipe, torch.zeros(1, 1, 4, 4).long(), method=method, **option)


def test_the_bound_of_a_noisier_sampler_is_that_of_its_ancestral_chain_and_says_so():
    pipes = [VDMPipeline(unet(), VDMScheduler(**LOG_SNR, stochasticity=s), num_levels=17) for s in (1.0, 1.5)]
    levels = torch.randint(0, 17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    for method in ("discrete", "importance_weighted"):
        one, other = (
            evaluate_likelihood(
                pipe, levels, method=method, num_steps=3, num_samples=4, generator=0, progress_bar=False
            )
            for pipe in pipes
        )
        assert torch.equal(one.nats, other.nats)
        assert "chain" not in one.settings and "1.5" in other.settings["chain"]


def test_one_image_and_densities_are_said_as_what_they_are():
    pipe = VDMPipeline(unet(), VDMScheduler(**LOG_SNR), num_levels=17)
    report = evaluate_likelihood(pipe, torch.zeros(1, 1, 4, 4).long(), num_samples=4, progress_bar=False)
    assert "nan" not in str(report).lower() and "1 image:" in str(report)
    assert report.to_dict()["sampling_error"] is None and report.to_dict()["total_error"] is None
    options = {"scheduler": pipe.scheduler, "num_levels": None, "num_samples": 4, "progress_bar": False}
    density = evaluate_likelihood(pipe.unet, torch.zeros(2, 1, 4, 4), **options)
    assert f"{density.nats_per_dim:.4f} nats/dim" in str(density) and "bits" not in str(density)
