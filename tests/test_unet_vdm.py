"""The VDM network: its shapes, its exact start, its precision, and what Diffusers and PyTorch do to a model."""

import itertools
import math

import mpmath
import pytest
import torch
from diffusers import ModelMixin, UNet2DModel

from vdm_diffusers.models import FourierFeatures, FourierFeaturesUNet, VDMUNet2DModel

SMALL = {
    "in_channels": 3,
    "hidden_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "fourier_exponents": (1, 2.5),
    "dropout": 0.0,
}
SHAPE = (2, 3, 7, 5)


def make(randomise=True, **overrides):
    """A small model; `randomise` replaces the zeros at which some layers start, so that every layer matters."""
    torch.manual_seed(0)
    model = VDMUNet2DModel(**{**SMALL, **overrides}).eval()
    if randomise:
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def sample():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


class TestFourierFeatures:
    def test_against_mpmath(self):
        # Large values too: the phase is reduced exactly before it is multiplied by pi.
        z = torch.tensor([-4.7, -1.0, -0.3333, 0.0, 1e-3, 0.7071, 5.3], dtype=torch.float32)
        for n in (0, 3, 8, 12):
            features = FourierFeatures((n,))(z.reshape(1, 1, 1, -1))[0, :, 0]
            with mpmath.workdps(40):
                phases = [mpmath.mpf(2) ** n * mpmath.pi * mpmath.mpf(v) for v in z.tolist()]
                sines = torch.tensor([float(mpmath.sin(p)) for p in phases])
                cosines = torch.tensor([float(mpmath.cos(p)) for p in phases])
            assert torch.equal(features[0], z)
            # pi and the product are rounded once each, at a phase below 2 pi: a few units of 2^-22.
            torch.testing.assert_close(features[1], sines, rtol=0, atol=1e-6)
            torch.testing.assert_close(features[2], cosines, rtol=0, atol=1e-6)

    def test_order_of_channels(self):
        z = torch.tensor([0.25, -0.5]).reshape(1, 2, 1, 1)
        features = FourierFeatures((0, 1))(z).flatten()
        phases = math.pi * torch.tensor([0.25, -0.5, 0.5, -1.0])
        expected = torch.cat([torch.tensor([0.25, -0.5]), phases.sin(), phases.cos()])
        torch.testing.assert_close(features, expected)

    def test_gradient(self):
        z = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert torch.autograd.gradcheck(FourierFeatures((1, 0.5)), z)

    def test_none(self, sample):
        assert torch.equal(FourierFeatures(())(sample), sample)

    @pytest.mark.parametrize("exponents", [(7, math.nan), ("7",), (True,)])
    def test_refuses(self, exponents):
        with pytest.raises(ValueError, match="exponents"):
            FourierFeatures(exponents)


def test_new_network_returns_its_input(sample):
    assert torch.equal(make(randomise=False)(sample, 3.5).sample, sample)
    assert torch.equal(make(randomise=False, residual_connection=False)(sample, 3.5).sample, torch.zeros(SHAPE))


@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 5), (1, 1, 1, 1), (3, 4, 2, 11)], ids=lambda shape: "x".join(map(str, shape))
)
def test_shapes(shape):
    output = make(in_channels=shape[1])(torch.randn(shape), torch.rand(shape[0]) * 999)
    assert output.sample.shape == shape
    assert torch.isfinite(output.sample).all()


def test_residual_connection_is_added_to_the_prediction_only(sample):
    wide = make(out_channels=6)
    plain = make(out_channels=6, residual_connection=False)
    difference = wide(sample, 7).sample - plain(sample, 7).sample
    assert difference.shape == (2, 6, 7, 5)
    torch.testing.assert_close(difference[:, :3], sample, atol=1e-6, rtol=0)
    assert torch.equal(difference[:, 3:], torch.zeros(SHAPE))


def test_return_tuple(sample):
    model = make()
    (output,) = model(sample, 5, return_dict=False)
    assert torch.equal(output, model(sample, 5).sample)


def test_timestep_forms(sample):
    model = make()
    reference = model(sample, torch.tensor([12.0, 12.0])).sample
    for timestep in (12, 12.0, torch.tensor(12), torch.tensor(12.0, dtype=torch.float64), torch.tensor([12])):
        assert torch.equal(model(sample, timestep).sample, reference)
    mixed = model(sample, torch.tensor([12.0, 700.25])).sample
    torch.testing.assert_close(mixed[0], reference[0])
    torch.testing.assert_close(mixed[1], model(sample, 700.25).sample[1])
    assert not torch.allclose(mixed[1], reference[1])
    assert not torch.allclose(model(sample, 700.25).sample, model(sample, 700.75).sample, atol=1e-5)


def test_timestep_is_relative_to_num_train_timesteps(sample):
    long, short = make(), make(num_train_timesteps=10)
    for position in (0.0, 0.25, 1.0):  # (tau + 1) / T
        torch.testing.assert_close(
            long(sample, 1000 * position - 1).sample, short(sample, 10 * position - 1).sample, rtol=1e-4, atol=1e-5
        )


