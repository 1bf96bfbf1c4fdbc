"""Weights, or optimiser states alone, divided among the processes: the same run, the same checkpoints."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from checkpoints import list_checkpoints
from ema import EMA
from run import setup
from safetensors.torch import load_file
from sharding import Sharding, _units, gathered, requested_sharding
from zero import requested_zero

from vdm_diffusers import VDMPipeline, VDMUNet2DModel

SCRIPT = Path(train.__file__)
CONFIGS = SCRIPT.parent / "accelerate_configs"
TINY = {
    "hidden_channels": 12,  # of 12 channels two processes get 6; of the one channel of the output, one gets none
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "fourier_exponents": [2, 3],
    "log_snr_max": 9,
    "dropout": 0,
    "train_batch_size": 8,
    "learning_rate": "1e-3",
    "lr_warmup_steps": 2,
    "max_train_steps": 8,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 0,
    "logging_steps": 4,
    "eval_max_images": 8,
    "eval_num_samples": 2,
    "eval_steps": 4,
    "sample_steps": 0,
    "ddpm_num_inference_steps": 5,
    "num_sample_images": 4,
    "logger": "none",
}
UNITS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "VDMResnetBlock2D",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'vdm-diffusers[deepspeed]'",
)
# the loss of process 0's first rows is not a number in two of the steps
NOT_FINITE = """
import dataclasses, sys
sys.path.insert(0, {folder!r})
import diffusion, train
def losses(self, model, levels, labels, rows, plain=diffusion.DiffusionTask.losses):
    found = plain(self, model, levels, labels, rows)
    broken = rows.step in (2, 5) and rows.first == 0
    return dataclasses.replace(found, values=found.values * float("nan")) if broken else found
