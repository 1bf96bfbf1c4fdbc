"""train.py --model vae and hvae: trains, resumes exactly, saves a model, and says its bits/dim."""

import json
from pathlib import Path

import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from vdm_diffusers import HierarchicalVAE, LatentVDMPipeline, VariationalAutoencoder

TINY = {
    "block_out_channels": "8 8",
    "latent_channels": 2,
    "norm_num_groups": 4,
    "train_batch_size": 8,
    "optimizer": "adamw",
    "lr_warmup_steps": 0,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 0,
    "logging_steps": 1,
    "eval_max_images": 16,
    "eval_num_samples": 4,
    "num_sample_images": 4,
    "logger": "none",
}


def run(output_dir, **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    given = {**TINY, "output_dir": output_dir, **options}
    given = {name: value for name, value in given.items() if value is not None}
    return train.main([part for name, value in given.items() for part in (f"--{name}", *str(value).split(" "))])


def entries(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


WITHOUT_SIZES = {"block_out_channels": None, "latent_channels": None}
PRIOR = {"hidden_channels": 8, "layers_per_block": 1, "attention_head_dim": 8, "ddpm_num_inference_steps": 5}


def all_weights(folder):
    paths = sorted(folder.glob("*/diffusion_pytorch_model.safetensors")) or [
        folder / "diffusion_pytorch_model.safetensors"
    ]
    return {f"{path.parent.name}.{name}": value for path in paths for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("model", "kind"),
    [("vae", VariationalAutoencoder), ("hvae", HierarchicalVAE), ("latent_vdm", LatentVDMPipeline)],
)
def test_trains_evaluates_saves_and_resumes_exactly(model, kind, tmp_path):
    sizes = PRIOR if model == "latent_vdm" else {}
    assert run(tmp_path / "whole", model=model, **sizes) == 0
    loaded = kind.from_pretrained(tmp_path / "whole")
    assert loaded.config.num_levels == 17
    pictures = {"vae": ["traversal.png"], "hvae": [], "latent_vdm": ["interpolations.png"]}[model]
    assert all((tmp_path / "whole" / name).is_file() for name in ["samples.png", "reconstructions.png", *pictures])
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert kind.__name__ in card and "bits_per_dim" in card
    log = entries(tmp_path / "whole")
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    (evaluation,) = [entry for entry in log if "eval/bits_per_dim" in entry]
    terms = [evaluation[f"eval/{term}"] for term in ("prior", "diffusion", "reconstruction")]
    assert evaluation["eval/bits_per_dim"] == pytest.approx(sum(terms), rel=1e-5)
    assert evaluation["eval/standard_error"] > 0
    assert evaluation["eval/is_bound"]

    # as if killed after step 3: the later checkpoint, the model and the log's end are gone
    (tmp_path / "whole").rename(tmp_path / "first")
    assert run(tmp_path / "whole", model=model, **sizes) == 0
    resumed = tmp_path / "first"
    for path in sorted((resumed / "checkpoint-6").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (resumed / "checkpoint-6").rmdir()
    assert run(resumed, model=model, resume_from_checkpoint="latest", **sizes) == 0
    weights = [all_weights(folder) for folder in (tmp_path / "whole", resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_stages_reach_what_they_say_and_the_scales_are_fitted_between_them(tmp_path):
    """VAE alone, prior alone, both; in checkpoints after 2, 4 and 6 steps.

    `--use_ema false`: the weights themselves.
    """
    options = {
        "use_ema": False,
        "optimizer": "muon",
        "hidden_channels": 16,
        "latent_stages": "1 1 1",
        "checkpointing_steps": 2,
    }
    options |= {"block_out_channels": "16 16", "latent_channels": 4, "eval_steps": 0, "sample_steps": 0}
    assert run(tmp_path, model="latent_vdm", **{**PRIOR, **options}) == 0
    weights = [all_weights(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)]

    def changed(before, after, part):
        return {name for name in before if name.startswith(part) and not torch.equal(before[name], after[name])}

    assert not changed(weights[0], weights[1], "vae.") and changed(weights[0], weights[1], "unet.")
    assert changed(weights[1], weights[2], "vae.") and changed(weights[1], weights[2], "unet.")
    configs = [json.loads((tmp_path / f"checkpoint-{step}" / "vae" / "config.json").read_text()) for step in (2, 4, 6)]
    assert configs[0]["scaling_factor"] == 1 != configs[1]["scaling_factor"] == configs[2]["scaling_factor"]
    assert configs[1]["shift_factor"] == configs[2]["shift_factor"] is not None


def test_prior_of_a_given_autoencoder_of_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=2, **blocks, **kinds)
    vae.save_pretrained(tmp_path / "vae")
    given = {**PRIOR, "vae": tmp_path / "vae", "latent_stages": "0 1 0", "model": "latent_vdm", **WITHOUT_SIZES}
    assert run(tmp_path / "run", **given) == 0
    pipe = LatentVDMPipeline.from_pretrained(tmp_path / "run")
    assert pipe.vae.config.scaling_factor == vae.config.scaling_factor  # its own
    assert pipe.config.decoder_scale > 0
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(pipe.vae.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vdm", "vae": "somewhere", **WITHOUT_SIZES}, "--vae means nothing here"),
        ({"model": "latent_vdm", "latent_stages": "1 1"}, "--latent_stages"),
        ({"model": "latent_vdm", "loss": "simple"}, "--loss elbo"),
        ({"model": "vae", "compile": True}, "--compile"),
        ({"model": "vae", "class_conditional": True}, "--class_conditional means nothing here"),
    ],
)
def test_arguments_that_do_not_go_together(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, **options)
    assert message in capsys.readouterr().err


def test_refusals(tmp_path, capsys):
    assert run(tmp_path / "c", model="hvae", block_out_channels="8 8 8 8 8") == 2
    assert "sample_size" in capsys.readouterr().err


def test_muon_without_a_matrix_for_it_is_an_error_that_says_what_to_do(tmp_path, capsys):
    assert run(tmp_path / "run", model="vae", optimizer="muon") == 2
    assert "--optimizer adamw" in capsys.readouterr().err
