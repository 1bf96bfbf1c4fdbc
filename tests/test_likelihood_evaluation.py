"""`evaluate_likelihood`: what it accepts, what it refuses, and the truth through the public door."""

import math

import PIL.Image
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, FlowMapEulerDiscreteScheduler, UNet2DModel
from exact_models import GaussianMixture
from torch import nn

from vdm_diffusers import VDMPipeline, VDMUNet2DModel
from vdm_diffusers.decoders import encode_pixels
from vdm_diffusers.evaluation import evaluate_likelihood
from vdm_diffusers.schedulers.scheduling_vdm import VDMScheduler


def known_images(count=24, shape=(2, 3, 4), num_levels=256, encoding="bin_center"):
    levels = torch.randint(0, num_levels, (count, *shape), generator=torch.Generator().manual_seed(0))
    return levels, GaussianMixture.points(encode_pixels(levels, num_levels, encoding, torch.float64))


def log_snr_scheduler(**kwargs):
    return VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=13.3, log_snr_min=-5.0, **kwargs)


def evaluate(model, images, **kwargs):
    kwargs.setdefault("generator", torch.Generator().manual_seed(0))
    return evaluate_likelihood(model, images, progress_bar=False, **kwargs)


# --- truth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_known_images_have_log2_n_bits(prediction_type):
    levels, data = known_images()
    s = log_snr_scheduler(prediction_type=prediction_type)
    model = data.as_model(s.log_snr, prediction_type)
    report = evaluate(model, levels, scheduler=s, num_samples=256)
    information, error = data.information(-5.0, 20_000, torch.Generator().manual_seed(1))
    scale = 24 * math.log(2)
    expected = (math.log(24) - information + float((report.prior + report.reconstruction).mean())) / scale
    assert report.method == "continuous" and report.is_bound
    assert abs(report.bits_per_dim - expected) < 4 * math.hypot(report.standard_error, error / scale)
    discrete = evaluate(model, levels, scheduler=s, method="discrete", num_steps=10, num_samples=300)
    assert discrete.bits_per_dim > expected + 4 * discrete.standard_error


def gaussian_kl_to_marginal(x, mean, variance, log_snr):
    """KL(q(z_t | x) || p(z_t)) for p(x) = N(mean, variance I), summed over the dimensions: (B,)."""
    a, s = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))  # alpha^2, sigma^2
    total = a * variance + s
    return (0.5 * (math.log(total / s) - 1 + (a * (x - mean) ** 2 + s) / total)).flatten(1).sum(1)


def test_a_gaussian_is_exact_for_every_image():
    """With the denoiser of p = N(mean, v I) the diffusion term is KL(q(z_0|x) || p(z_0)) - KL(q(z_1|x) || p(z_1))."""
    mean, variance = torch.linspace(-0.3, 0.3, 12, dtype=torch.float64).reshape(1, 3, 4), 0.2**2
    data = GaussianMixture.gaussian(mean, variance)
    x = data.sample(64, torch.Generator().manual_seed(0))
    levels = ((x + 1) / 2 * 256).floor().clamp(0, 255).long()
    s = log_snr_scheduler()
    report = evaluate(data.as_model(s.log_snr), levels, scheduler=s, num_samples=400)
    x = encode_pixels(levels, dtype=torch.float64)
    diffusion = gaussian_kl_to_marginal(x, mean, variance, 13.3) - gaussian_kl_to_marginal(x, mean, variance, -5.0)
    expected = float((report.prior + report.reconstruction + diffusion).mean()) / 12 / math.log(2)
    assert abs(report.bits_per_dim - expected) < 4 * report.standard_error < 0.1
    # every image by itself: 64 images, whose errors are sqrt(64) times that of their mean
    z = (report.diffusion - diffusion) / (report.standard_error * 12 * math.log(2) * 8)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.7)
    assert float(z.abs().max()) < 5


