"""evaluate.py: the figures of a checkpoint, in a table, JSON and pictures; and what it shares with train.py."""

import json
import math
import re

import datasets
import evaluate
import pyarrow.parquet
import pytest
import torch
from arguments import DataArguments
from data import ImageSet, load_split
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from evaluating import bits_per_dim, combined_error, draw_samples, histogram_bits_per_dim, loss_by_log_snr
from PIL import Image

from vdm_diffusers import (
    HierarchicalVAE,
    LatentVDMPipeline,
    VariationalAutoencoder,
    VDMPipeline,
    VDMScheduler,
    VDMUNet2DModel,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that knows a little of digits: eps_hat = z is already right where noise is all."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "fourier_exponents": [2, 3]}
    network = VDMUNet2DModel(sample_size=8, in_channels=1, **sizes)
    torch.nn.init.normal_(network.conv_out.weight, std=0.01)
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=9.0, log_snr_min=-5.0)
    folder = tmp_path_factory.mktemp("model") / "digits"
    VDMPipeline(network, scheduler, num_levels=17).save_pretrained(folder)
    return folder


def test_everything_is_written_and_the_last_line_is_the_figure(checkpoint, tmp_path, capsys):
    argv = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path), "--num_samples", "4"]
    assert evaluate.main([*argv, "--num_inference_steps", "4", "--num_sample_images", "4"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    shown = re.fullmatch(r"held-out bits/dim: (\d+\.\d{3}) \+- (\d\.\d{3})", lines[-1])
    assert "split test: 297 images" in lines[0]  # the digits' default for a final figure
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert float(shown[1]) == pytest.approx(result["bits_per_dim"], abs=5.1e-4)
    assert float(shown[2]) == pytest.approx(math.hypot(result["standard_error"], result["sampling_error"]), abs=5.1e-4)
    terms = [result[name] for name in ("prior", "diffusion", "reconstruction")]
    assert sum(terms) == pytest.approx(result["bits_per_dim"], abs=1e-9)
    assert result["num_images"] == 297
    assert result["num_model_evaluations"] == 4 * 297
    assert result["histogram_bits_per_dim"] == pytest.approx(2.423, abs=1e-3)
    assert any("2.423" in line for line in lines)
    # no weights at all: to know the levels adds to the covariance
    analytic = {name: one["bits_per_dim"] for name, one in result["analytic_bits_per_dim"].items()}
    assert analytic["wiener_and_levels"] < analytic["wiener"] - 0.1 and analytic["wiener_and_levels"] < 3
    assert any(line.startswith("for comparison: Wiener's filter") for line in lines)
    # the area under the curve is the diffusion term, found another way
    area = result["diffusion_by_integral"]
    errors = [point["standard_error"] for point in result["loss_by_log_snr"]]
    width = 14 / len(errors)
    spread = math.sqrt(sum((error * width) ** 2 for error in errors) + result["standard_error"] ** 2)
    assert abs(area - result["diffusion"]) < 5 * spread + 0.01 * area
    for name in ("loss_by_log_snr.png", "samples.png", "overview.png"):
        assert (tmp_path / name).stat().st_size > 500


def test_against_another_model_the_difference_has_a_small_error(checkpoint, tmp_path, capsys):
    argv = ["--checkpoint", str(checkpoint), "--max_images", "40", "--num_sample_images", "0", "--baseline", "false"]
    argv += ["--output_dir", str(tmp_path)]
    assert evaluate.main([*argv, "--against", "model_cards/digits-elbo"]) == 0
    assert "less that of model_cards/digits-elbo: +" in capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["against"]["difference"] > 0.5 and result["against"]["checkpoint"] == "model_cards/digits-elbo"
    assert evaluate.main([*argv, "--against", str(checkpoint)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["against"]["difference"] == 0
    assert evaluate.main([*argv, "--against", str(tmp_path / "nothing")]) == 2


def test_the_bound_of_chains_is_that_of_ancestral_sampling(checkpoint, tmp_path, capsys):
    """A sampler with more noise than ancestral sampling has the same network, and its chain's bound is the ancestral
    one.
    """
    pipeline = VDMPipeline.from_pretrained(checkpoint)
    noisier = VDMScheduler.from_config(pipeline.scheduler.config, stochasticity=1.5)
    VDMPipeline(pipeline.unet, noisier, num_levels=17).save_pretrained(tmp_path / "noisier")
    curves, options = (
        [],
        ["--max_images", "12", "--num_samples", "4", "--num_sample_images", "0", "--baseline", "false"],
    )
    for folder in (checkpoint, tmp_path / "noisier"):
        argv = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / f"of-{folder.name}"), *options]
        assert evaluate.main([*argv, "--steps_curve", "40, 5"]) == 0
        shown = capsys.readouterr().out
        assert ("samples are drawn with stochasticity 1.5" in shown) == (folder.name == "noisier")
        result = json.loads((tmp_path / f"of-{folder.name}" / "evaluation.json").read_text())
        curves.append(result["steps_curve"])
        assert (tmp_path / f"of-{folder.name}" / "steps.png").stat().st_size > 500
    assert curves[0] == curves[1] and [row["num_steps"] for row in curves[0]] == [5, 40]
    argv = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "refused"), *options]
    assert evaluate.main([*argv, "--steps_curve", "10;25"]) == 2
    assert "--steps_curve takes numbers of steps" in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_a_damaged_or_absent_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    empty = tmp_path / "run"
    (empty / "checkpoint-5").mkdir(parents=True)
    assert evaluate.main(["--checkpoint", str(empty)]) == 2
    assert "checkpoints in it: checkpoint-5" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(checkpoint), "--num_smples", "4"])
    assert stopped.value.code == 2
    assert "Did you mean --num_samples?" in capsys.readouterr().err
    (empty / "checkpoint-5" / "manifest.json").write_text(
        '{"files": {"model_index.json": {"size": 1, "blake2b": ""}}}'
    )
    assert evaluate.main(["--checkpoint", str(empty / "checkpoint-5")]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A folder with 24 random 8x8 pictures in colour, split train and test."""
    folder = tmp_path_factory.mktemp("colour")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("test", 8)):
        pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        pictures = {"image": [Image.fromarray(p) for p in pixels]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(pictures, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_model_of_other_images_is_refused(checkpoint, colour, tmp_path, capsys):
    argv = ["--checkpoint", str(checkpoint), "--dataset_name", str(colour), "--cache_dir", str(tmp_path)]
    assert evaluate.main(argv) == 2
    assert "the model is of images of 1 channel(s), 8x8; these have 3, 8x8" in capsys.readouterr().err


def test_a_pipeline_of_diffusers_is_evaluated_with_its_own_chain(colour, tmp_path, capsys):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, norm_num_groups=4, layers_per_block=1, **blocks
    )
    DDPMPipeline(network, DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "ddpm")
    argv = [
        "--checkpoint",
        str(tmp_path / "ddpm"),
        "--dataset_name",
        str(colour),
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    assert evaluate.main([*argv, "--num_sample_images", "2", "--num_inference_steps", "3", "--num_samples", "4"]) == 0
    result = json.loads((tmp_path / "ddpm" / "evaluation" / "evaluation.json").read_text())
    assert (result["split"], result["method"], result["pixel_encoding"]) == ("test", "discrete", "endpoint")
    assert result["num_images"] == 8
    capsys.readouterr()


def test_processes_together_evaluate_every_image_once(checkpoint, monkeypatch):
    pipeline = VDMPipeline.from_pretrained(checkpoint)
    images = load_split(DataArguments(), "test", seed=0).first(25)
    options = {"seed": 0, "num_samples": 4, "batch_size": 10}
    shares = []
    monkeypatch.setattr("evaluating.gather_object", lambda parts: shares.extend(parts) or parts)
    for index in range(3):
        bits_per_dim(pipeline, images, **options, process_index=index, num_processes=3)
    assert sorted(len(share["nats"]) for share in shares) == [8, 8, 9]
    monkeypatch.setattr("evaluating.gather_object", lambda parts: shares)
    together = bits_per_dim(pipeline, images, **options, process_index=0, num_processes=3)
    alone = bits_per_dim(pipeline, images, **options)
    assert together["num_images"] == alone["num_images"] == 25
    assert together["num_model_evaluations"] == alone["num_model_evaluations"]
    error = combined_error([together["standard_error"], alone["standard_error"]])
    assert abs(together["bits_per_dim"] - alone["bits_per_dim"]) < 6 * error
    assert together["prior"] == pytest.approx(alone["prior"])


def test_loss_by_log_snr_of_a_network_that_answers_with_its_input(checkpoint):
    pipeline = VDMPipeline.from_pretrained(checkpoint)
    images = load_split(DataArguments(), "test", seed=0).first(40)
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)  # eps_hat = z
    points = loss_by_log_snr(pipeline, images, seed=0, num_points=7)
    power = float(((2 * (images.images.double() + 0.5) / 17 - 1) ** 2).mean())
    for point in points:
        alpha2 = 1 / (1 + math.exp(-point["log_snr"]))
        want = alpha2 * power + (1 - math.sqrt(1 - alpha2)) ** 2  # E|eps - z|^2 = alpha^2 E x^2 + (1 - sigma)^2
        assert abs(point["mse"] - want) < 5 * 2 * math.log(2) * point["standard_error"]
        assert point["bits_per_dim_per_log_snr"] == pytest.approx(point["mse"] / (2 * math.log(2)))


def test_the_histogram_baseline_on_counted_images():
    def image_set(values):
        return ImageSet(torch.tensor(values, dtype=torch.uint8)[:, None, None], None, 4, None, "", "")

    train = image_set([[0, 3], [0, 3], [1, 3]])  # one count added to each of four levels
    test = image_set([[0, 3], [2, 0]])
    want = -(math.log2(3 / 7) + math.log2(4 / 7) + math.log2(1 / 7) + math.log2(1 / 7)) / 4
    assert histogram_bits_per_dim(train, test) == pytest.approx(want)


def test_samples_are_levels_and_the_same_for_the_same_seed(checkpoint):
    pipeline = VDMPipeline.from_pretrained(checkpoint)
    options = {"num_inference_steps": 3, "batch_size": 4, "num_classes": None}
    first, again, other = (draw_samples(pipeline, 6, seed=seed, **options) for seed in (0, 0, 1))
    assert first.shape == (6, 1, 8, 8)
    assert 0 <= int(first.min()) <= int(first.max()) < 17
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def latent_model(kind):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_levels": 17, "latent_channels": 2}
    if kind == "HierarchicalVAE":
        return HierarchicalVAE(8, 1, 2, **sizes)
    vae = VariationalAutoencoder(8, 1, **sizes)
    if kind == "VariationalAutoencoder":
        return vae
    sizes = {"hidden_channels": 8, "layers_per_block": 1, "norm_num_groups": 4, "fourier_exponents": ()}
    unet = VDMUNet2DModel(sample_size=4, in_channels=2, **sizes)
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=8.0, log_snr_min=-5.0)
    return LatentVDMPipeline(vae, unet, scheduler)


@pytest.mark.parametrize("kind", ["VariationalAutoencoder", "HierarchicalVAE", "LatentVDMPipeline"])
def test_models_with_an_encoder_get_the_same_report(kind, tmp_path, capsys):
    model = latent_model(kind)
    model.save_pretrained(tmp_path / "model")
    argv = [
        "--checkpoint",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "out",
        "--num_samples",
        4,
        "--max_images",
        20,
    ]
    argv = [str(part) for part in [*argv, "--num_inference_steps", 3, "--num_sample_images", 4]]
    assert evaluate.main(argv) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("held-out bits/dim: ")
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    images = load_split(DataArguments(), "test", 0).first(20).images.long()
    with torch.no_grad():
        bounds = torch.stack(
            [model.bound(images, generator=torch.Generator().manual_seed(100 + i)).nats for i in range(64)]
        )
    bits = bounds.double() / (64 * math.log(2))
    error = math.hypot(float(bits.mean(1).std()) / 8, result["standard_error"])
    assert abs(result["bits_per_dim"] - float(bits.mean())) < 5 * error
    assert sum(result[term] for term in ("prior", "diffusion", "reconstruction")) == pytest.approx(
        result["bits_per_dim"]
    )
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "per_image.parquet").to_pydict()
    assert sum(rows["bits_per_dim"]) / 20 == pytest.approx(result["bits_per_dim"])
    if kind != "LatentVDMPipeline":
        assert result["importance_weighted"]["bits_per_dim"] < result["bits_per_dim"]
    assert "bits/dim" in (tmp_path / "out" / "model_card_block.md").read_text()
    for name in ("reconstructions.png", "samples.png", "terms.png", "most_and_least_likely.png"):
        assert (tmp_path / "out" / name).stat().st_size > 300


def test_what_only_diffusion_models_have_is_refused_for_others(tmp_path, capsys):
    latent_model("VariationalAutoencoder").save_pretrained(tmp_path)
    assert evaluate.main(["--checkpoint", str(tmp_path), "--method", "ode"]) == 2
    assert "--method: for diffusion models" in capsys.readouterr().err
