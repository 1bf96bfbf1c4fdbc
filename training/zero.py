"""Optimiser states (and gradients) divided among the processes by DeepSpeed: ZeRO-1 and ZeRO-2.

Accelerate's configuration says whether and how (training/accelerate_configs/deepspeed_zero2.yaml); DeepSpeed's engine
is started here and not by `Accelerator.prepare`, so that the trainer's arguments hold and one code runs on GPUs and,
where the tests are, on CPUs. Weights stay in float32 and autocast does the rest, as without dividing: the run is the
same run. The optimiser's state is gathered weight by weight and saved as PyTorch's own: a checkpoint does not say how
many processes wrote it, nor whether with DeepSpeed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, convert_outputs_to_fp32, str_to_bool
from torch import Tensor, nn

BUCKET = (
    50_000_000  # weights exchanged at once, unless the configuration says otherwise; DeepSpeed's own is ten times it
)
MOMENTS = ("exp_avg", "exp_avg_sq")


def requested_zero(accelerator: Accelerator) -> dict[str, Any] | None:
    """DeepSpeed's configuration as far as it is not train.py's arguments; None: nothing is asked of DeepSpeed.

    Raises:
        ValueError: something of DeepSpeed that is not done here; the message says what.
    """
    # Accelerate knows DeepSpeed on accelerators alone; on CPUs its launcher's environment says what was meant
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
    elif accelerator.distributed_type == DistributedType.MULTI_CPU and str_to_bool(
        os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")
    ):
        config = DeepSpeedPlugin().deepspeed_config
    else:
        return None
    options = {key: value for key, value in config["zero_optimization"].items() if value not in (None, "auto")}
    offloaded = {options.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
    wanted = {
        "zero_stage 1 or 2 (ZeRO-3 is training/accelerate_configs/fsdp.yaml)": options.get("stage") in (1, 2),
        "offload_optimizer_device and offload_param_device none": offloaded == {"none"},
        "mixed_precision bf16 or no": accelerator.mixed_precision in ("bf16", "no"),
        "neither an optimizer nor a scheduler in its file (train.py has its own)": not {"optimizer", "scheduler"}
        & config.keys(),
        "no parallelism_config": accelerator.parallelism_config is None,
    }
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise ValueError(
            f"DeepSpeed needs {', and '.join(missing)}: see training/accelerate_configs/deepspeed_zero2.yaml."
        )
    ours = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    kept = {key: value for key, value in config.items() if key not in ours | {"fp16", "bf16"} and value != "auto"}
    return kept | {"zero_optimization": options}


class ZeroEngine:
    """DeepSpeed's engine around a network and an AdamW over all its weights, with the trainer's arguments.

    Args:
        config: of `requested_zero`.
        max_grad_norm: gradients are scaled to a norm of at most this; 0 leaves them.
        accumulation: micro-batches in an optimiser step.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        accelerator: Accelerator,
        *,
        rows: int,
        accumulation: int,
        max_grad_norm: float,
    ) -> None:
        self.device = accelerator.device
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        if self.device.type == "cpu":
            # For inference on CPUs DeepSpeed compiles a reduction through shared memory, which training does not call.
            # A compilation that was killed leaves a lock behind, and every later run waits for it for ever.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.optimizer, self.parameters = optimizer, list(network.parameters())
        bucket = min(BUCKET, sum(parameter.numel() for parameter in self.parameters))
        config = {
            **config,
            "zero_optimization": {"reduce_bucket_size": bucket} | config["zero_optimization"],
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": rows * accumulation * accelerator.num_processes,
            "gradient_clipping": max_grad_norm,
        }
        if accelerator.mixed_precision == "bf16":
            # autocast with weights in float32; no modules named: gradients are exchanged in float32
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        self.engine = deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]
        self._call = convert_outputs_to_fp32(self.engine.__call__)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The network's call under the run's autocast, its result in float32."""
        return self._call(*inputs, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch's loss, of which `last` is the optimiser step's last; its share of it."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> Tensor:
        """Clip, step and drop the gradients; returns their norm before. Where it is not finite nothing moves."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)

    def _shares(self) -> Iterator[tuple[int, nn.Parameter, slice, slice]]:
        """Of each weight that this process moves some of: its number, itself, which of its elements, and where they
        lie.
        """
        for index, parameter in enumerate(self.parameters):
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield (
                    index,
                    parameter,
                    slice(here.start, here.start + here.numel),
                    slice(there.start, there.start + there.numel),
                )

    @torch.no_grad()
    def gathered_optimizer(self, device: torch.device | str | None) -> dict[str, Any]:
        """The optimiser's `state_dict` as it is without DeepSpeed, its tensors on `device`; every process must ask.

        None: nothing is kept here (another process keeps it); the moments are None.
        """
        state = self.optimizer.state_dict()
        numbers = list(range(len(self.parameters)))
        groups = [{**state["param_groups"][0], "params": numbers}]
        if not state["state"]:  # before the first step
            return {"state": {}, "param_groups": groups}
        (own,) = state["state"].values()
        shares = {index: places for index, _, *places in self._shares()}
        entries: dict[int, dict[str, Tensor | None]] = {}
        for index, parameter in enumerate(self.parameters):
            entries[index] = {"step": own["step"].to("cpu", copy=True)}
            for name in MOMENTS:
                moment = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                if index in shares:
                    here, there = shares[index]
                    moment.view(-1)[here] = own[name][there]
                dist.all_reduce(moment)
                entries[index][name] = None if device is None else moment.to(device)
        return {"state": entries, "param_groups": groups}

    @torch.no_grad()
    def load_gathered_optimizer(self, state: dict[str, Any]) -> None:
        """Give each process its share of an optimiser's whole state."""
        entries = state["state"]
        (partition,) = self.optimizer.param_groups[0]["params"]
        own: dict[int, dict[str, Tensor]] = {}
        if entries:
            moments = {name: torch.zeros_like(partition) for name in MOMENTS}
            for index, _, here, there in self._shares():
                for name in MOMENTS:
                    moments[name][there] = entries[index][name].reshape(-1)[here].to(partition.device)
            own[0] = {"step": entries[0]["step"], **moments}
        self.optimizer.load_state_dict({"state": own, "param_groups": [{**state["param_groups"][0], "params": [0]}]})
