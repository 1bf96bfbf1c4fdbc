"""A run's folder on a shared machine: who holds it, what is removed, which branch is resumed, which signals stop
it.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train
from accelerate import Accelerator
from checkpoints import atomic_folder, list_checkpoints, verify, without_nan
from output_folder import LOCK_FILE, FolderError, RunLock, check_output_dir, set_aside, start_anew
from run.launch import SetupError, micro_batches
from run.records import Log
from stopping import SIGNALS, StopSignal, Terminated

OWN = ("model_index.json", "README.md", "training_arguments.json")


def checkpoint(output_dir: Path, step: int) -> Path:
    with atomic_folder(output_dir / f"checkpoint-{step}") as folder:
        (folder / "weights").write_text(str(step))
    return output_dir / f"checkpoint-{step}"


def a_run(output_dir: Path, steps=(2, 4, 6)) -> Path:
    output_dir.mkdir()
    (output_dir / "training_arguments.json").write_text("{}")
    for step in steps:
        checkpoint(output_dir, step)
    return output_dir


def names(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


# --- one run at a time -----------------------------------------------------------------------------------------------


def test_a_living_run_holds_its_folder_and_a_dead_one_does_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        lock = RunLock(tmp_path)
        lock.acquire()
        holder = json.loads((tmp_path / LOCK_FILE).read_text())
        lock.release()
        assert not (tmp_path / LOCK_FILE).exists()
        start = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (tmp_path / LOCK_FILE).write_text(json.dumps(holder | {"pid": other.pid, "start": start}))
        with pytest.raises(FolderError, match=f"in use by process {other.pid} on "):
            RunLock(tmp_path).acquire()
        # the number of a process that has ended may be another's by now
        (tmp_path / LOCK_FILE).write_text(json.dumps(holder | {"pid": other.pid, "start": "1"}))
        RunLock(tmp_path).acquire()
        (tmp_path / LOCK_FILE).write_text(json.dumps(holder | {"pid": other.pid, "start": start}))
        other.kill()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize(("silent_for", "held"), [(5, True), (300, False)])
def test_another_machine_s_run_holds_the_folder_while_it_touches_the_lock(silent_for, held, tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "1"}))
    os.utime(path, (time.time() - silent_for,) * 2)
    if held:
        with pytest.raises(FolderError, match="process 1 on elsewhere"):
            RunLock(tmp_path).acquire()
    else:
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}'])
def test_half_a_lock_is_nobody_s(text, tmp_path):
    (tmp_path / LOCK_FILE).write_text(text)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()


# --- what is removed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logging_dir", ["/absolute", "..", ".", "../beside", "logs"])
def test_starting_anew_removes_what_a_run_wrote_inside_its_folder_and_nothing_else(logging_dir, tmp_path):
    output_dir, beside = a_run(tmp_path / "run"), tmp_path / "beside"
    beside.mkdir()
    (beside / "precious").write_text("keep")
    if logging_dir == "/absolute":
        logging_dir = str(beside)
    (output_dir / "notes.txt").write_text("keep")
    (output_dir / "logs").mkdir()
    check_output_dir(output_dir, OWN, resume=False, overwrite=True)
    start_anew(output_dir, OWN, logging_dir)
    assert (beside / "precious").read_text() == "keep"
    assert names(output_dir) == {"notes.txt"} | (set() if logging_dir == "logs" else {"logs"})


def test_a_folder_that_no_run_wrote_is_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FolderError, match=r"holds README.md, but no run of this script"):
        check_output_dir(tmp_path, OWN, resume=False, overwrite=True)
    (tmp_path / "README.md").rename(tmp_path / "other.md")
    check_output_dir(tmp_path, OWN, resume=False, overwrite=True)
    start_anew(tmp_path, OWN, "logs")
    assert names(tmp_path) == {"other.md"}


# --- branches --------------------------------------------------------------------------------------------------------


def test_going_back_sets_the_later_checkpoints_aside_and_damaged_ones_too(tmp_path):
    output_dir = a_run(tmp_path / "run", (2, 4, 6, 8))
    (output_dir / "checkpoint-8" / "weights").write_text("flipped")
    (output_dir / "checkpoint-999").mkdir()
    said = set_aside(output_dir, output_dir / "checkpoint-4")
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2", "checkpoint-4"]
    assert len(said) == 3 and any("checkpoint-6 is abandoned" in line for line in said)
    assert {"abandoned-checkpoint-6", "damaged-checkpoint-8", "damaged-checkpoint-999"} <= names(output_dir)
    checkpoint(output_dir, 6)
    set_aside(output_dir, output_dir / "checkpoint-4")
    assert {"abandoned-checkpoint-6", "abandoned-checkpoint-6-2"} <= names(output_dir)


def test_a_checkpoint_of_another_folder_starts_a_branch_of_its_own(tmp_path):
    elsewhere, output_dir = a_run(tmp_path / "elsewhere"), a_run(tmp_path / "run")
    set_aside(output_dir, elsewhere / "checkpoint-4")
    assert not list_checkpoints(output_dir) and len(list_checkpoints(elsewhere)) == 3


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_every_signal_that_means_stop_is_heard_and_given_back(number):
    before = signal.getsignal(number)
    stop = StopSignal(Accelerator(cpu=True))
    try:
        assert not stop.agreed(1)
        os.kill(os.getpid(), number)
        assert stop.agreed(1) and stop.name == number.name
        with pytest.raises(Terminated) as error, stop.at_once():
            pytest.fail("left before")
        assert error.value.code == 128 + number
    finally:
        stop.restore()
    assert signal.getsignal(number) == before


def test_a_signal_while_nothing_can_be_lost_ends_at_once():
    stop = StopSignal(Accelerator(cpu=True))
    try:
        with pytest.raises(Terminated), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            pytest.fail("slept on")
    finally:
        stop.restore()


def test_an_orphan_of_its_launcher_stops(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stop = StopSignal(Accelerator(cpu=True))
    try:
        assert not stop.agreed(1)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.agreed(2) and stop.name == "SIGTERM"
    finally:
        stop.restore()


# --- the rest of a run -----------------------------------------------------------------------------------------------


def test_json_has_no_nan():
    value = {"a": math.nan, "b": [1.0, -math.inf, {"c": math.nan}], "d": "nan", "e": 3}
    assert json.loads(json.dumps(without_nan(value), allow_nan=False)) == {
        "a": None,
        "b": [1.0, None, {"c": None}],
        "d": "nan",
        "e": 3,
    }


@pytest.mark.parametrize(("asked", "processes", "expected"), [(None, 4, 3), (64, 4, 2), (64, 1, 8), (20, 4, None)])
def test_a_global_batch_is_the_same_on_any_number_of_processes(asked, processes, expected):
    from arguments import OptimizationArguments

    options = OptimizationArguments(train_batch_size=8, gradient_accumulation_steps=3, global_batch_size=asked)
    if expected is None:
        with pytest.raises(SetupError, match="--global_batch_size 20 must be a multiple"):
            micro_batches(options, processes)
    else:
        assert micro_batches(options, processes) == expected


def test_one_image_a_full_log_and_the_manifest_of_the_result(tmp_path, capsys, monkeypatch):
    """The whole of a small run with one held-out image, on a disk that has no room for its log."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    write = Log.write
    full = iter([True, True])

    def refuse(self, step, values):
        if next(full, False):
            monkeypatch.setattr(self, "path", Path("/dev/full"))
            write(self, step, values)
            monkeypatch.setattr(self, "path", tmp_path / "run" / "metrics.jsonl")
        else:
            write(self, step, values)

    monkeypatch.setattr(Log, "write", refuse)
    options = {
        "output_dir": tmp_path / "run",
        "hidden_channels": 8,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "optimizer": "adamw",
        "lr_warmup_steps": 1,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "logging_steps": 1,
        "eval_max_images": 1,
        "eval_num_samples": 2,
        "num_sample_images": 1,
        "ddpm_num_inference_steps": 2,
        "logger": "none",
    }
    assert train.main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0
    assert capsys.readouterr().out.count("the log could not be written") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/sampling_error"] is None and "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    verify(tmp_path / "run")
    weights = tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(train.CheckpointError, match="damaged"):
        verify(tmp_path / "run")
