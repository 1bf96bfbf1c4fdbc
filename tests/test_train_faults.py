"""train.py is killed, told to stop and left without disk, again and again; what comes out is the unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train
import yaml
from checkpoints import list_checkpoints, step_of, verify
from safetensors.torch import load_file
from test_train_script import TINY

STEPS, KILLS, LIMIT = 240, 20, 2

# Imports once, then forks a process for every run. In the fork an audit hook counts what is done to the file system
# (every open for writing, mkdir, rename, remove, rmdir) and strikes just before operation number `at`.
NURSERY = """
import json, os, resource, signal, sys, time
sys.path.insert(0, sys.argv[1])
import train

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def prepare(fault, counter):
    seen = 0
    def hook(event, args):
        nonlocal seen
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writing or event in CHANGES:
            seen += 1
            if fault["kind"] == "count":
                os.pwrite(counter, str(seen).encode(), 0)
            elif seen == fault.get("at"):
                os.kill(os.getpid(), fault["signal"])
    sys.addaudithook(hook)
    if fault["kind"] == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))

for line in sys.stdin:
    request = json.loads(line)
    fault = request["fault"]
    child = os.fork()
    if child == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        counter = os.open(request["log"] + ".count", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        prepare(fault, counter)
        sys.exit(train.main(request["argv"]))
    if fault["kind"] == "moment":
        time.sleep(fault["seconds"])
        os.kill(child, fault["signal"])
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(Path(train.__file__).parent)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=60)


def losses(output_dir: Path) -> dict[int, float]:
    entries = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def same(got: Path, want: Path) -> bool:
    got, want = load_file(got), load_file(want)
    return got.keys() == want.keys() and all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_whatever_happens_the_weights_are_those_of_the_unbroken_run(nursery, in_background, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    options = {"max_train_steps": STEPS, "checkpointing_steps": 3, "checkpoints_total_limit": LIMIT}
    recipe.write_text(yaml.safe_dump({**TINY, **options, "async_checkpoints": in_background}))

    def run(output_dir, fault):
        argv = [f"--config={recipe}", f"--output_dir={output_dir}", "--resume_from_checkpoint=latest"]
        nursery.stdin.write(json.dumps({"argv": argv, "fault": fault, "log": str(tmp_path / "log")}) + "\n")
        nursery.stdin.flush()
        return int(nursery.stdout.readline())

    def said():
        return (tmp_path / "log").read_text()

    unbroken = tmp_path / "unbroken"
    assert run(unbroken, {"kind": "count"}) == 0, said()
    a_save = (
        int((tmp_path / "log.count").read_text()) * 3 // STEPS
    )  # operations from one checkpoint to the next, or so
    largest = max(path.stat().st_size for path in list_checkpoints(unbroken)[-1].rglob("*"))

    def assert_is_the_unbroken_run(output_dir):
        for part in (Path("unet") / "diffusion_pytorch_model.safetensors", state):
            assert same(output_dir / part, unbroken / part)
        assert losses(output_dir) == losses(unbroken)
        assert not list(output_dir.glob(".incomplete-*"))
        assert not list(output_dir.glob(".discarded-*"))

    state = Path(f"checkpoint-{STEPS}") / "training_state" / "weights.safetensors"
    generator = random.Random(0)

    def operation(which):
        return {"kind": "operation", "at": generator.randint(1, 4 * a_save), "signal": which}

    faults = [operation(signal.SIGKILL) for _ in range(KILLS)] + [operation(signal.SIGTERM) for _ in range(3)]
    faults += [{"kind": "moment", "seconds": generator.uniform(0.1, 1.5), "signal": signal.SIGKILL} for _ in range(6)]
    faults += [{"kind": "disk", "bytes": generator.randrange(largest)} for _ in range(4)]
    generator.shuffle(faults)
    outcomes, runs = [], 1
    for fault in faults:
        output_dir = tmp_path / f"run-{runs}"
        before = max(map(step_of, list_checkpoints(output_dir)), default=0) if output_dir.exists() else 0
        code = run(output_dir, fault)
        outcomes.append(code)
        if code == 0 and fault["kind"] != "disk":  # the last steps were done before it struck: on with a new run
            assert_is_the_unbroken_run(output_dir)
            runs += 1
            continue
        kept = list_checkpoints(output_dir) if output_dir.exists() else []
        for folder in kept:
            verify(folder)  # what has the name is whole
        assert max(map(step_of, kept), default=0) >= before, (fault, said())  # and nothing is lost
        assert len(kept) <= LIMIT + 1
        if fault["kind"] == "disk":
            assert code == 1, said()
            assert "Traceback" not in said()
            assert "could not be written" in said() or "no room" in said()
        elif fault["signal"] == signal.SIGKILL:
            assert code == -signal.SIGKILL, said()
        else:
            assert code in (train.EXIT_TERMINATED, -signal.SIGTERM), said()  # the latter before the run has begun
    assert outcomes.count(-signal.SIGKILL) >= KILLS
    output_dir = tmp_path / f"run-{runs}"
    assert run(output_dir, {"kind": "none"}) == 0, said()
    assert_is_the_unbroken_run(output_dir)
    print(f"{len(outcomes)} faults in {runs} run(s) of {STEPS} steps, exit codes {outcomes}")