def test_ddpm_chain_of_known_images_and_its_continuous_limit():
    levels, data = known_images(encoding="endpoint")
    stock = DDPMScheduler(clip_sample=False)
    s = VDMScheduler.from_config(stock.config)
    model = data.as_model(s.log_snr)
    kwargs = {"scheduler": stock, "pixel_encoding": "endpoint", "num_samples": 128}
    report = evaluate(model, levels, **kwargs)
    assert report.method == "discrete" and report.settings["num_steps"] == 1000
    continuous = evaluate(model, levels, method="continuous", **kwargs)
    coarse = evaluate(model, levels, method="discrete", num_steps=10, **kwargs)
    assert coarse.bits_per_dim > report.bits_per_dim + 4 * coarse.standard_error
    assert report.bits_per_dim > continuous.bits_per_dim - 4 * math.hypot(
        report.standard_error, continuous.standard_error
    )
    # -ln p + decoder + prior - I(x; z_T), where I(x; z_T) <= prior
    low = (math.log(24) + float(continuous.reconstruction.mean())) / 24 / math.log(2)
    high = low + float(continuous.prior.mean()) / 24 / math.log(2)
    assert low - 4 * continuous.standard_error < continuous.bits_per_dim < high + 4 * continuous.standard_error


# --- pipelines -------------------------------------------------------------------------------------------------------


def stock_unet(**kwargs):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=kwargs.pop("out_channels", 1), block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), **kwargs,
    )  # fmt: skip


