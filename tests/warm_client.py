"""Clean processes with fresh caches, without paying the import of Diffusers each time.

One interpreter imports torch, huggingface_hub and Diffusers, and nothing of this package; every piece of code then
runs in a fork of it that nothing else has touched, with an empty folder where the environment said that the cache is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub_double import HubDouble

_SERVER = """
import contextlib, io, json, os, shutil, sys, tempfile, traceback
import torch, huggingface_hub, diffusers
from diffusers import (AutoModel, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel)
import diffusers.pipelines.pipeline_utils, diffusers.callbacks
torch.set_num_threads(1)
assert "vdm_diffusers" not in sys.modules
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever is printed is no answer
home = os.environ["HF_HOME"]
for line in sys.stdin:
    task = json.loads(line)
    if task["fresh"]:
        shutil.rmtree(home, ignore_errors=True)
    os.makedirs(home, exist_ok=True)
    answer = task["answer"]
    child = os.fork()
    if child == 0:
        out = os.open(answer + ".out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        err = os.open(answer + ".err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(err, 2)
        code = 1
        try:
            os.environ.update(task["env"])
            tempfile.tempdir = None  # found anew: TMPDIR may have changed
            sys.argv = ["-c", *task["args"]]
            exec(compile(task["code"], "<client>", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=channel, flush=True)
"""


class WarmClient:
    """`client(code, *args)` is `HubDouble.client` for one home; `fresh=False` keeps the cache of the call before."""

    def __init__(self, hub: HubDouble, home: Path, xet: bool = False, **env: str):
        self.home = Path(home)
        self.calls = 0
        self.home.mkdir(parents=True, exist_ok=True)
        self.env = hub.env(self.home / "home", xet=xet) | env
        self.log = (self.home / "server.err").open("w")
        self.server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], env=self.env, text=True, stderr=self.log,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> WarmClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()
        self.log.close()

    def __call__(self, code: str, *args: object, fresh: bool = True, **env: str) -> Any:
        """Run `code` in a fork; what its last printed line says in JSON. Its standard error is in `self.stderr`."""
        answer = self.home / f"answer-{self.calls}"
        self.calls += 1
        task = {"code": code, "args": [*map(str, args)], "fresh": fresh, "env": env, "answer": str(answer)}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        status = self.server.stdout.readline().strip()
        if not status:
            raise AssertionError(f"the interpreter died:\n{(self.home / 'server.err').read_text()}")
        out, self.stderr = (answer.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        if status != "0":
            raise AssertionError(f"the client failed ({status}):\n{out}\n{self.stderr}")
        return json.loads(out.splitlines()[-1]) if out.strip() else None
