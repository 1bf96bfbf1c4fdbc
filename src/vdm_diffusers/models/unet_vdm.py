"""The network of Variational Diffusion Models: a U-Net's skip connections at one resolution, with Fourier features."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from vdm_diffusers.models.fourier import FourierFeatures, add_residual, check_residual_channels, check_sample

# The sinusoids of Diffusers and of VDM are laid out for an argument that runs over about a thousand steps.
_EMBEDDED_RANGE = 1000.0


def _zero_(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class VDMResnetBlock2D(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the embedding is added in the middle. The identity when newly made.

    Source: Kingma et al. 2021, appendix B; the last convolution and the projection of the embedding start at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_embed_dim: int,
        norm_num_groups: int,
        norm_eps: float,
        dropout: float,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else nn.Identity()
        )
        _zero_(self.time_emb_proj)
        _zero_(self.conv2)

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(hidden_states)))
        h = self.norm2(h + self.time_emb_proj(emb)[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        return self.conv_shortcut(hidden_states) + h


class VDMAttention2D(nn.Module):
    """Self-attention over all pixels, added to its input; the identity when newly made."""

    def __init__(self, channels: int, head_dim: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.group_norm = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)
        _zero_(self.to_out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        pixels = self.group_norm(hidden_states).flatten(2).transpose(1, 2)  # (B, H W, C)
        query, key, value = (
            layer(pixels).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, H W, head_dim)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out = self.to_out(attended.transpose(1, 2).flatten(2))
        return hidden_states + out.transpose(1, 2).reshape(batch, channels, height, width)


class VDMMidBlock2D(nn.Module):
    """ResNet block, self-attention (if wanted), ResNet block."""

    def __init__(self, resnets: Sequence[VDMResnetBlock2D], attention: VDMAttention2D | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention] if attention is not None else [])

    def forward(self, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.resnets[0](hidden_states, emb)
        for attention in self.attentions:
            hidden_states = attention(hidden_states)
        return self.resnets[1](hidden_states, emb)


class VDMUNet2DModel(ModelMixin, ConfigMixin):
    r"""The denoiser of Variational Diffusion Models, usable wherever Diffusers takes a `UNet2DModel`.

    `layers_per_block` ResNet blocks, a middle with self-attention, and `layers_per_block + 1` ResNet blocks that each
    take one skip connection from the first half; nothing is down- or upsampled, so that every layer sees the finest
    detail and images of any height and width fit. With `residual_connection` the output is `net(z) + z`, which at the
    noisy end, where `z` is nearly all noise, is already the right prediction of the noise; a new network gives exactly
    `z`.

    The defaults are the paper's network for CIFAR-10 (appendix B: 32 blocks of 128 channels, dropout 0.1).

    Dtypes: Fourier features and `+ z` are computed in float32 at least, whatever autocast or the weights say, and the
    output has the dtype of `sample`. With weights in half precision keep passing `sample` in float32: features of a
    rounded sample are noise (see [`FourierFeatures`]).

    Args:
        sample_size: height and width for which the model was trained: what pipelines sample. The network takes any.
        in_channels: channels of `sample`.
        out_channels: channels of the output; `None`: `in_channels`. More than `in_channels` makes room for a learned
            variance: the first `in_channels` are the prediction, and they alone receive `+ z`.
        hidden_channels: width of every layer.
        layers_per_block: ResNet blocks before the middle; one more stand after it.
        num_train_timesteps: `T` of the timestep coordinate (see `forward`); the scheduler's key of the same name.
        time_embedding_dim: width of the embedding; `None`: `4 * hidden_channels`.
        fourier_exponents: `n` of the input features `sin(2^n pi z)`, `cos(2^n pi z)`; see [`FourierFeatures`] on which
            suit how many levels. Empty: none.
        residual_connection: add `z` to the output. Meant for predictions of the noise; switch it off for other types.
        add_attention: self-attention in the middle.
        attention_head_dim: channels of an attention head; `None`: a single head.
        num_class_embeds: number of classes `K`; `None`: no class conditioning. Labels 0 to `K - 1` are the classes,
            and label `K` means "no class": train with some labels replaced by `K`, and classifier-free guidance has
            its unconditional prediction.
        dropout: probability, before the second convolution of every ResNet block.
        norm_num_groups: groups of every GroupNorm; must divide `hidden_channels`.
        norm_eps: added to the variance in every GroupNorm.

    Raises:
        ValueError: if a size is not positive or does not divide as said above.

    Source: Kingma, Salimans, Poole and Ho 2021, "Variational Diffusion Models", appendices B and C.
    """

    # Checkpoints name the module of the class, and Diffusers' loaders look for the class and for `ModelMixin` as
    # attributes of exactly that module: the package serves every loading road, the file in which the class happens to
    # stand does not.
    __module__ = "vdm_diffusers"

    # Read by the pipelines: whatever the weights' dtype, the sample comes in float32 (see the class's docstring).
    takes_float32_sample = True

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["VDMResnetBlock2D", "VDMAttention2D"]
    _repeated_blocks: ClassVar[list[str]] = ["VDMResnetBlock2D"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int | None = None,
        hidden_channels: int = 128,
        layers_per_block: int = 32,
        num_train_timesteps: int = 1000,
        time_embedding_dim: int | None = None,
        fourier_exponents: Sequence[float] = (7, 8),
        residual_connection: bool = True,
        add_attention: bool = True,
        attention_head_dim: int | None = None,
        num_class_embeds: int | None = None,
        dropout: float = 0.1,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        time_embed_dim = 4 * hidden_channels if time_embedding_dim is None else time_embedding_dim
        head_dim = hidden_channels if attention_head_dim is None else attention_head_dim
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "hidden_channels": hidden_channels,
            "layers_per_block": layers_per_block,
            "num_train_timesteps": num_train_timesteps,
            "time_embedding_dim": time_embed_dim,
            "attention_head_dim": head_dim,
            "norm_num_groups": norm_num_groups,
        }
        if num_class_embeds is not None:
            sizes["num_class_embeds"] = num_class_embeds
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        # A config must not fill the memory before the weights can contradict it.
        for name, size, most in (
            ("layers_per_block", layers_per_block, 4096),
            ("hidden_channels", hidden_channels, 2**16),
        ):
            if size > most:
                raise ValueError(f"`{name}` must be at most {most}, got {size}.")
        for name, size in (("norm_num_groups", norm_num_groups), ("attention_head_dim", head_dim)):
            if hidden_channels % size:
                raise ValueError(f"`{name}` must divide `hidden_channels`, got {size} and {hidden_channels}.")
        if hidden_channels < 4:
            raise ValueError(f"`hidden_channels` must be at least 4 to hold the sinusoids, got {hidden_channels}.")
        check_residual_channels(in_channels, out_channels, residual_connection)

        def resnet(in_channels: int) -> VDMResnetBlock2D:
            return VDMResnetBlock2D(in_channels, hidden_channels, time_embed_dim, norm_num_groups, norm_eps, dropout)

        self.fourier_features = FourierFeatures(fourier_exponents)
        self.time_embedding = TimestepEmbedding(hidden_channels, time_embed_dim)
        self.class_embedding = nn.Embedding(num_class_embeds + 1, time_embed_dim) if num_class_embeds else None
        self.conv_in = nn.Conv2d(self.fourier_features.num_features(in_channels), hidden_channels, 3, padding=1)
        self.down_blocks = nn.ModuleList(resnet(hidden_channels) for _ in range(layers_per_block))
        attention = VDMAttention2D(hidden_channels, head_dim, norm_num_groups, norm_eps) if add_attention else None
        self.mid_block = VDMMidBlock2D([resnet(hidden_channels), resnet(hidden_channels)], attention)
        self.up_blocks = nn.ModuleList(resnet(2 * hidden_channels) for _ in range(layers_per_block + 1))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, hidden_channels, eps=norm_eps)
        self.conv_out = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        _zero_(self.conv_out)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""Predict from the noisy `sample` what the network was trained to predict: by default the noise in it.

        Args:
            sample: `z_t`, `(B, in_channels, H, W)`.
            timestep: a number, or a tensor `()`, `(1,)` or `(B,)`, whole or fractional: the coordinate
                `tau = T (log_snr_max - log_snr) / (log_snr_max - log_snr_min) - 1`, in [-1, T - 1] with
                `T = num_train_timesteps`. The network embeds `(tau + 1) / T`: 0 at the clean end, 1 at the noisy.
            class_labels: `(B,)` whole numbers, if and only if the model has `num_class_embeds`, which is also the
                label that means "no class".
            return_dict: return a `UNet2DOutput` with `.sample`, else a tuple of one.

        Returns:
            `(B, out_channels, H, W)` in the dtype of `sample`.

        Raises:
            ValueError: if a shape is wrong, or `class_labels` are missing or not expected.
        """
        check_sample(sample, self.config.in_channels)
        features = self.fourier_features(sample)
        # `self.dtype` and not that of one weight: it stays right when Diffusers stores the weights in another dtype.
        emb = self._embed(timestep, class_labels, sample).to(self.dtype)
        hidden_states = self.conv_in(features.to(self.dtype))
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states = self._apply_block(block, hidden_states, emb)
            skips.append(hidden_states)
        hidden_states = self._apply_block(self.mid_block, hidden_states, emb)
        for block in self.up_blocks:
            hidden_states = self._apply_block(block, torch.cat([hidden_states, skips.pop()], dim=1), emb)
        output = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        output = add_residual(output, sample, self.config.residual_connection)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _apply_block(self, block: nn.Module, hidden_states: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden_states, emb)
        return block(hidden_states, emb)

    def _embed(
        self, timestep: torch.Tensor | float, class_labels: torch.Tensor | None, sample: torch.Tensor
    ) -> torch.Tensor:
        batch_size = sample.shape[0]
        # float32 before the move, since not every device has float64.
        tau = torch.as_tensor(timestep).to(torch.float32).to(sample.device)
        if tau.ndim > 1 or (tau.ndim == 1 and tau.shape[0] not in (1, batch_size)):
            raise ValueError(
                f"`timestep` must be a number or have shape (), (1,) or ({batch_size},) for a `sample` of "
                f"{batch_size}, got {tuple(tau.shape)}."
            )
        position = (tau.expand(batch_size) + 1.0) * (_EMBEDDED_RANGE / self.config.num_train_timesteps)
        emb = self.time_embedding(get_timestep_embedding(position, self.config.hidden_channels).to(self.dtype))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError(
                    "`class_labels` were given to a model without classes. Make it with `num_class_embeds`, or leave "
                    "them "
                    "out."
                )
        else:
            if class_labels is None or class_labels.shape != (batch_size,):
                raise ValueError(
                    f"`class_labels` must have shape ({batch_size},) for a model with `num_class_embeds="
                    f"{self.config.num_class_embeds}`, got "
                    f"{None if class_labels is None else tuple(class_labels.shape)}. For no class pass "
                    f"{self.config.num_class_embeds} everywhere."
                )
            emb = emb + self.class_embedding(class_labels)
        return F.silu(emb)
