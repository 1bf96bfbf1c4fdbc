"""AdamW for everything, or Muon for the matrices of a network and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MIN_MATRIX_SIDE = 16  # below it a matrix has too few directions to be worth balancing


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the hidden matrices, AdamW on embeddings' and outputs' small ones, biases and normalisations.

    Muon replaces the momentum of a matrix by the nearest orthogonal one, so that every direction learns at the same pace. A
    convolution's weight (out, in, h, w) counts as a matrix (out, in h w). Its step is scaled to AdamW's root mean square,
    so that one learning rate and one weight decay serve both.

    Raises:
        ValueError: a torch without Muon (before 2.9), or a network without a matrix large enough.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is scalable
        for LLM training", equation 4 (the scale).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
        fused: bool,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"Muon needs torch 2.9 or newer, got {torch.__version__}: use --optimizer adamw.")
        parameters = list(parameters)
        self.matrices = [p for p in parameters if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= MIN_MATRIX_SIDE]
        if not self.matrices:
            raise ValueError(
                f"Muon needs a matrix of at least {MIN_MATRIX_SIDE} rows and columns: use --optimizer adamw."
            )
        chosen = {id(p) for p in self.matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        super().__init__(parameters, {})
        # Muon takes matrices only, and a weight in another memory format has no view as one: it works on copies
        self.copies = [nn.Parameter(p.detach().flatten(1).clone()) for p in self.matrices]
        self.muon = torch.optim.Muon(self.copies, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=fused)
        self.param_groups = self.adamw.param_groups + self.muon.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.matrices:
            parameter.grad = None if set_to_none else torch.zeros_like(parameter)
        self.adamw.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrix, copy in zip(self.matrices, self.copies, strict=True):
            copy.copy_(matrix.flatten(1))
            copy.grad = None if matrix.grad is None else matrix.grad.flatten(1)
        self.muon.step()
        self.adamw.step()
        for matrix, copy in zip(self.matrices, self.copies, strict=True):
            matrix.copy_(copy.view(matrix.shape))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both; the weights themselves are the network's."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of both."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.adamw.param_groups + self.muon.param_groups  # loading has replaced the groups


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """`adamw` or `muon` (with AdamW for what is not a matrix)."""
    kind = {"adamw": torch.optim.AdamW, "muon": MuonWithAdamW}[name]
    return kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=fused)