def test_every_pixel_sees_every_other_through_attention():
    # Two down, two middle, three up blocks of two 3x3 convolutions and two single ones reach 16 pixels: 20 is too far.
    sample = torch.randn(1, 3, 1, 21, requires_grad=True)
    for add_attention in (True, False):
        # Group normalisation sees all pixels, too: take it out.
        model = make(add_attention=add_attention)
        for module in list(model.modules()):
            for child_name, child in list(module.named_children()):
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, child_name, torch.nn.Identity())
        (gradient,) = torch.autograd.grad(model(sample, 5).sample[..., -1].sum(), sample)
        assert bool(gradient[..., 0].abs().max() > 0) is add_attention


def test_class_labels(sample):
    model = make(num_class_embeds=4)
    labels = torch.tensor([0, 3])
    output = model(sample, 5, class_labels=labels).sample
    torch.testing.assert_close(output[1], model(sample, 5, class_labels=torch.tensor([3, 3])).sample[1])
    outputs = [model(sample, 5, class_labels=torch.full((2,), k)).sample for k in range(5)]  # 4 is "no class"
    for a, b in itertools.combinations(outputs, 2):
        assert not torch.allclose(a, b, atol=1e-4)
    with pytest.raises(IndexError):
        model(sample, 5, class_labels=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"`class_labels` must have shape \(2,\).*got None.*pass 4"):
        model(sample, 5)
    with pytest.raises(ValueError, match="`class_labels` must have shape"):
        model(sample, 5, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="without classes"):
        make()(sample, 5, class_labels=labels)


def test_save_and_load(sample, tmp_path):
    model = make(num_class_embeds=4, sample_size=(7, 5), dropout=0.3)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = VDMUNet2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    labels = torch.tensor([0, 4])
    assert torch.equal(loaded(sample, 5.5, labels).sample, model(sample, 5.5, labels).sample)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }


def test_public_module_and_base():
    # What a checkpoint records, and what Diffusers' loaders accept.
    assert VDMUNet2DModel.__module__ == "vdm_diffusers"
    assert issubclass(VDMUNet2DModel, ModelMixin)


def gradients(model, sample, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    model(sample, torch.tensor([3.0, 500.5])).sample.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing(sample):
    model = make(dropout=0.2).train()
    plain = gradients(model, sample)
    calls = []
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, sample)
    assert len(calls) == 2 * (2 + 1 + 3)  # forward, and once more on the way back
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    model.disable_gradient_checkpointing()
    calls.clear()
    gradients(model, sample)
    assert len(calls) == 2 + 1 + 3


def test_every_parameter_is_trained(sample):
    assert all(gradient.abs().max() > 0 for gradient in gradients(make(), sample).values())


def test_dropout_only_in_training(sample):
    model = make(dropout=0.5)
    assert torch.equal(model(sample, 5).sample, model(sample, 5).sample)
    model.train()
    assert not torch.equal(model(sample, 5).sample, model(sample, 5).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_features_in_float32(sample, dtype):
    model = make(fourier_exponents=(7, 8))
    seen = []
    model.fourier_features.register_forward_hook(lambda module, args, output: seen.append(output))
    model.conv_in.register_forward_hook(lambda module, args, output: seen.append(output))
    reference = model(sample, 5).sample
    exact = seen[0]
    seen.clear()
    with torch.autocast("cpu", dtype):
        output = model(sample, 5).sample
    features, hidden = seen
    assert features.dtype == torch.float32
    assert torch.equal(features, exact)
    assert hidden.dtype == dtype  # autocast was really on
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, reference, atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(sample, dtype):
    model = make(num_class_embeds=3)
    labels = torch.tensor([1, 2])
    reference = model(sample, 5.5, labels).sample
    model = model.to(dtype)
    output = model(sample, 5.5, labels).sample
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, reference, atol=0.1, rtol=0)
    assert model(sample.to(dtype), 5.5, labels).sample.dtype == dtype
    # `+ z` is not rounded to the weights' dtype.
    new = make(randomise=False).to(dtype)
    assert torch.equal(new(sample, 5).sample, sample)


def test_float64(sample):
    model = make()
    reference = model(sample, 5).sample
    output = model.double()(sample.double(), 5).sample
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), reference, atol=1e-4, rtol=1e-4)


def test_layerwise_casting(sample):
    model = make()
    reference = model(sample, 5).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.conv_in.weight.dtype == torch.float8_e4m3fn
    output = model(sample, 5).sample
    assert output.dtype == torch.float32
    # float8 has 3 bits of mantissa: 3% per weight.
    assert (output - reference).norm() < 0.2 * (reference - sample).norm()


def test_channels_last(sample):
    model = make()
    reference = model(sample, 5).sample
    model = model.to(memory_format=torch.channels_last)
    output = model(sample.contiguous(memory_format=torch.channels_last), 5).sample
    torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-4)


