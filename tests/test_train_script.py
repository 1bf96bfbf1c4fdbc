"""train.py as a whole: the same run however it is divided, interrupted or damaged."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState
from checkpoints import list_checkpoints, required_bytes, verify
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from hub_double import HubDouble
from run import launch
from safetensors.torch import load_file
from stopping import STOP_INTERVAL

from vdm_diffusers import VDMFlowScheduler, VDMPipeline, VDMScheduler, VDMUNet2DModel

SCRIPT = Path(train.__file__)
TINY = {
    "hidden_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "fourier_exponents": [2, 3],
    "log_snr_max": 9,
    "dropout": 0.1,
    "train_batch_size": 16,
    "learning_rate": "1e-3",
    "lr_warmup_steps": 2,
    "max_train_steps": 12,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 0,
    "logging_steps": 1,
    "eval_max_images": 8,
    "eval_num_samples": 2,
    "eval_steps": 0,
    "sample_steps": 0,
    "ddpm_num_inference_steps": 5,
    "num_sample_images": 4,
    "logger": "none",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def run(recipe):
    """Run the script in this process: run(output_dir, option=value, ...) -> exit code."""

    def in_process(output_dir, **options):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return train.main(command(recipe, output_dir, **options)[2:])

    return in_process


def command(recipe, output_dir, **options):
    given = {"config": recipe, "output_dir": output_dir, **options}
    return [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in given.items())]


def weights(output_dir, part="unet/diffusion_pytorch_model.safetensors"):
    return load_file(Path(output_dir) / part)


def metrics(output_dir, name="loss"):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry[name] for entry in map(json.loads, lines) if name in entry}


def assert_same_run(output_dir, reference):
    got, want = weights(output_dir), weights(reference)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert metrics(output_dir) == metrics(reference)


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory):
    """A run from beginning to end, with everything on."""
    output_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    options = {"eval_steps": 6, "sample_steps": 6, "logger": "tensorboard"}
    assert run(output_dir, **options) == 0
    return output_dir


def test_a_run_leaves_a_pipeline_checkpoints_curves_and_pictures(unbroken):
    pipeline = VDMPipeline.from_pretrained(unbroken)
    assert (pipeline.config.num_levels, pipeline.config.pixel_encoding) == (17, "bin_center")
    assert isinstance(pipeline.scheduler, VDMScheduler)
    assert pipeline.scheduler.config.log_snr_max == 9
    assert [path.name for path in list_checkpoints(unbroken)] == [
        f"checkpoint-{n}"
        for n in (4, 6, 8, 12)  # 6: before the evaluation
    ]
    assert not list(unbroken.glob(".*"))
    assert sorted(path.name for path in (unbroken / "samples").iterdir()) == ["step-0000006.png", "step-0000012.png"]
    assert list((unbroken / "logs").rglob("events.out.tfevents.*"))

    losses = metrics(unbroken)
    assert list(losses) == list(range(1, 13))
    rates = metrics(unbroken, "learning_rate")
    assert [rates[1], rates[2], rates[3]] == pytest.approx([0, 5e-4, 1e-3])  # warm-up, counted in optimiser steps
    assert rates[12] < 3e-5
    assert list(metrics(unbroken, "eval/bits_per_dim")) == [6, 12]
    for term in ("prior", "diffusion", "reconstruction"):
        assert metrics(unbroken, f"eval/{term}")[12] >= 0
    total = sum(metrics(unbroken, f"eval/{term}")[12] for term in ("prior", "diffusion", "reconstruction"))
    assert total == pytest.approx(metrics(unbroken, "eval/bits_per_dim")[12])

    # a checkpoint is a pipeline too, of the averaged weights; the last one's are the published ones
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(unbroken).values(), weights(unbroken / "checkpoint-12").values(), strict=True)
    )
    trained = weights(unbroken / "checkpoint-12", "training_state/weights.safetensors")
    assert any(not torch.equal(trained[name], value) for name, value in weights(unbroken).items())
    record = json.loads((unbroken / "training_arguments.json").read_text())
    assert record["arguments"]["learning_rate"] == 1e-3
    assert record["num_processes"] == 1
    card = (unbroken / "README.md").read_text()
    assert f"{metrics(unbroken, 'eval/bits_per_dim')[12]:.4f}" in card


def test_evaluation_and_samples_disturb_nothing(unbroken, run, tmp_path):
    assert run(tmp_path / "plain") == 0
    assert_same_run(tmp_path / "plain", unbroken)


def test_stopped_by_sigterm_then_killed_then_resumed_is_the_unbroken_run(unbroken, run, recipe, tmp_path):
    output_dir = tmp_path / "interrupted"
    # the first part would go on for long, were it not stopped
    slow = "import time, train; step = train.Training.optimizer_step; hold = lambda self: (step(self), time.sleep({}))"
    start = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); " + slow
    start += "; train.Training.optimizer_step = hold; sys.exit(train.main(sys.argv[1:]))"
    arguments = command(recipe, output_dir)[2:]

    def wait_for(process, reached):
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def last_step():
        path = output_dir / "metrics.jsonl"
        return max(metrics(output_dir), default=0) if path.exists() and path.read_text().endswith("\n") else 0

    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    terminated = subprocess.Popen([sys.executable, "-c", start.format(0.3), *arguments], **options)
    wait_for(terminated, lambda: last_step() >= 1)
    terminated.send_signal(signal.SIGTERM)
    said, _ = terminated.communicate(timeout=300)
    assert terminated.returncode == 143, said
    assert "state saved at step" in said
    (stopped,) = list_checkpoints(output_dir)
    assert 1 <= int(stopped.name.split("-")[1]) < 4  # between two checkpoints, in mid-epoch

    arguments += ["--resume_from_checkpoint=latest"]
    killed = subprocess.Popen([sys.executable, "-c", start.format(0.3), *arguments], **options)
    wait_for(killed, lambda: last_step() >= 6)
    killed.kill()
    killed.communicate()
    assert max(metrics(output_dir)) > 4  # it had gone beyond the checkpoint that the next part starts from
    assert list_checkpoints(output_dir)[-1].name in ("checkpoint-4", "checkpoint-8")

    assert run(output_dir, resume_from_checkpoint="latest") == 0
    assert_same_run(output_dir, unbroken)
    assert list(metrics(output_dir)) == list(range(1, 13))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_and_accumulation_are_the_same_run(run, recipe, tmp_path):
    # Dropout is drawn by each process, so it is off; all else belongs to the global batch. Eight steps of 16 images.
    options = {"dropout": 0, "max_train_steps": 8, "eval_steps": 8, "checkpointing_steps": 8}
    assert run(tmp_path / "one", **options) == 0
    assert run(tmp_path / "accumulated", train_batch_size=8, gradient_accumulation_steps=2, **options) == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    argv = command(recipe, tmp_path / "two", train_batch_size=8, **options)
    launched = subprocess.Popen(
        [sys.executable, *launch, *argv[1:]],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, complained = launched.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        launched.terminate()  # not kill: the launcher then ends its workers, which would outlive it
        launched.communicate()
        raise
    assert launched.returncode == 0, complained
    assert "16 images (8 x 2 process(es) x 1 micro-batch(es))" in said
    assert json.loads((tmp_path / "two" / "training_arguments.json").read_text())["num_processes"] == 2
    assert list(metrics(tmp_path / "two", "eval/num_images").values()) == [8]
    want = weights(tmp_path / "one")
    # With stratified times each of the 16 bins of log SNR holds exactly one of the 16 images of every step.
    for name in ("accumulated", "two"):
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, want[key], rtol=1e-5, atol=2e-6)
        for step, loss in metrics(tmp_path / name).items():
            assert loss == pytest.approx(metrics(tmp_path / "one")[step], rel=1e-5)
    entries = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for entry in entries[:8]:
        assert sum(key.startswith("loss_by_log_snr/") for key in entry) == 16


def test_an_occupied_output_dir_stops_at_once(unbroken, run, tmp_path, capsys):
    before = sorted(path.name for path in unbroken.iterdir())
    assert run(unbroken) == 2
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert sorted(path.name for path in unbroken.iterdir()) == before

    (tmp_path / "mine.txt").write_text("keep")
    assert run(tmp_path) == 2
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "overwrite_output_dir": True}
    assert run(tmp_path, **options) == 0
    assert run(tmp_path, **options | {"max_train_steps": 1}) == 0
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_damage_is_survived(unbroken, run, tmp_path, capsys, monkeypatch):
    output_dir = tmp_path / "run"
    save, calls = torch.save, []

    def full_disk(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        assert run(output_dir) == 1
    said = capsys.readouterr().err
    assert "No space left" in said
    assert "The last good checkpoint, checkpoint-8, is untouched" in said
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-4", "checkpoint-8"]
    assert not list(output_dir.glob(".incomplete*"))

    latest = output_dir / "checkpoint-8" / "training_state" / "weights.safetensors"
    content = bytearray(latest.read_bytes())
    content[-1] ^= 1
    latest.write_bytes(content)
    capsys.readouterr()
    assert run(output_dir, resume_from_checkpoint="checkpoint-8") == 2
    assert "checksum" in capsys.readouterr().err
    assert run(output_dir, resume_from_checkpoint="latest") == 0
    said = capsys.readouterr().out
    assert "passed over" in said
    assert "resuming from" in said
    assert "checkpoint-4" in said
    assert_same_run(output_dir, unbroken)

    assert run(output_dir, resume_from_checkpoint="latest", hidden_channels=12) == 2
    assert "of another network than the arguments describe" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops(run, tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"(?s)not finite in steps .*--learning_rate.*metrics.jsonl|metrics.jsonl.*--learning_rate",
    ):
        run(tmp_path / "run", learning_rate=1e30, lr_warmup_steps=0, checkpointing_steps=1)
    for folder in list_checkpoints(tmp_path / "run"):  # nothing broken was kept
        assert all(value.isfinite().all() for value in weights(folder, "training_state/weights.safetensors").values())


def test_a_few_steps_that_are_not_finite_can_be_left_out(unbroken, run, tmp_path, monkeypatch, capsys):
    losses, bad = train.DiffusionTask.losses, set()

    def sometimes_broken(self, model, levels, labels, rows):
        computed = losses(self, model, levels, labels, rows)
        return dataclasses.replace(computed, values=computed.values * (float("nan") if rows.step in bad else 1))

    monkeypatch.setattr(train.DiffusionTask, "losses", sometimes_broken)
    # allowing it changes nothing where all is well
    assert run(tmp_path / "healthy", max_skipped_steps=2) == 0
    assert_same_run(tmp_path / "healthy", unbroken)

    bad |= {3, 5, 6}  # the steps that would end at 4, 6 and 7
    options = {"max_skipped_steps": 2, "checkpointing_steps": 1}
    assert run(tmp_path / "skipping", **options) == 0
    assert capsys.readouterr().out.count("the gradient is not finite, skipped") == 3
    assert metrics(tmp_path / "skipping", "skipped_steps")[12] == 3
    assert set(range(1, 13)) - set(metrics(tmp_path / "skipping")) == {4, 6, 7}
    state = "training_state/weights.safetensors"
    for skipped in (4, 6, 7):
        before, after = (weights(tmp_path / "skipping" / f"checkpoint-{n}", state) for n in (skipped - 1, skipped))
        assert all(torch.equal(after[name], value) for name, value in before.items())

    bad.add(7)  # three in a row
    with pytest.raises(FloatingPointError, match=r"3 optimiser steps in a row, up to step 8.*--learning_rate"):
        run(tmp_path / "broken", **options)
    assert list_checkpoints(tmp_path / "broken")[-1].name == "checkpoint-7"
    with pytest.raises(FloatingPointError, match="3 optimiser steps in a row, up to step 8"):
        run(tmp_path / "broken", **options, resume_from_checkpoint="latest")  # the count goes on where it was


def test_too_small_a_disk_is_told_before_the_first_step(run, tmp_path, monkeypatch, capsys):
    usage = type("usage", (), {"free": 10_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "the checkpoints need about" in said
    assert "--checkpoints_total_limit" in said


@pytest.mark.parametrize(
    ("saves", "limit", "present", "folders"),
    [(10, 2, 0, 3), (10, 2, 2, 1), (10, 0, 4, 10), (1, 2, 0, 1), (2, 5, 9, 1)],
)
def test_disk_space_is_counted_in_folders(saves, limit, present, folders):
    assert required_bytes(7, saves, limit, present) == 7 * folders


def test_what_is_written_in_the_background_is_what_was_there(unbroken, run, tmp_path, monkeypatch, capsys):
    output_dir, options = tmp_path / "run", {"async_checkpoints": True, "eval_steps": 6, "sample_steps": 6}
    assert run(output_dir, **options) == 0
    assert_same_run(output_dir, unbroken)
    for folder in list_checkpoints(unbroken):
        verify(output_dir / folder.name)
        for part in ("unet/diffusion_pytorch_model.safetensors", "training_state/weights.safetensors"):
            want = weights(folder, part)
            assert all(
                torch.equal(value, want[name]) for name, value in weights(output_dir / folder.name, part).items()
            )
        got, want = (torch.load(f / "training_state/optimizer.pt") for f in (output_dir / folder.name, folder))
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    assert run(tmp_path / "full", **options) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list_checkpoints(tmp_path / "full")


def test_stock_networks_v_prediction_classes_and_colour(run, tmp_path):
    pictures = tmp_path / "pictures"
    generator = torch.Generator().manual_seed(0)
    for kind in ("cats", "dogs"):
        (pictures / kind).mkdir(parents=True)
        for index in range(20):
            pixels = torch.randint(0, 256, (12, 9, 3), generator=generator, dtype=torch.uint8).numpy()
            PIL.Image.fromarray(pixels).save(pictures / kind / f"{index}.png")
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "num_class_embeds": 2}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **sizes, **blocks).save_config(tmp_path / "config")
    options = {
        "train_data_dir": pictures,
        "cache_dir": tmp_path / "cache",
        "resolution": 8,
        "random_flip": True,
        "class_conditional": True,
        "model_config_name_or_path": tmp_path / "config",
        "ddpm_beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "loss": "min_snr",
        "pixel_encoding": "endpoint",
        "mixed_precision": "bf16",
        "channels_last": True,
        "train_batch_size": 4,
        "max_train_steps": 3,
        "eval_steps": 3,
        "sample_steps": 3,
        "eval_fraction": 0.2,
        "eval_num_samples": 4,
        "use_ema": False,
    }
    assert run(tmp_path / "run", **options) == 0
    pipeline = VDMPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(pipeline.unet, UNet2DModel)
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline(batch_size=2, class_labels=1, num_inference_steps=3).images[0].size == (8, 8)
    assert metrics(tmp_path / "run", "eval/num_images") == {3: 8}

    assert run(tmp_path / "other", **options | {"resolution": 16}) == 2  # the network is of 8x8


def test_a_vdm_network_with_classes(run, tmp_path):
    assert (
        run(
            tmp_path / "run",
            class_conditional=True,
            class_dropout=0.2,
            max_train_steps=2,
            eval_steps=2,
            sample_steps=2,
        )
        == 0
    )
    network = VDMPipeline.from_pretrained(tmp_path / "run").unet
    assert isinstance(network, VDMUNet2DModel)
    assert network.config.num_class_embeds == 10


def test_the_hub_is_asked_before_the_first_step(run, tmp_path, monkeypatch, capsys):
    asked = []

    def no_login(name, **options):
        asked.append((name, options))
        raise PermissionError("nobody is logged in")

    monkeypatch.setattr(launch, "check_hub_access", no_login)
    monkeypatch.setattr(train.Training, "optimizer_step", lambda self: pytest.fail("a step was taken"))
    options = {"push_to_hub": True, "hub_model_id": "me/model", "hub_private_repo": True, "hub_token": "hf_secret"}
    assert run(tmp_path / "run", **options) == 2
    assert "--push_to_hub: nobody is logged in" in capsys.readouterr().err
    assert asked == [("me/model", {"private": True, "token": "hf_secret"})]


def test_what_reaches_the_hub(recipe, tmp_path):
    output_dir = tmp_path / "run"
    options = {
        "max_train_steps": 2,
        "sample_steps": 2,
        "eval_steps": 2,
        "checkpointing_steps": 1,
        "logger": "tensorboard",
    }
    options |= {
        "push_to_hub": True,
        "hub_model_id": "someone/digits",
        "hub_private_repo": True,
        "push_checkpoints": True,
    }
    with HubDouble() as hub:
        environment = hub.env(tmp_path / "home")
        argv = command(recipe, output_dir, **options)
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "published someone/digits" in done.stdout
        files = hub.files("someone/digits")
        assert hub.repos["someone/digits"].private
        created, committed = (hub.requests(f"POST .*{path}") for path in ("repos/create", "/commit/"))
        assert created[0].target != committed[0].target
        messages = [commit.title for commit in reversed(hub.commits("someone/digits"))]
        assert [m for m in messages if m.startswith("Step")] == ["Step 1", "Step 2"]
        assert messages[-1] == "Upload VDMPipeline"  # the finished one comes last
    code = {name for name in files if name.endswith("vdm_diffusers.py")}
    model = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    rest = {".gitattributes", "README.md", "samples.png", "model_index.json"}
    assert set(files) == code | model | rest
    assert list_checkpoints(output_dir)  # which stayed at home


def test_arguments_that_change_on_the_way_are_named(run, tmp_path, capsys):
    assert run(tmp_path / "run", max_train_steps=2, checkpointing_steps=1) == 0
    capsys.readouterr()
    options = {"max_train_steps": 3, "learning_rate": 2e-3, "resume_from_checkpoint": "latest"}
    assert run(tmp_path / "run", **options) == 0
    said = capsys.readouterr().out
    assert "learning_rate 0.001 -> 0.002" in said
    assert "max_train_steps 2 -> 3" in said
    assert "checkpointing_steps" not in said


def test_trackio_gets_the_figures_and_the_pictures_and_a_resumed_run_goes_on(recipe, tmp_path):
    pytest.importorskip("trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "hf")}
    options = {
        "logger": "trackio",
        "logging_steps": 1,
        "sample_steps": 2,
        "num_inference_steps": 2,
        "checkpointing_steps": 2,
    }
    for steps in (2, 4):
        more = (
            {"max_train_steps": steps, "resume_from_checkpoint": "latest"}
            if steps == 4
            else {"max_train_steps": steps}
        )
        argv = command(recipe, tmp_path / "run", **options, **more)
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    read = "from trackio.sqlite_storage import SQLiteStorage as S; import json; print(json.dumps([S.get_runs('vdm'), S.get_logs('vdm', 'run')]))"
    shown = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, check=True)
    runs, logs = json.loads(shown.stdout.splitlines()[-1])
    assert runs == ["run"]
    want = metrics(tmp_path / "run")
    assert {entry["step"]: entry["loss"] for entry in logs if "loss" in entry} == pytest.approx(want) and len(
        want
    ) == 4
    pictures = [value for entry in logs for value in entry.values() if isinstance(value, dict)]
    assert pictures and {picture["_type"] for picture in pictures} == {"trackio.image"}


@pytest.mark.filterwarnings("ignore:`log_with=wandb`")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mixed_precision": "fp16"}, "on a CPU take bf16"),
        ({"logger": "wandb"}, "pip install wandb"),
        ({"num_levels": 9}, "the images hold level 16"),
        ({"norm_num_groups": 3}, "`norm_num_groups` must divide `hidden_channels`"),
        ({"log_snr_table": 3}, "at least two log SNRs"),
        ({"model_config_name_or_path": "CONFIG"}, "is of a AutoencoderKL"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_first_step(options, complaint, run, tmp_path, capsys):
    if "wandb" in options.values() and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    options = {k: tmp_path / "config.json" if v == "CONFIG" else v for k, v in options.items()}
    assert run(tmp_path / "run", **options) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_processes_agree_to_stop(recipe, tmp_path):
    output_dir = tmp_path / "run"
    argv = command(recipe, output_dir, train_batch_size=8, max_train_steps=10**6, checkpointing_steps=10**6)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    launched = subprocess.Popen([sys.executable, *launch, *argv[1:]], **options)
    deadline = time.monotonic() + 300
    while not (output_dir / "metrics.jsonl").exists() or not metrics(output_dir):
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launched.terminate()
    launched.wait(timeout=300)
    (stopped,) = list_checkpoints(output_dir)
    assert int(stopped.name.split("-")[1]) % STOP_INTERVAL == 0
    verify(stopped)


@pytest.mark.slow
@pytest.mark.parametrize("command_line", [["--cpu", "--num_processes", "2"], ["--cpu"]])
def test_accelerate_launch(command_line, recipe, tmp_path):
    argv = command(recipe, tmp_path / "run", max_train_steps=1)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *command_line, *argv[1:]]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    if "--num_processes" in command_line:
        assert done.returncode != 0
        assert "was asked for several processes and started one" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "model_index.json").exists()


def test_a_flow_is_trained_evaluated_and_sampled_by_the_stock_scheduler(run, tmp_path, capsys):
    """The straight path: the saved pipeline's scheduler is a VDMFlowScheduler, and Diffusers' own gives its
    samples.
    """
    options = {"path": "flow", "prediction_type": "flow_prediction", "flow_shift": 2.0, "log_snr_table": "none"}
    assert run(tmp_path / "run", **options, max_train_steps=4, checkpointing_steps=4) == 0
    assert "schedule of a flow, shift 2" in capsys.readouterr().out
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "bits_per_dim" in metrics or '"loss"' in metrics
    pipe = VDMPipeline.from_pretrained(tmp_path / "run")
    assert type(pipe.scheduler) is VDMFlowScheduler and pipe.scheduler.config.shift == 2.0
    pipe.set_progress_bar_config(disable=True)
    samples = []
    for scheduler in (pipe.scheduler, FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        samples.append(pipe(batch_size=2, num_inference_steps=6, generator=generator, output_type="latent").images)
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-5, atol=1e-5)
    for refused in ({"log_snr_max": 5}, {"ddpm_beta_schedule": "linear"}, {"prediction_type": "epsilon"}):
        with pytest.raises(SystemExit) as stopped:
            train.main(
                ["--output_dir", str(tmp_path / "x"), *[f"--{k}={v}" for k, v in {**options, **refused}.items()]]
            )
        assert stopped.value.code == 2


def test_the_best_is_kept_and_time_runs_out(run, tmp_path):
    out = tmp_path / "run"
    options = {"eval_steps": 2, "keep_best": "true", "max_train_steps": 6}
    assert run(out, **options) == 0
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = {entry["step"]: entry["eval/bits_per_dim"] for entry in entries if "eval/bits_per_dim" in entry}
    best = json.loads((out / "best" / "evaluation.json").read_text())
    assert len(figures) == 3 and best["bits_per_dim"] == min(figures.values()) == figures[best["step"]]
    assert isinstance(VDMPipeline.from_pretrained(out / "best"), VDMPipeline)
    verify(out / "best")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "slice", max_minutes="1e-6", max_train_steps=50)
    assert stopped.value.code == 142
    (saved,) = list_checkpoints(tmp_path / "slice")
    assert (
        run(
            tmp_path / "slice",
            resume_from_checkpoint="latest",
            max_train_steps=saved.step + 1 if hasattr(saved, "step") else 3,
        )
        == 0
    )


def test_the_change_between_evaluations_is_measured_and_the_best_is_the_paired_one(run, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, eval_steps=2, keep_best="true", max_train_steps=6, eval_change_samples=2) == 0
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "eval/bits_per_dim" in entry]
    assert "eval/since_last" not in entries[0] and entries[0]["eval/is_best"] == 1
    for entry in entries[1:]:
        assert 0 < entry["eval/since_last_error"] < 0.1 and math.isfinite(entry["eval/since_best"])
        expected = entry["eval/since_best"] + entry["eval/since_best_error"] < 0
        assert entry["eval/is_best"] == expected
    best = json.loads((out / "best" / "evaluation.json").read_text())
    assert best["step"] == [entry["step"] for entry in entries if entry["eval/is_best"]][-1]
    assert "change in bits/dim" in capsys.readouterr().out


def test_early_stopping_ends_a_run_that_gains_nothing_and_a_resumed_one(run, tmp_path, capsys):
    out = tmp_path / "run"
    options = {"eval_steps": 1, "early_stopping": 2, "learning_rate": 1e-30, "eval_change_samples": 2}
    assert run(out, **options, max_train_steps=30) == 0
    captured = capsys.readouterr().out
    assert "step 3: 2 evaluation(s) without a gain, training ends (--early_stopping)" in captured
    assert VDMPipeline.from_pretrained(out).unet is not None  # the pipeline is saved as after the last step
    assert run(out, **options, max_train_steps=30, resume_from_checkpoint="latest") == 0
    with pytest.raises(SystemExit):
        run(tmp_path / "other", early_stopping=2, eval_steps=0)
    assert "--early_stopping needs --eval_steps" in capsys.readouterr().err


WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vdm_diffusers":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline="vdm_diffusers", trust_remote_code=True)
print(len(pipe(batch_size=2, num_inference_steps=3).images), "images")
"""


def test_a_run_starts_from_given_weights_and_its_folder_loads_without_the_package(run, tmp_path):
    assert run(tmp_path / "first", max_train_steps=3, checkpointing_steps=3) == 0
    given = {"pretrained_model_name_or_path": tmp_path / "first", "learning_rate": "1e-30", "use_ema": "false"}
    assert run(tmp_path / "second", **given, max_train_steps=1, checkpointing_steps=1) == 0
    first, second = (VDMPipeline.from_pretrained(tmp_path / name).unet for name in ("first", "second"))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=1e-6)
    assert run(tmp_path / "none", pretrained_model_name_or_path=tmp_path / "missing") == 2
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_PACKAGE, str(tmp_path / "first")]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "2 images" in shown.stdout, shown.stderr[-2000:]
