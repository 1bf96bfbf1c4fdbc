"""Sharing an evaluation among processes, and keeping its partial results in a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vdm_diffusers.evaluation.adapters import Predictor
from vdm_diffusers.likelihood import Decoder, DenoisingModel, DiffusionTerm, DiscreteTerm


def draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def rank_and_size(accelerator: Any) -> tuple[int, int]:
    """This process and how many there are."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def shared_seed(generator: torch.Generator | None, accelerator: Any) -> int:
    """A seed drawn from `generator`: the first process's, everywhere."""
    seed = [draw_seed(generator)]
    if rank_and_size(accelerator)[1] > 1:
        torch.distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def run_shared(
    folder: Path | None, accelerator: Any, work: Sequence[tuple[str, Callable[[], Tensor]]]
) -> list[Tensor]:
    """Every process does its share and gets all results; what is found in `folder` is not done again."""
    rank, size = rank_and_size(accelerator)
    mine = {}
    for number, (name, compute) in enumerate(work):
        if number % size == rank:
            mine[number] = compute() if folder is None else _kept(folder / f"{name}.safetensors", compute)
    everything: list[dict[int, Tensor]] = [mine]
    if size > 1:
        everything = [{}] * size
        torch.distributed.all_gather_object(everything, mine)
    results = {number: result for part in everything for number, result in part.items()}
    return [results[number] for number in range(len(work))]


def _kept(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor in `file`, or one computed now and written there, whole or not at all."""
    if file.exists():
        return load_file(file)["result"]
    result = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({"result": result}, unfinished)
    unfinished.replace(file)
    return result


def resume_folder(
    parent: Path,
    network: Callable[..., Any],
    model: DenoisingModel,
    levels: Tensor,
    identity: dict[str, Any],
    term: DiffusionTerm | None,
    decoder: Decoder,
) -> Path:
    """A folder that only an evaluation of the same weights, images and settings finds again."""
    digest = hashlib.sha256(repr((sorted(identity.items()), decoder, tuple(levels.shape))).encode())
    tensors = [levels, *(network.state_dict().values() if isinstance(network, nn.Module) else ())]
    if isinstance(model.predict, Predictor):
        tensors += [value for _, value in sorted(model.predict.per_image.items())]
    if isinstance(term, DiscreteTerm):
        tensors += [term.grid, *([term.optimal.log_snr, term.optimal.mse] if term.optimal is not None else [])]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return parent / digest.hexdigest()[:24]
