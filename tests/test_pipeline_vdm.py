"""VDMPipeline: exact denoisers whose samples are known, outputs, inputs that do not fit, dtypes, other people's
parts.
"""

import itertools
import json
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

import vdm_diffusers
from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel
from vdm_diffusers.decoders import encode_pixels, softmax_log_likelihood
from vdm_diffusers.gaussian import posterior_coefficients
from vdm_diffusers.registration import register_with_diffusers

LOG_SNR = {"beta_schedule": "log_snr_linear"}


class KnowsTheImage(ModelMixin, ConfigMixin):
    """The exact denoiser of data that are one image for certain: eps_hat = (z - alpha x) / sigma."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: tuple = (5, 3)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.image = self.scheduler = None
        self.seen: list = []

    def forward(self, sample, timestep, class_labels=None):
        self.seen.append((sample.dtype, tuple(timestep.shape)))
        log_snr = self.scheduler.log_snr(timestep.double().cpu())[:, None, None, None]
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        return UNet2DOutput(sample=((sample.double() - alpha * self.image) / sigma).to(sample.dtype))


def knowing(levels: torch.Tensor, num_levels: int, pixel_encoding: str = "bin_center", **config) -> VDMPipeline:
    """A pipeline whose every sample must be `levels` (C, H, W)."""
    unet = KnowsTheImage(levels.shape[0], tuple(levels.shape[1:]))
    unet.image = encode_pixels(levels, num_levels, pixel_encoding, torch.float64)
    unet.scheduler = VDMScheduler(clip_sample=False, **config)
    pipe = VDMPipeline(unet, unet.scheduler, num_levels=num_levels, pixel_encoding=pixel_encoding)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_unet(**config) -> VDMUNet2DModel:
    torch.manual_seed(0)
    defaults = {"sample_size": (6, 4), "in_channels": 1, "hidden_channels": 8, "layers_per_block": 1}
    unet = VDMUNet2DModel(**defaults | {"norm_num_groups": 4, "fourier_exponents": (3, 7), "dropout": 0.0} | config)
    for parameter in unet.parameters():  # a new network would return its input
        torch.nn.init.normal_(parameter, std=0.05)
    return unet.eval()


def stock_unet(**config) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    defaults = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DModel(**blocks | defaults | config).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_samples(loaded, saved, **kwargs):
    """The same images, and latents that differ by rounding at most.

    Weights that are mapped into memory lie where the file has them, and the rounding of a convolution on the CPU
    depends on their alignment. Two processes that load one file agree to the last bit (tests/test_loading_roads.py).
    """
    kwargs = {"num_inference_steps": 3, **kwargs}
    for output_type, atol in (("latent", 1e-6), ("pt", 0.0)):
        images = [pipe(**kwargs, generator=seeded(), output_type=output_type).images for pipe in (loaded, saved)]
        torch.testing.assert_close(*images, rtol=0, atol=atol)


def random_levels(shape, num_levels, seed=0):
    return torch.randint(num_levels, shape, generator=seeded(seed))


# --- what comes out is known -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel_encoding", ["bin_center", "endpoint"])
@pytest.mark.parametrize(("num_levels", "channels"), [(2, 1), (17, 3), (256, 5), (1000, 2)])
@pytest.mark.parametrize("config", [LOG_SNR | {"log_snr_max": 20.0}, LOG_SNR | {"final_step": "mean"}, {}])
def test_an_exact_denoiser_gives_its_image(config, num_levels, channels, pixel_encoding):
    levels = random_levels((channels, 5, 3), num_levels)
    pipe = knowing(levels, num_levels, pixel_encoding, **config)
    images = pipe(2, 13, generator=seeded(), output_type="pt").images
    assert images.shape == (2, channels, 5, 3) and images.dtype == torch.float32
    assert torch.equal((images * (num_levels - 1)).round().long(), levels.expand(2, -1, -1, -1))
    assert np.array_equal(pipe(2, 13, generator=seeded(), output_type="np").images, images.permute(0, 2, 3, 1).numpy())


def test_z_0_is_divided_by_alpha_0_and_x_hat_is_not():
    levels = torch.arange(17).reshape(1, 1, 1, 17)
    x = encode_pixels(levels, 17, "bin_center", torch.float64)
    alpha_0 = torch.tensor(1.0, dtype=torch.float64).sigmoid().sqrt()  # log SNR 1: alpha_0 = 0.855
    latent = VDMPipeline(stock_unet(), VDMScheduler(**LOG_SNR, log_snr_max=1.0), num_levels=17)
    assert torch.equal(latent.decode_latents(alpha_0 * x), levels)
    assert not torch.equal(latent.decode_latents(x), levels)
    # a learned schedule ends where its table says, inside the envelope
    table = VDMScheduler(**LOG_SNR, log_snr_max=9.0, log_snr_table=[1.0, -1.0, -5.0])
    assert torch.equal(VDMPipeline(stock_unet(), table, num_levels=17).decode_latents(alpha_0 * x), levels)
    for scheduler in (
        VDMScheduler(**LOG_SNR, log_snr_max=1.0, final_step="mean"),
        VDMScheduler(),
        DDPMScheduler(),
        DDIMScheduler.from_config(VDMScheduler(**LOG_SNR, log_snr_max=1.0).as_discrete().config),
    ):
        latent.scheduler = scheduler
        assert torch.equal(latent.decode_latents(x), levels)


def test_decoding_is_the_mode_of_the_models_decoder():
    pipe = VDMPipeline(stock_unet(), VDMScheduler(**LOG_SNR, log_snr_max=2.0), num_levels=7, pixel_encoding="endpoint")
    z_0 = torch.randn(40, 1, 1, 1, generator=seeded()).double()
    likelihoods = [
        softmax_log_likelihood(torch.full((40, 1, 1, 1), k), z_0, 2.0, num_levels=7, pixel_encoding="endpoint")
        for k in range(7)
    ]
    assert torch.equal(pipe.decode_latents(z_0).flatten(), torch.stack(likelihoods).argmax(0))


def test_samples_of_a_gaussian_have_its_spread():
    """Data N(0, v): eps_hat is linear in z, and the variance of z_0 follows from that of the noise by a recursion."""

    class Gaussian(KnowsTheImage):
        def forward(self, sample, timestep, class_labels=None):
            log_snr = self.scheduler.log_snr(timestep.double())[:, None, None, None]
            a, s = log_snr.sigmoid(), (-log_snr).sigmoid()
            return UNet2DOutput(sample=(s.sqrt() / (a * 0.09 + s) * sample.double()).float())

    unet = Gaussian(1, (64, 64))
    unet.scheduler = VDMScheduler(**LOG_SNR)
    latents = quiet(VDMPipeline(unet, unet.scheduler))(8, 20, generator=seeded(), output_type="latent").images
    log_snrs = torch.linspace(-5.0, 13.3, 21, dtype=torch.float64).tolist()
    variance = 1.0
    for log_snr_t, log_snr_s in itertools.pairwise(log_snrs):
        c = posterior_coefficients(log_snr_t, log_snr_s)
        a, s = (1 / (1 + math.exp(-sign * log_snr_t)) for sign in (1, -1))
        x_hat = math.sqrt(a) * 0.09 / (a * 0.09 + s)  # E[x | z_t] / z_t
        variance = float(c.z + c.x * x_hat) ** 2 * variance + float(c.variance)
    standard_error = variance * math.sqrt(2 / latents.numel())
    assert abs(float(latents.var()) - variance) < 5 * standard_error
    assert (
        abs(variance - 0.09) > 10 * standard_error
    )  # twenty steps are not the limit: the test would see the difference


def test_the_same_samples_as_ddpm_pipeline():
    unet = stock_unet()
    scheduler = DDPMScheduler(num_train_timesteps=100)
    expected = quiet(DDPMPipeline(unet, scheduler))(3, seeded(), 20, output_type="np").images
    adopted = quiet(VDMPipeline.from_pipeline(DDPMPipeline(unet, scheduler)))
    assert (adopted.config.num_levels, adopted.config.pixel_encoding) == (256, "endpoint")
    for pipe in (
        adopted,
        quiet(VDMPipeline.from_pipeline(adopted, scheduler=VDMScheduler.from_config(scheduler.config))),
    ):
        images = pipe(3, 20, generator=seeded(), output_type="np").images
        assert np.abs(images - expected).max() <= 0.5 / 255 + 1e-4  # ours are rounded to levels


# --- what the outputs look like --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("num_levels", [2, 17, 256, 4096])
def test_pil_images_scale_levels_to_a_byte(channels, mode, num_levels):
    levels = random_levels((channels, 5, 3), num_levels)
    levels[0, 0, 0], levels[0, 0, 1] = 0, num_levels - 1
    (image,) = knowing(levels, num_levels, **LOG_SNR, log_snr_max=24.0)(
        generator=seeded(), num_inference_steps=3
    ).images
    assert (image.mode, image.size) == (mode, (3, 5))
    expected = np.floor(levels.permute(1, 2, 0).numpy() * 255 / (num_levels - 1) + 0.5).astype(np.uint8)
    assert np.array_equal(np.asarray(image).reshape(5, 3, channels), expected)
    assert expected[0, 0, 0] == 0 and expected[0, 1, 0] == 255


def test_return_dict_and_latent_output():
    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR)
    (images,) = pipe(2, 5, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(images, pipe(2, 5, generator=seeded(), output_type="pt").images)
    latents = pipe(2, 5, generator=seeded(), output_type="latent").images
    assert latents.dtype == torch.float32
    assert torch.equal(pipe.decode_latents(latents), (images * 16).round().long())


def test_the_progress_bar_counts_the_steps(capsys):
    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR)
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=7, generator=seeded())
    assert "7/7" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=7, generator=seeded())
    assert capsys.readouterr().err == ""


def test_steps_default_to_the_schedulers():
    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR, num_train_timesteps=11)
    pipe(generator=seeded())
    assert len(pipe.unet.seen) == 11


# --- randomness ------------------------------------------------------------------------------------------------------


def test_with_a_list_of_generators_an_image_does_not_depend_on_its_neighbours():
    pipe = quiet(VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR), num_levels=256))
    together = pipe(3, 6, generator=[seeded(4), seeded(7), seeded(9)], output_type="latent").images
    for index, seed in enumerate((4, 7, 9)):
        alone = pipe(1, 6, generator=[seeded(seed)], output_type="latent").images
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone, pipe(1, 6, generator=seeded(seed), output_type="latent").images)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_latents_are_where_sampling_starts():
    pipe = quiet(VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR, stochasticity=0.0), num_levels=256))
    generator = seeded(3)
    drawn = pipe(2, 6, generator=generator, output_type="latent").images
    latents = torch.randn(2, 1, 6, 4, generator=seeded(3))
    assert torch.equal(pipe(num_inference_steps=6, latents=latents, output_type="latent").images, drawn)
    other_size = torch.randn(2, 1, 9, 5, generator=seeded())
    assert pipe(num_inference_steps=3, latents=other_size, output_type="pt").images.shape == (2, 1, 9, 5)


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unet", [small_unet(num_class_embeds=3), stock_unet(num_class_embeds=3)], ids=["ours", "stock"]
)
def test_class_labels(unet):
    pipe = quiet(VDMPipeline(unet, VDMScheduler(**LOG_SNR)))
    kwargs = {"num_inference_steps": 3, "output_type": "latent"}
    each = pipe(class_labels=[0, 2], generator=seeded(), **kwargs).images
    assert each.shape[0] == 2
    same = pipe(2, class_labels=2, generator=seeded(), **kwargs).images
    assert torch.equal(same, pipe(class_labels=torch.tensor([2, 2]), generator=seeded(), **kwargs).images)
    torch.testing.assert_close(each[1], same[1])
    assert not torch.allclose(each[0], same[0], atol=1e-3)
    with pytest.raises(ValueError, match="class_labels"):
        pipe(2, **kwargs)


def test_class_labels_for_a_model_without_classes():
    with pytest.raises(ValueError, match="class"):
        quiet(VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR)))(class_labels=1, num_inference_steps=2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_a_transformer_with_a_learned_variance(variance_type):
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=6, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    pipe = quiet(VDMPipeline(dit, VDMScheduler(variance_type=variance_type), pixel_encoding="endpoint"))
    images = pipe(class_labels=[3, 4], num_inference_steps=4, generator=seeded(), output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.unique().numel() > 2
    pipe.scheduler = DDIMScheduler()
    assert pipe(class_labels=[3, 4], num_inference_steps=4, output_type="np").images.shape == (2, 8, 8, 3)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_keep_latents_in_float32(dtype):
    levels = random_levels((1, 5, 3), 256)
    exact = knowing(levels, 256, **LOG_SNR, log_snr_max=20.0)
    exact.unet.to(dtype)
    steps = []
    exact(1, 5, generator=seeded(), callback_on_step_end=lambda p, i, t, kw: steps.append(kw["latents"].dtype))
    assert steps == [torch.float32] * 5
    assert exact.unet.seen == [(dtype, (1,))] * 5  # a network that asks for nothing gets the dtype of its weights

    full, half = small_unet(), small_unet().to(dtype)
    a, b = (
        quiet(VDMPipeline(unet, VDMScheduler(**LOG_SNR)))(2, 8, generator=seeded(), output_type="latent").images
        for unet in (full, half)
    )
    assert b.dtype == torch.float32
    assert (a - b).abs().max() < 0.15 and not torch.equal(a, b)  # the same noise, a rounded network


def test_the_vdm_network_sees_float32():
    unet = small_unet().to(torch.bfloat16)
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    quiet(VDMPipeline(unet, VDMScheduler(**LOG_SNR)))(2, 3, generator=seeded())
    assert seen == [torch.float32] * 3


def test_stock_network_in_half_precision():
    pipe = quiet(VDMPipeline(stock_unet().to(torch.bfloat16), VDMScheduler(), pixel_encoding="endpoint"))
    assert pipe(2, 4, generator=seeded(), output_type="np").images.shape == (2, 8, 8, 1)


# --- callbacks -------------------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_replace_the_latents():
    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR)
    seen = []

    def callback(p, index, timestep, tensors):
        assert p is pipe and set(tensors) == {"latents"}
        seen.append((index, float(timestep)))
        return {"latents": torch.ones_like(tensors["latents"])} if index == 3 else {}

    latents = pipe(2, 4, output_type="latent", callback_on_step_end=callback).images
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(latents, torch.ones(2, 1, 5, 3))


def test_callback_interrupts():
    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR)

    def stop(p, index, timestep, tensors):
        p.interrupt = index == 1

    pipe(1, 6, callback_on_step_end=stop)
    assert len(pipe.unet.seen) == 2
    pipe(1, 6)
    assert len(pipe.unet.seen) == 8


def test_diffusers_callback_classes():
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 0}

    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR)
    assert not pipe(1, 3, output_type="latent", callback_on_step_end=Halve()).images.any()


# --- other people's schedulers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_schedulers_of_diffusers_find_the_image_of_an_exact_denoiser(scheduler):
    levels = random_levels((3, 5, 3), 17)
    pipe = knowing(levels, 17, **LOG_SNR)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.as_discrete().config)
    images = pipe(2, 60, generator=seeded(), output_type="pt").images
    assert ((images * 16).round().long() == levels).float().mean() == 1


def test_a_scheduler_that_would_misread_the_schedule_says_so():
    pipe = knowing(random_levels((1, 5, 3), 17), 17, **LOG_SNR)
    with pytest.raises(NotImplementedError, match="log_snr_linear"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_type": "jpg"}, "output_type"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2, "latents": torch.zeros(3, 1, 6, 4)}, "latents"),
        ({"latents": torch.zeros(3, 2, 6, 4)}, r"\(3, 1, H, W\)"),
        ({"latents": torch.zeros(3, 1, 6, 4, dtype=torch.long)}, "floats"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "generator"),
        ({"batch_size": 2, "class_labels": [1, 2, 3]}, "class_labels"),
        ({"class_labels": [0.5]}, "class_labels"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_arguments_that_do_not_fit(kwargs, message):
    pipe = quiet(VDMPipeline(small_unet(num_class_embeds=4), VDMScheduler(**LOG_SNR)))
    with pytest.raises(ValueError, match=message):
        pipe(**kwargs)


def test_more_than_four_channels_are_no_pil_image():
    pipe = quiet(VDMPipeline(small_unet(in_channels=5), VDMScheduler(**LOG_SNR)))
    with pytest.raises(ValueError, match="channels"):
        pipe(num_inference_steps=2)


def test_a_model_without_a_size_needs_latents():
    pipe = quiet(VDMPipeline(small_unet(sample_size=None), VDMScheduler(**LOG_SNR)))
    with pytest.raises(ValueError, match=r"latents.*\(2, 1, H, W\)"):
        pipe(2)
    assert pipe(latents=torch.zeros(2, 1, 3, 7), num_inference_steps=2, output_type="np").images.shape == (2, 3, 7, 1)


def test_a_network_that_has_diverged_is_not_an_image():
    unet = small_unet()
    torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        quiet(VDMPipeline(unet, VDMScheduler(**LOG_SNR)))(num_inference_steps=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_levels": 1}, "num_levels"),
        ({"num_levels": 2**16 + 1}, "num_levels"),
        ({"num_levels": 17.0}, "num_levels"),
        ({"num_levels": True}, "num_levels"),
        ({"pixel_encoding": "centre"}, "bin_center, endpoint"),
        ({"format_version": 2}, "newer vdm-diffusers"),
    ],
)
def test_config_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        VDMPipeline(small_unet(), VDMScheduler(), **config)


def test_a_pipeline_with_more_parts_is_not_adopted():
    pipe = DDIMPipeline(stock_unet(), DDIMScheduler())
    assert VDMPipeline.from_pipeline(pipe).unet is pipe.unet
    pipe.register_modules(vae=stock_unet())
    with pytest.raises(ValueError, match="vae"):
        VDMPipeline.from_pipeline(pipe)


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    unet = small_unet(num_class_embeds=2)
    scheduler = VDMScheduler(**LOG_SNR, log_snr_max=11.0, stochasticity=0.5)
    pipe = quiet(VDMPipeline(unet, scheduler, num_levels=17, pixel_encoding="endpoint"))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index.pop("_diffusers_version")
    assert index == {
        "_class_name": "VDMPipeline",
        "scheduler": ["vdm_diffusers", "VDMScheduler"],
        "unet": ["vdm_diffusers", "VDMUNet2DModel"],
        "num_levels": 17,
        "pixel_encoding": "endpoint",
        "format_version": 1,
    }
    assert not list(tmp_path.rglob("*.py")) and not list(tmp_path.rglob("*.bin"))
    for cls in (VDMPipeline, DiffusionPipeline):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = quiet(cls.from_pretrained(tmp_path))
        assert type(loaded) is VDMPipeline and type(loaded.unet) is VDMUNet2DModel
        assert type(loaded.scheduler) is VDMScheduler and loaded.scheduler.config.log_snr_max == 11.0
        assert_same_samples(loaded, pipe, class_labels=[0, 1])


def test_parts_may_be_replaced_when_loading(tmp_path):
    VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR), num_levels=17).save_pretrained(tmp_path)
    other = VDMScheduler(**LOG_SNR, stochasticity=0.0)
    loaded = VDMPipeline.from_pretrained(tmp_path, scheduler=other, num_levels=33)
    assert loaded.scheduler is other and loaded.config.num_levels == 33
    assert loaded.config.scheduler == ("vdm_diffusers", "VDMScheduler")


def test_pickles_are_neither_written_nor_read(tmp_path):
    pipe = VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR))
    with pytest.raises(ValueError, match="pickle"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pickle"):
        VDMPipeline.from_pretrained(tmp_path, use_safetensors=False)


def test_variants_and_shards(tmp_path):
    pipe = quiet(VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR)))
    pipe.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    VDMPipeline(small_unet().half(), VDMScheduler(**LOG_SNR)).save_pretrained(tmp_path, variant="fp16")
    full = quiet(VDMPipeline.from_pretrained(tmp_path))
    half = VDMPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert (full.unet.dtype, half.unet.dtype) == (torch.float32, torch.float16)
    assert_same_samples(full, pipe)


# --- registration with Diffusers -------------------------------------------------------------------------------------


def test_registration_sets_what_diffusers_looks_for_and_replaces_nothing():
    assert diffusers.pipelines.vdm_diffusers is vdm_diffusers
    for name in ("VDMPipeline", "VDMScheduler", "VDMUNet2DModel"):
        assert getattr(diffusers, name) is getattr(vdm_diffusers, name)
        assert getattr(vdm_diffusers, name).__module__ == "vdm_diffusers"
    theirs = diffusers.DDPMPipeline
    package = type(vdm_diffusers)("vdm_diffusers")
    package.DDPMPipeline = package.VDMPipeline = object()
    register_with_diffusers(package, ["DDPMPipeline", "VDMPipeline"])
    assert diffusers.DDPMPipeline is theirs and diffusers.VDMPipeline is VDMPipeline
    assert diffusers.pipelines.vdm_diffusers is vdm_diffusers


def test_without_registration_the_package_still_loads_its_own_folders(tmp_path, monkeypatch):
    """Should Diffusers look elsewhere one day: local folders need nothing that was set on it."""
    pipe = quiet(VDMPipeline(small_unet(), VDMScheduler(**LOG_SNR), num_levels=17))
    pipe.save_pretrained(tmp_path)
    monkeypatch.delattr(diffusers.pipelines, "vdm_diffusers")
    for name in ("VDMPipeline", "VDMScheduler", "VDMUNet2DModel"):
        monkeypatch.delattr(diffusers, name)
    loaded = quiet(VDMPipeline.from_pretrained(tmp_path))
    assert_same_samples(loaded, pipe)
    assert VDMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.beta_schedule == "log_snr_linear"