diffusion.DiffusionTask.losses = losses
sys.exit(train.main())
"""


def network(**options):
    sizes = {"hidden_channels": 8, "layers_per_block": 2, "norm_num_groups": 4}
    return VDMUNet2DModel(sample_size=8, in_channels=1, **sizes | options)


def test_units_are_disjoint_large_enough_and_callable():
    model = network()
    by_name = _units(model, Sharding(class_names=frozenset({"VDMResnetBlock2D"})))
    assert len(by_name) == 2 + 2 + 3
    assert {type(unit).__name__ for unit in by_name} == {"VDMResnetBlock2D"}
    by_size = _units(model, Sharding(min_num_params=3000))
    seen = set()
    for unit in by_size:  # inner units come first, and their weights are theirs
        assert not isinstance(unit, torch.nn.ModuleList)
        own = {id(p) for p in unit.parameters()} - seen
        assert sum(p.numel() for p in unit.parameters() if id(p) in own) >= 3000
        seen |= own
    assert by_size and model not in by_size
    assert _units(model, Sharding()) == []  # a small network is one unit, the root


def test_what_is_gathered_is_a_copy():
    model = network()
    state = gathered({"a": model.state_dict(), "b": [torch.ones(2), 3]}, "cpu")
    assert state["b"][1] == 3
    name, weight = next(iter(model.named_parameters()))
    assert torch.equal(state["a"][name], weight)
    with torch.no_grad():
        weight.add_(1)
    assert not torch.equal(state["a"][name], weight)


def test_the_average_follows_weights_that_were_moved():
    model = network()
    average = EMA(model, inv_gamma=1.0, power=0.75, max_decay=0.99)
    for parameter in model.parameters():
        parameter.data = parameter.detach() + 1  # as `Module.to` does
    average.update(1)  # decay 0
    for got, want in zip(average.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        ({"scaler": object()}, "fp16"),
    ],
)
def test_what_fsdp_cannot_do_here_is_said(monkeypatch, wrong, said):
    options = {"distributed_type": DistributedType.MULTI_CPU, "scaler": None, "parallelism_config": None}
    options["device"] = torch.device("cpu")
    for name in UNITS:
        monkeypatch.delenv(name, raising=False)
    assert requested_sharding(SimpleNamespace(**options)) is None
    for name, value in UNITS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    asked = requested_sharding(SimpleNamespace(**options))
    assert asked == Sharding(class_names=frozenset({"VDMResnetBlock2D"}))
    for name, value in wrong.items():
        if name == "scaler":
            options[name] = value
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        requested_sharding(SimpleNamespace(**options))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage 1 or 2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 1 or 2"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device"),
        ({"mixed_precision": "fp16"}, "mixed_precision bf16 or no"),
        ({"optimizer": {"type": "AdamW"}}, "neither an optimizer nor a scheduler"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_said(monkeypatch, tmp_path, wrong, said):
    options = {"distributed_type": DistributedType.MULTI_CPU, "mixed_precision": "bf16", "parallelism_config": None}
    for name in ZERO:
        monkeypatch.delenv(name, raising=False)
    assert requested_zero(SimpleNamespace(**options)) is None
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    asked = requested_zero(SimpleNamespace(**options))
    assert asked["zero_optimization"]["stage"] == 2
    assert not {"bf16", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size"} & asked.keys()
    file = {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, "gradient_clipping": 7.0}
    for name, value in wrong.items():
        if name == "mixed_precision":
            options[name] = value
        elif name == "optimizer":
            (tmp_path / "deepspeed.json").write_text(json.dumps(file | {name: value}))
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        requested_zero(SimpleNamespace(**options))


def test_a_deepspeed_file_keeps_what_is_not_an_argument_of_the_script(monkeypatch, tmp_path):
    file = {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False}}
    file |= {
        "gradient_clipping": 7.0,
        "train_batch_size": "auto",
        "bf16": {"enabled": True},
        "wall_clock_breakdown": True,
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(file))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "deepspeed.json"))
    options = {"distributed_type": DistributedType.MULTI_CPU, "mixed_precision": "no", "parallelism_config": None}
    asked = requested_zero(SimpleNamespace(**options))
    stage = asked["zero_optimization"]
    assert stage["stage"] == 1 and stage["overlap_comm"] is False and "reduce_bucket_size" not in stage
    assert asked["wall_clock_breakdown"] is True
    assert not {"bf16", "gradient_clipping", "train_batch_size"} & asked.keys()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--optimizer=muon", "whole matrices: DeepSpeed divides"),
        ("--model=vae", "--model vae is small: DeepSpeed divides"),
        ("--channels_last=true", "--channels_last: DeepSpeed"),
    ],
)
def test_options_that_deepspeed_does_not_go_with_are_refused(monkeypatch, recipe, tmp_path, capsys, option, said):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setattr(setup, "requested_zero", lambda accelerator: {"zero_optimization": {"stage": 2}})
    assert train.main([f"--config={recipe}", f"--output_dir={tmp_path / 'run'}", option]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_deepspeed_is_told(monkeypatch, recipe, tmp_path, capsys):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("accelerate.accelerator.is_deepspeed_available", lambda: False)
    assert train.main([f"--config={recipe}", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "pip install deepspeed" in capsys.readouterr().err


def test_the_deepspeed_configuration_says_what_it_means():
    config = yaml.safe_load((CONFIGS / "deepspeed_zero2.yaml").read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    assert config["deepspeed_config"]["zero_stage"] == 2


@pytest.mark.parametrize("name", ["fsdp.yaml", "fsdp_keep_gathered.yaml"])
def test_the_configurations_say_what_they_mean(name):
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert config["distributed_type"] == "FSDP"
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert config["fsdp_config"]["fsdp_reshard_after_forward"] is (name == "fsdp.yaml")


def launch(recipe, output_dir, environment=(), launcher=(), script=SCRIPT, **options):
    """Run the script in two processes; returns what it said."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    if not launcher:
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    else:
        launcher = (*launcher, "--num_processes=2", f"--main_process_port={port}")
    given = {"config": recipe, "output_dir": output_dir, **options}
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), *(f"--{name}={value}" for name, value in given.items())],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, complained = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: the launcher then ends its workers, which would outlive it
        process.communicate()
        raise
    assert process.returncode == 0, complained
    return said


def assert_close(output_dir, reference, part="unet/diffusion_pytorch_model.safetensors"):
    got, want = load_file(Path(output_dir) / part), load_file(Path(reference) / part)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=2e-6)


def tensors(state):
    """All tensors of an optimiser's state, in order."""
    return [value for entry in state["state"].values() for value in entry.values()]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def replicated(recipe, tmp_path_factory):
    """Two processes, each with all weights."""
    output_dir = tmp_path_factory.mktemp("runs") / "replicated"
    launch(recipe, output_dir)
    return output_dir


