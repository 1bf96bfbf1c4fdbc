"""A denoiser of vectors: features of another network, rows of a table."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

_EMBEDDED_RANGE = 1000.0


class VDMMLPBlock(nn.Module):
    """LayerNorm, linear, SiLU with the embedding added, linear, added to the input. The identity when newly made."""

    def __init__(self, width: int, time_embed_dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, width)
        self.time_emb_proj = nn.Linear(time_embed_dim, width)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, hidden_states: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.linear1(self.norm(hidden_states)) + self.time_emb_proj(emb))
        return hidden_states + self.linear2(self.dropout(h))


class VDMMLPModel(ModelMixin, ConfigMixin):
    r"""A residual network for vectors `(B, D)`, called as Diffusers' models are: `(sample, timestep) -> .sample`.

    With `residual_connection` the output is `net(z) + z`, right for predictions of the noise where `z` is nearly all
    noise; a new network gives exactly `z`.

    Args:
        in_channels: `D`, numbers of a vector.
        hidden_channels: width of every layer.
        num_layers: residual blocks of two linear layers.
        num_train_timesteps: `T` of the timestep coordinate, as in [`VDMUNet2DModel`].
        num_class_embeds: number of classes `K`; label `K` means "no class". `None`: no class conditioning.
        dropout: probability, before the second linear layer of every block.
        residual_connection: add `z` to the output.

    Raises:
        ValueError: a size that is not positive.
    """

    __module__ = "vdm_diffusers"
    _supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = ["VDMMLPBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 256,
        num_layers: int = 4,
        num_train_timesteps: int = 1000,
        num_class_embeds: int | None = None,
        dropout: float = 0.0,
        residual_connection: bool = True,
    ):
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "hidden_channels": hidden_channels,
            "num_layers": num_layers,
            "num_train_timesteps": num_train_timesteps,
        }
        for name, size in sizes.items():
            if not 1 <= size <= 2**16:
                raise ValueError(f"`{name}` must lie in 1..{2**16}, got {size}.")
        if hidden_channels < 4:
            raise ValueError(f"`hidden_channels` must be at least 4 to hold the sinusoids, got {hidden_channels}.")
        self.time_embedding = TimestepEmbedding(hidden_channels, hidden_channels)
        self.class_embedding = nn.Embedding(num_class_embeds + 1, hidden_channels) if num_class_embeds else None
        self.linear_in = nn.Linear(in_channels, hidden_channels)
        self.blocks = nn.ModuleList(VDMMLPBlock(hidden_channels, hidden_channels, dropout) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(hidden_channels)
        self.linear_out = nn.Linear(hidden_channels, in_channels)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The prediction at the noisy `sample`, `(B, in_channels)`, in its dtype.

        Args:
            sample: `(B, in_channels)`.
            timestep: a number, `()` or `(B,)`, in [-1, T - 1].
            class_labels: `(B,)`, if and only if the model has `num_class_embeds`.
            return_dict: return a `UNet2DOutput` with `.sample`, else a tuple of one.
        Raises:
            ValueError: a sample of another shape; labels missing or not expected.
        """
        if sample.ndim != 2 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"`sample` must have shape (B, {self.config.in_channels}), got {tuple(sample.shape)}.")
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                f"`class_labels` are {'needed' if class_labels is None else 'not expected'} by this model."
            )
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).float()
        position = _EMBEDDED_RANGE * (time + 1) / self.config.num_train_timesteps
        emb = self.time_embedding(get_timestep_embedding(position, self.config.hidden_channels).to(self.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(class_labels)
        emb = F.silu(emb)
        hidden_states = self.linear_in(sample.to(self.dtype))
        for block in self.blocks:
            hidden_states = block(hidden_states, emb)
        output = self.linear_out(F.silu(self.norm_out(hidden_states))).to(sample.dtype)
        if self.config.residual_connection:
            output = output + sample
        return UNet2DOutput(sample=output) if return_dict else (output,)