def test_compile_without_graph_breaks(sample):
    model = make(num_class_embeds=3)
    labels = torch.tensor([1, 3])
    timestep = torch.tensor([3.25, 700.0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(sample, timestep, labels).sample, model(sample, timestep, labels).sample)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            compiled(sample, timestep, labels).sample, model(sample, timestep, labels).sample, atol=0.05, rtol=0
        )


def test_paper_size_is_the_default():
    with torch.device("meta"):
        model = VDMUNet2DModel(sample_size=32)
    assert len(model.down_blocks) == 32
    assert len(model.up_blocks) == 33
    assert model.config.hidden_channels == 128
    assert model.config.dropout == 0.1
    assert model.conv_in.in_channels == 3 * (1 + 2 * 2)
    assert len(model.mid_block.attentions) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"in_channels": 0}, "`in_channels` must be at least 1, got 0"),
        ({"layers_per_block": 0}, "`layers_per_block` must be at least 1, got 0"),
        ({"num_class_embeds": 0}, "`num_class_embeds` must be at least 1, got 0"),
        ({"norm_num_groups": 5}, "`norm_num_groups` must divide `hidden_channels`, got 5 and 16"),
        ({"attention_head_dim": 12}, "`attention_head_dim` must divide `hidden_channels`, got 12 and 16"),
        ({"hidden_channels": 2, "norm_num_groups": 1, "attention_head_dim": 1}, "at least 4"),
        ({"out_channels": 2}, "`out_channels` must be at least `in_channels`"),
    ],
)
def test_refuses_config(overrides, message):
    with pytest.raises(ValueError, match=message):
        VDMUNet2DModel(**{**SMALL, **overrides})


@pytest.mark.parametrize(
    ("shape", "timestep", "message"),
    [
        ((2, 1, 7, 5), 5, r"`sample` must have shape \(B, 3, H, W\).*got \(2, 1, 7, 5\)"),
        ((3, 7, 5), 5, r"`sample` must have shape"),
        ((2, 3, 7, 5), torch.tensor([1.0, 2.0, 3.0]), r"`timestep` must be a number or have shape.*got \(3,\)"),
        ((2, 3, 7, 5), torch.tensor([[1.0], [2.0]]), r"`timestep` must be a number or have shape.*got \(2, 1\)"),
    ],
)
def test_refuses_input(shape, timestep, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(shape), timestep)


UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "num_class_embeds": 3,
}


class TestFourierFeaturesUNet:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return FourierFeaturesUNet(UNET, sample_size=(8, 4), fourier_exponents=(1, 2)).eval()

    @pytest.fixture
    def sample(self):
        return torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(1))

    labels = torch.tensor([0, 2])

    def test_is_the_unet_of_the_features_plus_the_sample(self, model, sample):
        assert isinstance(model.unet, UNet2DModel)
        features = torch.cat([sample, *((f * math.pi * sample).sin() for f in (2, 4))], dim=1)
        features = torch.cat([features, *((f * math.pi * sample).cos() for f in (2, 4))], dim=1)
        expected = model.unet(features, 5.5, self.labels).sample + sample
        torch.testing.assert_close(model(sample, 5.5, self.labels).sample, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(
            model(sample, 5.5, self.labels, return_dict=False)[0], model(sample, 5.5, self.labels).sample
        )

    def test_save_and_load(self, model, sample, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = FourierFeaturesUNet.from_pretrained(tmp_path)
        assert loaded.__module__ == "vdm_diffusers"
        assert (loaded.config.in_channels, tuple(loaded.config.sample_size)) == (3, (8, 4))
        assert torch.equal(loaded(sample, 5, self.labels).sample, model(sample, 5, self.labels).sample)

    def test_half_precision(self, model, sample):
        reference = model(sample, 5, self.labels).sample
        seen = []
        model.fourier_features.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(sample, 5, self.labels).sample, reference, atol=0.1, rtol=0)
        output = model.to(torch.bfloat16)(sample, 5, self.labels).sample
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, reference, atol=0.1, rtol=0)
        assert seen == [torch.float32, torch.float32]

    def test_gradient_checkpointing(self, model, sample):
        results = []
        for enable in (False, True):
            if enable:
                model.enable_gradient_checkpointing()
            model.zero_grad()
            model.train()(sample, 5, self.labels).sample.square().sum().backward()
            results.append([parameter.grad for parameter in model.parameters()])
        assert model.is_gradient_checkpointing
        for plain, checkpointed in zip(*results, strict=True):
            torch.testing.assert_close(plain, checkpointed)

    def test_refuses(self, model):
        with pytest.raises(ValueError, match=r"`unet_config` must not set \['in_channels'\]"):
            FourierFeaturesUNet({**UNET, "in_channels": 3})
        with pytest.raises(ValueError, match="`out_channels` must be at least"):
            FourierFeaturesUNet(UNET, out_channels=1)
        with pytest.raises(ValueError, match="`sample` must have shape"):
            model(torch.zeros(2, 1, 8, 4), 5, self.labels)
