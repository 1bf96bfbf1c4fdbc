"""train.py --model vae and hvae: trains, resumes exactly, saves a model, and says its bits/dim."""

import json
from pathlib import Path

import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from vdm_diffusers import HierarchicalVAE, VariationalAutoencoder

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
    return train.main([part for name, value in given.items() for part in (f"--{name}", *str(value).split(" "))])


def entries(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("model", "kind"), [("vae", VariationalAutoencoder), ("hvae", HierarchicalVAE)])
def test_trains_evaluates_saves_and_resumes_exactly(model, kind, tmp_path):
    assert run(tmp_path / "whole", model=model) == 0
    loaded = kind.from_pretrained(tmp_path / "whole")
    assert loaded.config.num_levels == 17
    assert (tmp_path / "whole" / "samples" / "step-0000006.png").is_file()
    log = entries(tmp_path / "whole")
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    (evaluation,) = [entry for entry in log if "eval/bits_per_dim" in entry]
    terms = [evaluation[f"eval/{term}"] for term in ("prior", "diffusion", "reconstruction")]
    assert evaluation["eval/bits_per_dim"] == pytest.approx(sum(terms), rel=1e-5)
    assert evaluation["eval/standard_error"] > 0
    assert evaluation["eval/is_bound"]

    # as if killed after step 3: the later checkpoint, the model and the log's end are gone
    (tmp_path / "whole").rename(tmp_path / "first")
    assert run(tmp_path / "whole", model=model, max_train_steps=6) == 0
    resumed = tmp_path / "first"
    for path in sorted((resumed / "checkpoint-6").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (resumed / "checkpoint-6").rmdir()
    assert run(resumed, model=model, resume_from_checkpoint="latest") == 0
    weights = [load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "whole", resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_refusals(tmp_path, capsys):
    assert run(tmp_path / "a", model="vae", push_to_hub=True) == 2
    assert "model card" in capsys.readouterr().err
    assert run(tmp_path / "b", model="vae", class_conditional=True) == 2
    assert "class_conditional" in capsys.readouterr().err
    assert run(tmp_path / "c", model="hvae", block_out_channels="8 8 8 8 8") == 2
    assert "sample_size" in capsys.readouterr().err


def test_muon_without_a_matrix_for_it_is_an_error_that_says_what_to_do(tmp_path, capsys):
    assert run(tmp_path / "run", model="vae", optimizer="muon") == 2
    assert "--optimizer adamw" in capsys.readouterr().err
