"""Text-to-image and class-to-image pipelines of Diffusers: likelihoods of latents, prompts, classes; what is
refused.
"""

import string

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vdm_diffusers import VDMPipeline, VDMUNet2DModel, classify, compare_likelihood, evaluate_likelihood
from vdm_diffusers.evaluation.latent_space import in_latent_space
from vdm_diffusers.schedulers import VDMScheduler

IMAGES = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
QUIET = {"generator": 0, "progress_bar": False, "num_samples": 4}


def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


@pytest.fixture(scope="module")
def text_pipe():
    """Stable Diffusion with random weights and a tokenizer of letters."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vocab = {c: i for i, c in enumerate([*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=len(vocab) - 1, bos_token_id=len(vocab) - 2, pad_token_id=len(vocab) - 1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def class_pipe():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=5,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    torch.nn.init.normal_(transformer.proj_out_1.weight, std=0.1)
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    return DiTPipeline(transformer, autoencoder(), DDIMScheduler(clip_sample=False))


def test_a_prompts_figure_is_that_of_the_network_called_by_hand(text_pipe):
    report = evaluate_likelihood(text_pipe, IMAGES, prompts="a cat", space="latent", **QUIET)
    with torch.no_grad():
        latents = text_pipe.vae.encode(IMAGES.float() / 127.5 - 1).latent_dist.mode() * 0.5
        told, _ = text_pipe.encode_prompt("a cat", "cpu", 1, False)

    def network(sample, timestep):
        return text_pipe.unet(sample, timestep, encoder_hidden_states=told.expand(len(sample), -1, -1)).sample

    by_hand = evaluate_likelihood(network, latents, scheduler=text_pipe.scheduler, num_levels=None, **QUIET)
    torch.testing.assert_close(report.nats, by_hand.nats, rtol=1e-5, atol=1e-3)
    assert report.settings["space"] == "latent" and report.num_dims == 4 * 8 * 8 and "nats/dim" in str(report)


def test_prompts_belong_to_their_images(text_pipe):
    prompts = ["a cat", "the sea", "a cat", "a dog"]
    together = evaluate_likelihood(
        text_pipe, IMAGES, prompts=prompts, space="latent", variance_reduction=False, **QUIET
    )
    same = evaluate_likelihood(text_pipe, IMAGES, prompts="a cat", space="latent", variance_reduction=False, **QUIET)
    is_cat = torch.tensor([p == "a cat" for p in prompts])
    torch.testing.assert_close(together.nats[is_cat], same.nats[is_cat], rtol=1e-6, atol=1e-3)
    assert bool((together.nats[~is_cat] - same.nats[~is_cat]).abs().min() > 1e-4)
    assert isinstance(text_pipe.scheduler, DDIMScheduler)  # the pipeline is left as it was


def test_which_of_two_prompts_fits_better(text_pipe):
    options = {"a_options": {"prompts": "a cat"}, "b_options": {"prompts": "the sea"}, "space": "latent"}
    report = compare_likelihood(text_pipe, text_pipe, IMAGES, **options, **QUIET)
    assert report.is_paired and report.difference != 0
    same = compare_likelihood(text_pipe, text_pipe, IMAGES, prompts="a cat", space="latent", **QUIET)
    assert same.difference == 0


def test_an_image_among_prompts_and_among_classes(text_pipe, class_pipe):
    report = classify(text_pipe, IMAGES, prompts=["a cat", "the sea", "a dog"], space="latent", **QUIET)
    assert report.probabilities.shape == (4, 3) and set(report.predictions) <= {"a cat", "the sea", "a dog"}
    pair = compare_likelihood(
        text_pipe, text_pipe, IMAGES, a_options={"prompts": "a cat"}, b_options={"prompts": "the sea"}, space="latent",
        generator=0, progress_bar=False, num_samples=64,
    )  # fmt: skip
    long = classify(
        text_pipe, IMAGES, prompts=["a cat", "the sea"], space="latent", generator=0, progress_bar=False, num_samples=64,
        drop_unlikely=False,
    )  # fmt: skip
    odds = (long.log_odds[:, 0] - long.log_odds[:, 1]).mean()
    error = long.log_odds_error.max(1).values.square().mean().sqrt() / 2
    expected, its_error = -pair.nats.mean(), pair.standard_error * pair.num_dims * 0.6931
    assert abs(float(odds - expected)) < 4 * float((error**2 + its_error**2) ** 0.5)
    by_class = classify(class_pipe, IMAGES, [0, 3], space="latent", **QUIET)
    assert by_class.classes == [0, 3]


def test_a_class_to_image_pipeline(class_pipe):
    labels = [0, 1, 2, 3]
    report = evaluate_likelihood(class_pipe, IMAGES, class_labels=labels, space="latent", **QUIET)
    assert bool(report.nats.isfinite().all())
    task = in_latent_space(class_pipe, IMAGES, class_labels=labels)
    assert task.kept["class_labels"].tolist() == labels and task.latents.shape == (4, 4, 8, 8)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "pass space='latent'"),
        ({"prompts": "a cat"}, "pass space='latent'"),
        ({"space": "latents"}, "`space` must be"),
        ({"space": "latent", "prompts": ["a", "b"]}, "one for each of the 4 images, got 2"),
        ({"space": "latent", "class_labels": 1}, "takes none"),
        ({"space": "latent", "model_kwargs": {"a": 1}}, "mean nothing to a pipeline"),
    ],
)
def test_what_cannot_be_is_one_sentence(text_pipe, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        evaluate_likelihood(text_pipe, IMAGES, **options, **QUIET)


def test_other_models_and_sizes_are_refused(class_pipe, text_pipe):
    unet = VDMUNet2DModel(in_channels=1, hidden_channels=8, layers_per_block=1, norm_num_groups=4)
    pixels = VDMPipeline(unet, VDMScheduler(beta_schedule="log_snr_linear"))
    for options in ({"prompts": "a"}, {"space": "latent"}):
        with pytest.raises(ValueError, match="no pipeline of latents or prompts"):
            evaluate_likelihood(pixels, IMAGES[:, :1], **options, **QUIET)
    with pytest.raises(ValueError, match="`class_labels` are needed"):
        evaluate_likelihood(class_pipe, IMAGES, space="latent", **QUIET)
    with pytest.raises(ValueError, match="images of another size"):
        evaluate_likelihood(class_pipe, IMAGES[..., :8, :8], space="latent", class_labels=0, **QUIET)
    with pytest.raises(ValueError, match="no text encoder"):
        bare = StableDiffusionPipeline(**{**text_pipe.components, "text_encoder": None, "image_encoder": None})
        evaluate_likelihood(bare, IMAGES, space="latent", prompts="a", **QUIET)
    with pytest.raises(ValueError, match="two or more different"):
        classify(text_pipe, IMAGES, prompts=["a"], space="latent", **QUIET)