@pytest.mark.slow
def test_divided_weights_are_the_same_run(recipe, replicated, tmp_path):
    said = launch(recipe, tmp_path / "divided", UNITS, sample_steps=8)
    assert "weights divided" in said
    assert_close(tmp_path / "divided", replicated)
    assert (tmp_path / "divided" / "metrics.jsonl").read_text().count("eval/bits_per_dim") == 2
    for folder in list_checkpoints(replicated):
        for part in ("unet/diffusion_pytorch_model.safetensors", "training_state/weights.safetensors"):
            assert_close(tmp_path / "divided" / folder.name, folder, part)
        ours, theirs = (
            torch.load(run / folder.name / "training_state" / "optimizer.pt", weights_only=True)
            for run in (tmp_path / "divided", replicated)
        )
        for got, want in zip(tensors(ours), tensors(theirs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    pipeline = VDMPipeline.from_pretrained(tmp_path / "divided")
    assert type(pipeline.unet) is VDMUNet2DModel
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.slow
def test_a_divided_run_goes_on_divided_or_whole(recipe, replicated, tmp_path):
    launch(recipe, tmp_path / "run", UNITS, checkpointing_steps=3, async_checkpoints=True)
    for environment in (UNITS, {}):
        said = launch(recipe, tmp_path / "run", environment, resume_from_checkpoint="checkpoint-3")
        assert "at step 3" in said
        assert_close(tmp_path / "run", replicated)


@pytest.mark.slow
def test_divided_weights_with_accumulation_clipping_and_recomputed_activations(recipe, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_train_steps": 4, "max_grad_norm": 0.5}
    launch(recipe, tmp_path / "divided", UNITS, gradient_checkpointing=True, **options)
    launch(recipe, tmp_path / "replicated", **options)
    assert_close(tmp_path / "divided", tmp_path / "replicated")


@pytest.mark.slow
def test_divided_weights_in_bf16(recipe, tmp_path):
    # after the first steps a difference of 1e-8 in a weight may be one of 2^-9 in what bf16 rounds it to
    options = {"mixed_precision": "bf16", "max_train_steps": 3, "lr_warmup_steps": 0, "checkpointing_steps": 1}
    for name, environment in (("divided", UNITS), ("replicated", {})):
        launch(recipe, tmp_path / name, environment, **options)
    part = "training_state/weights.safetensors"
    assert_close(tmp_path / "divided" / "checkpoint-1", tmp_path / "replicated" / "checkpoint-1", part)
    got, want = (load_file(tmp_path / name / "checkpoint-3" / part) for name in ("divided", "replicated"))
    for name in want:  # of steps of 1e-3
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=5e-4)


@pytest.mark.slow
def test_accelerate_launch_with_the_configuration(recipe, replicated, tmp_path):
    configuration = yaml.safe_load((CONFIGS / "fsdp_keep_gathered.yaml").read_text())
    configuration["fsdp_config"]["fsdp_min_num_params"] = 2000
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(configuration))
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp.yaml"))
    said = launch(recipe, tmp_path / "divided", {"ACCELERATE_USE_CPU": "true"}, launcher)
    assert "weights divided" in said
    assert_close(tmp_path / "divided", replicated)


@pytest.mark.slow
@pytest.mark.parametrize(
    "learning",
    [{"learn_schedule": True, "async_checkpoints": True}, {"time_sampling": "adaptive"}],
    ids=["schedule", "density"],
)
def test_what_is_learned_about_time_is_the_same_on_two_processes(recipe, tmp_path, learning):
    """One process with 16 images, two with 8 each: schedule or density, their optimiser, and the network."""
    options = {"eval_steps": 0, "max_train_steps": 6, "checkpointing_steps": 3, **learning}
    launch(recipe, tmp_path / "two", **options)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    given = {"config": recipe, "output_dir": tmp_path / "one", **options, "train_batch_size": 16}
    assert train.main([f"--{name}={value}" for name, value in given.items()]) == 0
    assert_close(tmp_path / "two", tmp_path / "one")
    state = "schedule" if "learn_schedule" in learning else "time_sampler"
    for folder in ("checkpoint-3", "checkpoint-6"):
        for path in (f"training_state/{state}.safetensors", "training_state/weights.safetensors"):
            assert_close(tmp_path / "two" / folder, tmp_path / "one" / folder, path)
    first, last = (
        load_file(tmp_path / "one" / f"checkpoint-{step}" / "training_state" / f"{state}.safetensors")
        for step in (3, 6)
    )
    assert any(not torch.equal(first[name], last[name]) for name in last)  # it was still learning


def assert_same_run(output_dir, reference):
    """Weights, average and optimiser of every checkpoint, and how the optimiser's are laid out."""
    assert_close(output_dir, reference)
    assert len(list_checkpoints(reference)) > 0
    for folder in list_checkpoints(reference):
        for part in ("unet/diffusion_pytorch_model.safetensors", "training_state/weights.safetensors"):
            assert_close(output_dir / folder.name, folder, part)
        ours, theirs = (
            torch.load(run / folder.name / "training_state" / "optimizer.pt", weights_only=True)
            for run in (output_dir, reference)
        )
        assert ours["param_groups"] == theirs["param_groups"]
        assert ours["state"].keys() == theirs["state"].keys()
        for number, entry in theirs["state"].items():
            for name, want in entry.items():
                torch.testing.assert_close(ours["state"][number][name], want, rtol=1e-4, atol=1e-6)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
def test_deepspeed_is_the_same_run(recipe, replicated, tmp_path, stage):
    said = launch(recipe, tmp_path / "run", ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}, sample_steps=8)
    assert "optimiser states divided" in said
    assert_same_run(tmp_path / "run", replicated)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("eval/bits_per_dim") == 2