def images(count=5, num_levels=256):
    return torch.randint(
        0, num_levels, (count, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )


def vdm_pipeline(num_levels=17, **kwargs):
    torch.manual_seed(0)
    unet = VDMUNet2DModel(
        8, 1, hidden_channels=8, layers_per_block=1, norm_num_groups=4, fourier_exponents=(3,), dropout=0.3, **kwargs
    )
    return VDMPipeline(unet, log_snr_scheduler(), num_levels=num_levels)


def test_stock_pipeline_in_three_lines():
    pipe = DDPMPipeline(stock_unet(), DDPMScheduler())
    report = evaluate(pipe, images())
    assert report.num_model_evaluations == 5 * 16
    assert report.settings["pixel_encoding"] == "endpoint" and report.settings["decoder"] == "discretized_gaussian"
    assert report.nats.shape == report.prior.shape == report.diffusion.shape == report.reconstruction.shape == (5,)
    torch.testing.assert_close(report.nats, report.prior + report.diffusion + report.reconstruction)
    assert report.bits_per_dim == pytest.approx(float(report.nats.mean()) / 64 / math.log(2))
    assert report.sampling_error == pytest.approx(float(report.nats.std()) / 5**0.5 / 64 / math.log(2))
    again = evaluate(DDIMPipeline(pipe.unet, pipe.scheduler), images())
    assert again.bits_per_dim == report.bits_per_dim


def test_vdm_pipeline_by_its_own_config_and_its_modes_restored():
    pipe = vdm_pipeline()
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    before = {name: module.training for name, module in pipe.unet.named_modules()}
    report = evaluate(pipe, images(num_levels=17), num_levels=17)
    assert {name: module.training for name, module in pipe.unet.named_modules()} == before
    assert report.method == "continuous" and report.settings["decoder"] == "softmax"
    assert (report.settings["num_levels"], report.settings["pixel_encoding"]) == (17, "bin_center")
    pipe.unet.eval()
    assert evaluate(pipe, images(num_levels=17)).bits_per_dim == report.bits_per_dim  # dropout was off
    assert not any(parameter.grad_fn for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_to_float32(dtype):
    full = evaluate(vdm_pipeline(), images(num_levels=17))
    pipe = vdm_pipeline()
    pipe.unet.to(dtype)
    half = evaluate(pipe, images(num_levels=17))
    assert half.bits_per_dim == pytest.approx(full.bits_per_dim, rel=0.02)
    assert half.settings["dtype"] == "float32"  # the sample's
    stock = DDPMPipeline(stock_unet().to(dtype), DDPMScheduler())
    assert evaluate(stock, images()).settings["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("as_", ["batches", "generator", "pil", "int64", "dataset"])
def test_forms_of_images_agree(as_):
    k = images(7)
    pil = [PIL.Image.fromarray(image[0].numpy(), mode="L") for image in k]
    if as_ == "dataset":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
        given = datasets.Dataset.from_dict({"label": list(range(7)), "picture": pil}, features=features)
    else:
        given = {"batches": [k[:3], k[3:]], "generator": iter(k.split(2)), "pil": pil, "int64": k.long()}[as_]
    pipe = DDPMPipeline(stock_unet(), DDPMScheduler())
    assert torch.equal(evaluate(pipe, given).nats, evaluate(pipe, k).nats)


def test_class_labels_reach_the_model_with_their_images():
    datasets = pytest.importorskip("datasets")
    pipe = vdm_pipeline(num_levels=256, num_class_embeds=3)
    nn.init.normal_(pipe.unet.conv_out.weight)
    for block in pipe.unet.down_blocks:
        nn.init.normal_(block.time_emb_proj.weight)
        nn.init.normal_(block.conv2.weight)
    labels = torch.tensor([0, 2, 1, 1, 0])
    kwargs = {"batch_size": 7, "variance_reduction": False}  # which keeps images apart
    report = evaluate(pipe, images(), class_labels=labels, **kwargs)
    all_zero = evaluate(pipe, images(), class_labels=0, **kwargs)
    same = torch.isclose(report.nats, all_zero.nats, rtol=1e-5)
    assert same.tolist() == [True, False, False, False, True]
    pil = [PIL.Image.fromarray(image[0].numpy(), mode="L") for image in images()]
    features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"label": labels.tolist(), "image": pil}, features=features)
    assert torch.equal(evaluate(pipe, dataset, class_labels="label", **kwargs).nats, report.nats)


def test_timesteps_and_extra_arguments_as_the_model_was_trained():
    seen = []

    def model(sample, timestep, extra, shared, flag):
        seen.append((sample, timestep, extra, shared, flag))
        return 0 * sample

    kwargs = {"extra": torch.arange(5), "shared": torch.ones(1, 2), "flag": True}
    evaluate(model, images(), scheduler=DDPMScheduler(), model_kwargs=kwargs, num_samples=8, batch_size=16)
    samples, timesteps, extra, shared, flags = zip(*seen, strict=True)
    assert torch.cat(timesteps).dtype == torch.int64 and samples[0].dtype == torch.float32
    assert torch.equal(torch.cat(extra), torch.arange(5).repeat_interleave(8))
    assert all(s.shape == (len(t), 2) for s, t in zip(shared, timesteps, strict=True)) and all(flags)
    assert int((torch.cat(timesteps) == 0).sum()) >= 5 * 2  # the decoder's own, in each of the two replicates
    seen.clear()
    evaluate(model, images(), scheduler=log_snr_scheduler(), model_kwargs=kwargs, num_samples=8)
    tau = torch.cat([s[1] for s in seen])
    assert tau.dtype == torch.float32 and -1 <= float(tau.min()) < float(tau.max()) <= 999


def test_learned_range_network():
    pipe = DDPMPipeline(stock_unet(out_channels=2), DDPMScheduler(variance_type="learned_range"))
    report = evaluate(pipe, images())
    assert report.settings["reverse_variance"] == "learned_range"
    fixed = evaluate(pipe, images(), variance_type="fixed_small", method="continuous")
    assert fixed.settings["num_steps"] is None and math.isfinite(fixed.bits_per_dim)
    with pytest.raises(ValueError, match="cannot be used in continuous time"):
        evaluate(pipe, images(), method="continuous")
    with pytest.raises(ValueError, match="no channels for a variance"):
        evaluate(DDPMPipeline(stock_unet(), pipe.scheduler), images())


# --- refusals --------------------------------------------------------------------------------------------------------


class WithVAE(DDPMPipeline):
    def __init__(self, unet, scheduler, vae):
        super().__init__(unet, scheduler)
        self.register_modules(vae=vae)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: evaluate(p, images().float() / 255), r"integers 0..16, got torch.float32.*\(images \* 16\)"),
        (lambda p: evaluate(p, images()), r"levels in 0..16, got \d+..\d+"),
        (lambda p: evaluate(p, images(num_levels=17), num_levels=256), "the pipeline's own, 17, got 256"),
        (lambda p: evaluate(p, images(num_levels=17)[..., :7]), "size 8x8, got 8x7"),
        (lambda p: evaluate(p, images(num_levels=17).expand(5, 3, 8, 8)), "1 channels, got shape"),
        (lambda p: evaluate(p, images(num_levels=17)[0, 0]), r"shape \(N, C, H, W\)"),
        (lambda p: evaluate(p, []), "holds no image"),
        (lambda p: evaluate(p, 3), "got int"),
        (lambda p: evaluate(p, [PIL.Image.new("L", (8, 8))]), "256 levels, but `num_levels` is 17"),
        (lambda p: evaluate(p, [PIL.Image.new("P", (8, 8))]), "mode 'P'"),
        (lambda p: evaluate(p, images(num_levels=17), method="exact"), "`method` must be"),
        (lambda p: evaluate(p, images(num_levels=17), num_steps=10), "belongs to method='discrete'"),
        (lambda p: evaluate(p, images(num_levels=17), pixel_encoding="middle"), "`pixel_encoding`"),
        (lambda p: evaluate(p, images(num_levels=17), variance_type="big"), "`variance_type`"),
        (lambda p: evaluate(p, images(num_levels=17), num_samples=1), "`num_samples` must be at least 2"),
        (lambda p: evaluate(p, images(num_levels=17), batch_size=0), "`batch_size`"),
        (lambda p: evaluate(p, images(num_levels=17), model_kwargs={"guidance_scale": 2}), "Guidance"),
        (lambda p: evaluate(p, images(num_levels=17), class_labels=[1, 2]), "`class_labels` must be"),
        (lambda p: evaluate(p, images(num_levels=17), class_labels="label"), "no datasets.Dataset"),
        (lambda p: evaluate(p.unet, images()), "`scheduler` is needed"),
        (lambda p: evaluate(3, images(), scheduler=p.scheduler), "must be a pipeline or a callable"),
        (lambda p: evaluate(p.unet, images(), scheduler=FlowMapEulerDiscreteScheduler()), "Keep FlowMap"),
        (lambda p: evaluate(p.unet, images(), scheduler=log_snr_scheduler(stochasticity=0.0)), "no finite ELBO"),
        (lambda p: evaluate(p.unet, images(), scheduler=DDPMScheduler(), num_steps=1001), "2..1000"),
        (lambda p: evaluate(p.unet, images(), scheduler=DDPMScheduler(), num_samples=3), "at least 4"),
        (lambda p: evaluate(WithVAE(p.unet, p.scheduler, nn.Linear(1, 1)), images()), "a model of latents"),
        (
            lambda p: evaluate(
                p.unet,
                images(),
                scheduler=VDMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
                method="continuous",
            ),
            "zero terminal SNR",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(vdm_pipeline())


def test_zero_terminal_snr_has_a_discrete_bound():
    pipe = DDPMPipeline(stock_unet(), DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    report = evaluate(pipe, images(), num_samples=64)
    assert report.nats.isfinite().all() and float(report.prior.abs().max()) < 1e-12
    with pytest.raises(ValueError, match="does not determine"):
        evaluate(DDPMPipeline(pipe.unet, DDPMScheduler(rescale_betas_zero_snr=True)), images(), num_samples=1000)


@pytest.mark.parametrize("shape", [(30,), (2, 40), (2, 3, 4, 5), (600,)])
def test_data_of_every_shape_has_its_density(shape):
    """Vectors, audio, volumes: the exact denoiser's bound of continuous data is their -ln p."""
    generator = torch.Generator().manual_seed(0)
    means = 0.2 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    data = GaussianMixture(means, torch.full((3,), 0.1).double(), torch.full((3,), 1 / 3).double())
    x, s = data.sample(40, generator), log_snr_scheduler()
    report = evaluate(data.as_model(s.log_snr), x.float(), scheduler=s, num_levels=None, num_samples=32)
    truth = float(data.nats(x).mean()) / data.num_dims
    # the decoder's own noise at log SNR 13.3 is the rest
    assert abs(report.nats_per_dim - truth) < 4 * report.standard_error * math.log(2) + 0.005


def test_integer_vectors_and_volumes():
    s = log_snr_scheduler()
    for shape in ((50, 20), (20, 1, 2, 3, 4)):
        levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
        data = GaussianMixture.points(encode_pixels(levels, 256, "bin_center", torch.float64))
        report = evaluate(data.as_model(s.log_snr), levels, scheduler=s, num_samples=64)
        # -ln p of N known points is ln N; the prior and the decoder add little
        assert report.bits_per_dim * report.num_dims == pytest.approx(math.log2(len(levels)), abs=1.5)
