"""Weights, gradients, optimiser states and the average divided among the processes: FSDP2, or ZeRO-3 by another name.

Accelerate's configuration says whether and how (training/accelerate_configs/fsdp.yaml); the dividing is PyTorch's
`fully_shard`, here and not by `Accelerator.prepare`, so that one code runs on GPUs and, where the tests are, on CPUs.
Weights stay in float32 and autocast does the rest, as without dividing: the run is the same run. What is saved,
evaluated and sampled is gathered: a checkpoint does not say how many processes wrote it, nor whether they shared the
weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, convert_outputs_to_fp32, str_to_bool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

MIN_NUM_PARAMS = 1_000_000  # of a unit, where the configuration names neither a size nor classes


@dataclass(frozen=True)
class Sharding:
    """What is asked for.

    Attributes:
        reshard_after_forward: free a unit's gathered weights after its forward pass and gather them again for the
            backward pass (ZeRO-3); else keep them until then (ZeRO-2's memory and communication).
        min_num_params: weights of a unit that is gathered at once, at least.
        class_names: of the modules that are units, instead.
        gradient_checkpointing: compute activations again in the backward pass.
    """

    reshard_after_forward: bool = True
    min_num_params: int = MIN_NUM_PARAMS
    class_names: frozenset[str] = frozenset()
    gradient_checkpointing: bool = False


def requested_sharding(accelerator: Accelerator) -> Sharding | None:
    """What Accelerate's configuration asks for; None: nothing.

    Raises:
        ValueError: something of FSDP that is not done here; the message says what.
    """
    # Accelerate knows FSDP on accelerators alone; on CPUs its launcher's environment says what was meant
    if accelerator.distributed_type != DistributedType.FSDP and not (
        accelerator.distributed_type == DistributedType.MULTI_CPU
        and str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    ):
        return None
    plugin = accelerator.state.fsdp_plugin if accelerator.device.type != "cpu" else FullyShardedDataParallelPlugin()
    wanted = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_offload_params: false (weights stay on the device)": not isinstance(
            plugin.cpu_offload, CPUOffloadPolicy
        ),
        "mixed_precision bf16 or no (the loss scaling of fp16 knows no divided gradients)": accelerator.scaler is None,
        "no parallelism_config": accelerator.parallelism_config is None,
    }
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise ValueError(f"FSDP needs {', and '.join(missing)}: see training/accelerate_configs/fsdp.yaml.")
    return Sharding(
        bool(plugin.reshard_after_forward),
        plugin.min_num_params or MIN_NUM_PARAMS,
        frozenset(plugin.transformer_cls_names_to_wrap or ()),
        plugin.activation_checkpointing,
    )


def shard(network: nn.Module, sharding: Sharding, device: torch.device, *, compile: bool = False) -> None:
    """Divide the weights of `network` among all processes, in place; its class becomes a subclass.

    Units are found from the innermost modules outwards. With `compile` each is compiled by itself: between them lies
    the gathering.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in _units(network, sharding):
        if compile:
            module.compile()
        fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    if compile and not any(isinstance(module, FSDPModule) for module in network.modules()):
        network.compile()
    # the root's own weights are needed last and first
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def _units(network: nn.Module, sharding: Sharding) -> list[nn.Module]:
    units: list[nn.Module] = []

    def visit(module: nn.Module) -> int:
        """The weights of `module` that are in no unit yet."""
        free = sum(p.numel() for p in module.parameters(recurse=False)) + sum(map(visit, module.children()))
        callable_ = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        chosen = (
            type(module).__name__ in sharding.class_names if sharding.class_names else free >= sharding.min_num_params
        )
        if module is network or not (chosen and callable_ and free):
            return free
        units.append(module)
        return 0

    visit(network)
    return units


def in_precision(network: nn.Module, accelerator: Accelerator) -> Callable[..., Any]:
    """The network's call under the run's autocast, its result in float32: what `Accelerator.prepare` does to
    others.
    """

    def call(*inputs: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return network(*inputs, **named)

    return convert_outputs_to_fp32(call)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; the tensor itself where it is whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    mine: Any = tensor.detach()
    return mine.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(state: Mapping[str, Any], device: torch.device | str | None) -> dict[str, Any]:
    """A copy of nested dictionaries and lists, with all of every tensor on `device`; every process must ask.

    None: nothing is kept here (another process keeps it); the values are meaningless.
    """

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = whole(value.detach())
            return None if device is None else value.to(device, copy=True).contiguous()
        if isinstance(value, Mapping):
            return {key: visit(entry) for key, entry in value.items()}
        return [visit(entry) for entry in value] if isinstance(value, list) else value

    return {key: visit(value) for key, value in state.items()}


def load_gathered_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give each process its share of an optimiser's gathered state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divided(value: Any, like: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != like.shape or not isinstance(like, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

    entries = {
        index: {name: divided(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


@torch.no_grad()
def clip_divided_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale divided gradients to a norm of at most `limit`; returns the norm before, of all processes' shares
    together.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    squared = torch.nn.utils.get_total_norm(gradients).square()
    dist.all_reduce(squared)
    norm = squared.sqrt()
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
