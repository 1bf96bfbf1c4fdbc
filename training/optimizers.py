"""AdamW for everything, or Muon for the matrices of a network and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MIN_MATRIX_SIDE = 16  # below it a matrix has too few directions to be worth balancing


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one kernel, with the lists of its tensors made once.

    The steps and states of `torch.optim.AdamW(fused=True)`, bit for bit. That one collects and sorts weights,
    gradients and states at every step: for a network of a hundred small weights several times the kernel's work.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
    ) -> None:
        self._states: tuple[list[Tensor], list[Tensor], list[Tensor], Tensor] | None = None
        super().__init__(weights, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        """One step; PyTorch's own where not all weights have a gradient, are divided, or float16's scaling takes
        part.
        """
        group = self.param_groups[0]
        gradients = [parameter.grad for parameter in group["params"]]
        plain = closure is None and all(gradient is not None for gradient in gradients)
        if self._states is None or not plain or getattr(self, "found_inf", None) is not None:
            self._states = None
            loss = super().step(closure)
            if plain and _alike(group["params"]):
                self._collect(group["params"])
            return loss
        means, squares, steps, all_steps = self._states
        all_steps.add_(1)
        torch._fused_adamw_(
            group["params"], gradients, means, squares, [], steps,
            amsgrad=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        return None

    def _collect(self, parameters: list[nn.Parameter]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        # the weights' counts of steps become views of one tensor, which one addition moves
        all_steps = torch.stack([state["step"] for state in states])
        steps = list(all_steps.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        self._states = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], steps, all_steps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of `state_dict`."""
        super().load_state_dict(state_dict)
        self._states = None


def _alike(tensors: list[nn.Parameter]) -> bool:
    """Whether one kernel can take them all: whole, of one device and dtype."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    return len(kinds) == 1 and not any(isinstance(tensor, DTensor) for tensor in tensors)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the convolutions' kernels and the attention's matrices, AdamW on what embeds, normalises, shifts and
    puts out.

    Muon replaces the momentum of a matrix by (nearly) the nearest orthogonal one, so that every direction learns at
    the same pace. A kernel (out, in, h, w) counts as a matrix (out, in h w). Its step is scaled to AdamW's root mean
    square, 0.2 sqrt(max(out, in h w)), so that one learning rate and one weight decay serve both. Matrices of one
    shape are stacked: `torch.optim.Muon`, which takes the same steps, needs three times as long for a network of many
    small ones.

    Raises:
        ValueError: a network without a matrix that is large enough.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
        scalable for LLM training", equation 4 (the scale).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
        fused: bool,
        momentum: float = 0.95,
    ) -> None:
        stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        rest = []
        for name, parameter in parameters:
            shape = (parameter.shape[0], parameter[0].numel()) if parameter.ndim > 1 else (1, 1)
            if min(shape) < MIN_MATRIX_SIDE or "embed" in name or "time_emb" in name or "conv_in" in name:
                rest.append(parameter)
            else:
                stacks.setdefault(shape, []).append(parameter)
        if not stacks:
            raise ValueError(
                f"Muon needs a matrix of at least {MIN_MATRIX_SIDE} rows and columns: use --optimizer adamw."
            )
        self.stacks = list(stacks.values())
        self.momentum = momentum
        self.buffers: list[Tensor] | None = None
        matrices = [parameter for stack in self.stacks for parameter in stack]
        super().__init__([{"params": matrices, "lr": lr, "weight_decay": weight_decay}], {})
        self.adamw = _adamw(fused)(rest, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.adamw.step()
        group = self.param_groups[0]
        if self.buffers is None:
            self.buffers = [torch.stack([p.flatten(1) for p in stack]).zero_() for stack in self.stacks]
        for stack, buffer in zip(self.stacks, self.buffers, strict=True):
            # weights without a gradient, which a stage of a training does not reach, stay as they are
            rows = [i for i, parameter in enumerate(stack) if parameter.grad is not None]
            if not rows:
                continue
            reached = [stack[i] for i in rows]
            gradient = torch.stack([g.flatten(1) for parameter in reached if (g := parameter.grad) is not None])
            momentum = buffer if len(rows) == len(stack) else buffer[rows]
            momentum.lerp_(gradient, 1 - self.momentum)
            if momentum is not buffer:
                buffer[rows] = momentum
            torch._foreach_mul_(list[Tensor](reached), 1 - group["lr"] * group["weight_decay"])
            update = orthogonalize(gradient.lerp_(momentum, self.momentum))  # Nesterov's momentum
            scale = -group["lr"] * 0.2 * math.sqrt(max(update.shape[1:]))
            for parameter, matrix in zip(reached, update, strict=True):
                parameter.add_(matrix.view(parameter.shape), alpha=scale)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both; the weights themselves are the network's."""
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {"muon": {"group": group, "buffers": self.buffers}, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of both."""
        self.param_groups[0].update(state_dict["muon"]["group"])
        buffers, device = state_dict["muon"]["buffers"], self.stacks[0][0].device
        self.buffers = None if buffers is None else [buffer.to(device) for buffer in buffers]
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups[1:] = self.adamw.param_groups  # loading has replaced the groups


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """(n, rows, columns) -> the matrices with their singular values moved to about 1, by a quintic Newton-Schulz
    iteration.

    X <- a X + (b X X^T + c (X X^T)^2) X from X / |X|. The coefficients are Jordan's: steepest at 0, not exact at 1
    (0.7 to 1.2).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # half the bits suffice where they are twice as fast
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizer(
    name: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """`adamw`, or `muon` with AdamW for the rest, for a network's `named_parameters()`."""
    if name == "muon":
        return MuonWithAdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=fused)
    weights = [parameter for _, parameter in parameters]
    return _adamw(fused)(weights, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)


def _adamw(fused: bool) -> type[torch.optim.AdamW]:
    return FusedAdamW if fused else torch.optim.AdamW


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most `limit`; returns the norm before.

    `torch.nn.utils.clip_grad_norm_` without its sorting.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