@needs_deepspeed
@pytest.mark.slow
def test_a_deepspeed_run_goes_on_with_deepspeed_or_without(recipe, replicated, tmp_path):
    launch(recipe, tmp_path / "run", ZERO, async_checkpoints=True)
    unbroken = load_file(tmp_path / "run" / "checkpoint-8" / "training_state" / "weights.safetensors")
    for environment in (ZERO, {}):
        said = launch(recipe, tmp_path / "run", environment, resume_from_checkpoint="checkpoint-4")
        assert "at step 4" in said
        assert_same_run(tmp_path / "run", replicated)
        if environment:  # nothing is lost: bit for bit
            resumed = load_file(tmp_path / "run" / "checkpoint-8" / "training_state" / "weights.safetensors")
            assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    shutil.copytree(replicated, tmp_path / "taken over")
    launch(recipe, tmp_path / "taken over", ZERO, resume_from_checkpoint="checkpoint-4")
    assert_same_run(tmp_path / "taken over", replicated)


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_with_accumulation_clipping_and_a_learned_schedule(recipe, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_train_steps": 4, "max_grad_norm": 0.5, "learn_schedule": True}
    launch(recipe, tmp_path / "run", ZERO, gradient_checkpointing=True, **options)
    launch(recipe, tmp_path / "replicated", **options)
    assert_same_run(tmp_path / "run", tmp_path / "replicated")
    part = "training_state/schedule.safetensors"
    assert_close(tmp_path / "run" / "checkpoint-4", tmp_path / "replicated" / "checkpoint-4", part)


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_with_times_from_losses_of_both_processes(recipe, tmp_path):
    options = {"time_sampling": "adaptive", "max_train_steps": 4}
    launch(recipe, tmp_path / "run", ZERO, **options)
    launch(recipe, tmp_path / "replicated", **options)
    assert_same_run(tmp_path / "run", tmp_path / "replicated")


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_in_bf16(recipe, tmp_path):
    options = {"mixed_precision": "bf16", "max_train_steps": 3, "lr_warmup_steps": 0, "checkpointing_steps": 1}
    launch(recipe, tmp_path / "run", ZERO, **options)
    launch(recipe, tmp_path / "replicated", **options)
    launch(recipe, tmp_path / "float32", **options | {"mixed_precision": "no"})
    part = "training_state/weights.safetensors"
    assert_close(tmp_path / "run" / "checkpoint-1", tmp_path / "replicated" / "checkpoint-1", part)
    got, want, float32 = (
        load_file(tmp_path / name / "checkpoint-3" / part) for name in ("run", "replicated", "float32")
    )
    for name in want:  # of steps of 1e-3; see the test of divided weights
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=5e-4)
    assert max((got[name] - float32[name]).abs().max() for name in want) > 1e-4  # it was bf16


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_skips_what_is_not_finite(recipe, tmp_path):
    (tmp_path / "script.py").write_text(NOT_FINITE.format(folder=str(SCRIPT.parent)))
    options = {
        "script": tmp_path / "script.py",
        "max_skipped_steps": 1,
        "gradient_accumulation_steps": 2,
        "eval_steps": 0,
    }
    for name, environment in (("run", ZERO), ("replicated", {})):
        launch(recipe, tmp_path / name, environment, **options)
    assert_same_run(tmp_path / "run", tmp_path / "replicated")
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "training_state" / "state.json").read_text())
    assert state["skipped"] == 2


@needs_deepspeed
@pytest.mark.slow
def test_accelerate_launch_with_the_deepspeed_configuration(recipe, replicated, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "deepspeed_zero2.yaml"))
    said = launch(recipe, tmp_path / "run", {"DS_ACCELERATOR": "cpu"}, launcher)
    assert "optimiser states divided" in said
    assert_same_run(tmp_path / "run", replicated)
