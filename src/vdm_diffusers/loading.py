"""One function that loads a model, for every door: a folder of ours, a repository of the Hub, a stock pipeline of
Diffusers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from vdm_diffusers.manifest import MANIFEST, CheckpointError, verify
from vdm_diffusers.models import HierarchicalVAE, VariationalAutoencoder
from vdm_diffusers.pipelines import LatentVDMPipeline, VDMPipeline
from vdm_diffusers.safety import check_location, parse_json
from vdm_diffusers.schedulers import VDMScheduler

HUB = "hf://"
CONFIGS = ("model_index.json", "config.json")  # of a pipeline, of a model by itself
OURS: dict[str, Any] = {
    cls.__name__: cls for cls in (VDMPipeline, LatentVDMPipeline, VariationalAutoencoder, HierarchicalVAE)
}


def is_on_hub(checkpoint: str) -> bool:
    """Whether `checkpoint` names a repository of the Hub: "hf://owner/name", or "owner/name" where there is no such
    folder.

    Raises:
        CheckpointError: it looks like a path, and there is nothing.
    """
    if checkpoint.startswith(HUB):
        return True
    if os.path.isdir(checkpoint):
        return False
    owner, slash, name = checkpoint.partition("/")
    # a name whose first part is a folder here is a mistyped path
    if not (slash and name) or os.path.isdir(owner):
        raise CheckpointError(
            f"there is no folder {checkpoint}. Train one (make demo), or name another with --checkpoint; a repository "
            "of the Hub is "
            f"called {HUB}owner/name."
        )
    try:
        check_location(checkpoint)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from None
    return True


def folder_name(checkpoint: str) -> str:
    """A name for what is written about a repository: "owner--name"."""
    return checkpoint.removeprefix(HUB).replace("@", "/").replace("/", "--")


Model = VDMPipeline | LatentVDMPipeline | VariationalAutoencoder | HierarchicalVAE


def load_model(checkpoint: str, device: torch.device | str = "cpu") -> Model:
    """A VDMPipeline with its exact scheduler, a VAE, or a LatentVDMPipeline, from safetensors alone.

    Arguments:
        checkpoint: a folder, whose manifest is compared if train.py wrote one; "owner/name", or "hf://owner/name", or
            "hf://owner/name@revision".
    Raises:
        CheckpointError: it is damaged, not there, or no model.
        UnsafeCheckpointError: see `vdm_diffusers.safety`.
    """
    if is_on_hub(checkpoint):
        repo_id, _, revision = checkpoint.removeprefix(HUB).partition("@")
        return _load(repo_id, revision or None).to(device)
    folder = Path(checkpoint)
    if (folder / MANIFEST).is_file():
        verify(folder)
    if not any((folder / name).is_file() for name in CONFIGS):
        present = ", ".join(sorted(path.name for path in folder.glob("checkpoint-*"))) or "none"
        raise CheckpointError(f"{folder} holds no finished pipeline; checkpoints in it: {present}.")
    return _load(checkpoint, None).to(device)


def _load(source: str, revision: str | None) -> Any:
    name, is_pipeline = _class_name(source, revision)
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    if name in OURS:
        model = OURS[name].from_pretrained(source, **options)
        return model if is_pipeline else model.eval()
    if not is_pipeline:
        raise CheckpointError(f"{source} holds a {name}: a pipeline is needed, or one of {', '.join(OURS)}.")
    stock = DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
    return VDMPipeline.from_pipe(stock, scheduler=VDMScheduler.from_config(stock.scheduler.config))


def _class_name(source: str, revision: str | None) -> tuple[str, bool]:
    """The class that a checkpoint says it is of, and whether that is a pipeline."""
    for config in CONFIGS:
        if os.path.isdir(source):
            path = os.path.join(source, config)
            if not os.path.isfile(path):
                continue
        else:
            try:
                path = hf_hub_download(source, config, revision=revision)
            except LocalEntryNotFoundError:
                raise CheckpointError(
                    f"the Hub does not answer, and {source} is not in the cache. Try again later, or name a folder "
                    "with --checkpoint."
                ) from None
            except EntryNotFoundError:
                continue
            except HfHubHTTPError as error:
                raise CheckpointError(f"{source} cannot be read from the Hub: {str(error).splitlines()[0]}") from None
        return str(parse_json(Path(path).read_bytes(), config).get("_class_name")), config == CONFIGS[0]
    raise CheckpointError(f"{source} holds neither {CONFIGS[0]} nor {CONFIGS[1]}: it is no model.")
