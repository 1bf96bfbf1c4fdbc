"""The pipeline of a pixel-space diffusion model: noise in, images of integer levels out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from vdm_diffusers.decoders import PIXEL_ENCODINGS, decode_pixels
from vdm_diffusers.gaussian import alpha_sigma
from vdm_diffusers.models.calling import call_network
from vdm_diffusers.models.labels import default_label, null_label, num_classes
from vdm_diffusers.numerics import as_generator, expand_to, whole_number
from vdm_diffusers.pipelines.checkpoint_mixin import CheckpointMixin
from vdm_diffusers.pipelines.conditioning import Images, KnownRegion, guide, image_tensor, image_values, mask_tensor
from vdm_diffusers.pipelines.images import PIL_MODES, levels_to_images

FORMAT_VERSION = 1  # of the checkpoint: raised when an older package would misread what a newer one wrote
MAX_LEVELS = 2**16
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VDMPipeline(CheckpointMixin, DiffusionPipeline):
    r"""Samples images of integer levels from a pixel-space diffusion model.

    The latents start at `z_1 ~ N(0, I)` and follow the scheduler's grid down. Where the schedule ends at clean data (a
    table of betas, any scheduler of Diffusers), the last latents are `x_hat`. Where it ends at `z_0`, whose
    signal-to-noise ratio is finite (a `VDMScheduler` given in log SNR with `final_step="latent"`), the model's own
    decoder has the last word: its mode is the level nearest to `z_0 / alpha_0`. Either way the result is integers `k`,
    and the images are `k / (num_levels - 1)`.

    Latents are kept in float32 whatever the weights' dtype, so that the same generator gives the same noise to all of
    them, and a step smaller than a half-precision unit is not lost.

    Args:
        unet ([`VDMUNet2DModel`], [`UNet2DModel`], or a transformer called the same way):
            predicts from `(sample, timestep)`, and `class_labels` if it has classes, what `scheduler` expects.
        scheduler ([`VDMScheduler`] or another scheduler of Diffusers).
        num_levels (`int`): number of levels of a pixel, 256 for 8 bits; 2 to 65536.
        pixel_encoding (`str`): how the training images were put into [-1, 1]: `"bin_center"`,
            `x = 2 (k + 1/2) / L - 1`, or `"endpoint"`, `x = 2 k / (L - 1) - 1` (Diffusers' own).
        format_version (`int`): of the checkpoint's layout; leave it alone.

    Raises:
        ValueError: if `num_levels` or `pixel_encoding` is not as said, or the checkpoint is of a newer format.

    Source: Kingma et al. 2021, "Variational Diffusion Models", sections 3.1 and 3.3 (decoder, ancestral sampling).
    """

    # What checkpoints record: the package serves every loading road, the file in which the class happens to stand does
    # not.
    __module__ = "vdm_diffusers"

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        num_levels: int = 256,
        pixel_encoding: str = "bin_center",
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        for name, value, low, high in (
            ("num_levels", num_levels, 2, MAX_LEVELS),
            ("format_version", format_version, 1, FORMAT_VERSION),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                hint = " The checkpoint is of a newer vdm-diffusers: upgrade." if name == "format_version" else ""
                raise ValueError(f"`{name}` must be a whole number in {low}..{high}, got {value!r}.{hint}")
        if pixel_encoding not in PIXEL_ENCODINGS:
            raise ValueError(f"`pixel_encoding` must be one of {', '.join(PIXEL_ENCODINGS)}, got {pixel_encoding!r}.")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(num_levels=num_levels, pixel_encoding=pixel_encoding, format_version=format_version)
        self._interrupt = False

    @classmethod
    def from_pipe(
        cls,
        pipeline: DiffusionPipeline,
        *,
        num_levels: int | None = None,
        pixel_encoding: str | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> VDMPipeline:
        """Adopt a pipeline that has `unet` and `scheduler` and works on pixels; the weights are shared.

        Args:
            pipeline: for instance `DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")`.
            num_levels, pixel_encoding: of the images it was trained on; None: the pipeline's own, else 256 and
                `"endpoint"`, since Diffusers' training scripts map 8-bit images to `k / 127.5 - 1`.
            scheduler: instead of the pipeline's own; `VDMScheduler.from_config(pipeline.scheduler.config)` for the
                exact one.

        Raises:
            ValueError: if the pipeline has further components: a VAE, a text encoder, or another thing that this one
                would leave out.
        """
        components = {name: part for name, part in pipeline.components.items() if part is not None}
        if set(components) != {"unet", "scheduler"}:
            raise ValueError(
                f"`pipeline` must consist of a unet and a scheduler, got {type(pipeline).__name__} with "
                f"{', '.join(sorted(components))}. A model of latents has no pixels to decode here; a network under "
                "another "
                "name is passed as VDMPipeline(unet=..., scheduler=...)."
            )
        own = pipeline.config
        return cls(
            components["unet"],
            scheduler or components["scheduler"],
            num_levels=own.get("num_levels", 256) if num_levels is None else num_levels,
            pixel_encoding=pixel_encoding or own.get("pixel_encoding", "endpoint"),
        )

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> VDMPipeline:
        """The name of `from_pipe` in 0.1."""
        warnings.warn(
            "`from_pipeline` is called `from_pipe`, as in Diffusers, and will go.", FutureWarning, stacklevel=2
        )
        return cls.from_pipe(pipeline, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Set to `True` by a callback (as `pipe.interrupt` or, as in Diffusers, `pipe._interrupt`), ends the sampling
        after this step.
        """
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[VDMPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_scale: float = 1.0,
        negative_class_labels: int | Sequence[int] | torch.Tensor | None = None,
        image: Images | None = None,
        strength: float | None = None,
        mask: torch.Tensor | np.ndarray | PIL.Image.Image | None = None,
        num_particles: int = 1,
    ) -> ImagePipelineOutput | tuple:
        r"""Sample images: freely, guided towards a class, from an image, or around known pixels.

        Args:
            batch_size: number of images; `None`: as many as there are `latents` or `class_labels`, else one.
            num_inference_steps: steps of the grid; `None`: the scheduler's `num_train_timesteps`.
            class_labels: one for all images, or one for each, if the model has classes.
            latents: `(batch_size, C, H, W)` standard normal noise to start from, for instance of another size than the
                model's `sample_size`; `None`: drawn from `generator`.
            generator: of the noise, or the seed of one; a list has one for each image, and an image then does not
                depend on its neighbours.
            output_type: `"pil"`: 8-bit images, levels scaled to 0..255; `"np"`: `(B, H, W, C)` and `"pt"`:
                `(B, C, H, W)`, float32 in [0, 1], level `k` as `k / (num_levels - 1)`; `"latent"`: the last latents,
                not decoded.
            return_dict: return an [`ImagePipelineOutput`], else a tuple of its only field.
            callback_on_step_end: called as `callback(pipe, index, timestep, {"latents": ...})` after every step; a
                dictionary that it returns replaces the latents. Setting `pipe.interrupt = True` ends the sampling
                after this step.
            callback_on_step_end_tensor_inputs: the names that the callback is given; only `latents` exists.
            guidance_scale: g of classifier-free guidance, `negative + g (conditional - negative)`: 1 is the model
                itself, more drives towards the class at two evaluations a step. Guided samples are no draws of the
                model.
            negative_class_labels: what guidance drives away from; `None`: the model's label for "no class".
            image: PIL images, floats in [0, 1] or integer levels, to start from or to complete. One serves the whole
                batch.
            strength: the share of the grid, in (0, 1], that is run, from `image` with the noise of that level; `None`:
                1 with a `mask`, else 0.8.
            mask: `(H, W)`, or broadcastable to the images; 1 where pixels are to be made, 0 where `image` holds. A PIL
                image or an array of 0 and 255 too.
            num_particles: with a `mask`: K simulations for each image, resampled so that the result tends to the
                model's own conditional distribution as K grows. Needs a `VDMScheduler` with ancestral sampling.

        Raises:
            ValueError: if an argument does not fit the others or the model, before anything is computed; if the
                latents are not finite at the end.

        Example:
        ```py
        >>> pipe = VDMPipeline.from_pretrained("path/or/repository")
        >>> image = pipe(num_inference_steps=250, generator=torch.Generator().manual_seed(0)).images[0]
        ```
        """
        generator = as_generator(generator)
        assert not isinstance(generator, int)
        mask = None if mask is None else mask_tensor(mask)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        x = None if image is None else image_tensor(image, self.config.num_levels, self.config.pixel_encoding)
        if (
            x is not None
            and batch_size is None
            and latents is None
            and (class_labels is None or _is_one(class_labels))
        ):
            batch_size = len(x)
        shape = self._check_inputs(
            batch_size,
            num_inference_steps,
            class_labels,
            latents,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if x is not None and latents is None:
            shape = (*shape[:2], x.shape[2], x.shape[3])
        self._check_conditioning(
            shape,
            class_labels,
            guidance_scale,
            negative_class_labels,
            x,
            strength,
            mask,
            latents,
            num_particles,
            generator,
        )
        device = self._execution_device
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if num_inference_steps is None:
            num_inference_steps = self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=device)

        if latents is None:
            # mps draws from the CPU's generator, which alone is reproducible there
            source = torch.device("cpu") if device.type == "mps" else device
            rows = (shape[0] * num_particles, *shape[1:])
            latents = randn_tensor(rows, generator=generator, device=source, dtype=dtype)
        # flow matching's schedulers of Diffusers neither scale the noise nor the model's input, and have no names for
        # it
        latents = latents.to(device=device, dtype=dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        class_labels = default_label(self.unet) if class_labels is None else class_labels
        conditioning, negative = (
            {}
            if labels is None
            else {"class_labels": _labels(labels, shape[0]).repeat_interleave(num_particles).to(device)}
            for labels in (class_labels, self._negative_labels(guidance_scale, negative_class_labels))
        )
        # deterministic schedulers of Diffusers take no generator
        step_kwargs = (
            {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        )

        self.interrupt = False
        timesteps = self.scheduler.timesteps
        region, first = None, 0
        if x is not None:
            strength = (0.8 if mask is None else 1.0) if strength is None else strength
            first = len(timesteps) - max(1, round(strength * len(timesteps)))
            if hasattr(self.scheduler, "set_begin_index"):  # the stateful ones of Diffusers
                self.scheduler.set_begin_index(first)
            x = x.to(device=device, dtype=dtype).expand(shape)
            repeated = x.repeat_interleave(num_particles, 0)
            noised = self.scheduler.add_noise(repeated, latents, timesteps[first].expand(len(repeated)))
            if mask is not None:
                region = KnownRegion(self.scheduler, x, mask, num_particles, generator)
                latents = region.begin(noised if first else latents, noised)
            else:
                latents = noised
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps[first:], first):
                model_input = scale_model_input(latents, t)
                model_output = call_network(self.unet, model_input, t, **conditioning).to(dtype)
                if negative:
                    unguided = call_network(self.unet, model_input, t, **negative).to(dtype)
                    model_output = guide(model_output, unguided, guidance_scale, shape[1])
                model_output = self._without_unused_variance(model_output, shape[1])
                before = latents
                latents = self.scheduler.step(model_output, t, latents, **step_kwargs, return_dict=False)[0]
                if region is not None:
                    latents = region.condition(i, before, model_output, latents)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()
                if self.interrupt:
                    break

        if region is not None:
            latents = region.choose(latents)
        images = latents if output_type == "latent" else self._to_images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def interpolate(
        self,
        first: Images,
        second: Images,
        num_images: int,
        *,
        strength: float = 0.5,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> Any:
        """`num_images` images from one image to another: their blends, given the same noise of a level and made images
        again.

        The blend of two noised images is the noised blend. At a low `strength` the blends stay visible, at a high one
        the model has the say.

        Args:
            first, second: one image each, as `image` of `__call__`.
            num_images: how many, both ends among them, each run through noise like the rest; at least 2.
            strength, generator, num_inference_steps, class_labels, output_type: as in `__call__`.

        Raises:
            ValueError: fewer than two images, or more than one at an end.

        Source: Ho et al. 2020, "Denoising diffusion probabilistic models", section 4.3 and figure 8.
        """
        ends = [image_values(image, self.config.num_levels) for image in (first, second)]
        if num_images < 2 or any(len(end) != 1 for end in ends):
            raise ValueError(
                f"`num_images` must be at least 2 and `first` and `second` one image each, got {num_images}, "
                f"{len(ends[0])} and "
                f"{len(ends[1])}."
            )
        fraction = torch.linspace(0, 1, num_images, dtype=torch.float64)[:, None, None, None]
        blend = (1 - fraction) * ends[0] + fraction * ends[1]
        seed = int(torch.randint(2**62, (), generator=generator))
        noise = torch.randn(ends[0].shape, generator=torch.Generator().manual_seed(seed))
        return self(
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            latents=noise.expand(blend.shape),
            # the steps' noise is the same for all images too
            generator=[torch.Generator().manual_seed(seed) for _ in blend],
            output_type=output_type,
            image=blend,
            strength=strength,
            return_dict=False,
        )[0]

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The last latents of the grid -> integer levels `k` in 0..num_levels-1: int64 `(B, C, H, W)`.

        `z_0` is divided by `alpha_0` first if the scheduler ends there, which makes `k` the mode of the model's
        decoder.
        """
        # Asked by name and not by class: a class that was loaded from a repository's own code is another one.
        if getattr(self.scheduler, "is_log_snr_schedule", False) and self.scheduler.config.final_step == "latent":
            alpha_0, _ = alpha_sigma(self.scheduler.noise_schedule.log_snr_max)
            latents = latents / expand_to(alpha_0, latents)
        return decode_pixels(latents, self.config.num_levels, self.config.pixel_encoding)

    def _to_images(self, latents: torch.Tensor, output_type: str) -> Any:
        levels = self.decode_latents(latents if output_type == "pt" else latents.cpu())
        return levels_to_images(levels, self.config.num_levels, output_type)

    def _without_unused_variance(self, model_output: torch.Tensor, num_channels: int) -> torch.Tensor:
        """Drop the second half of the channels, a learned variance, where the scheduler would not know what it is."""
        learned = str(self.scheduler.config.get("variance_type")).startswith("learned")
        if model_output.shape[1] == 2 * num_channels and not learned:
            return model_output[:, :num_channels]
        return model_output

    def _negative_labels(
        self, guidance_scale: float, negative_class_labels: int | Sequence[int] | torch.Tensor | None
    ) -> int | Sequence[int] | torch.Tensor | None:
        if guidance_scale == 1:
            return None
        return null_label(self.unet) if negative_class_labels is None else negative_class_labels

    def _check_conditioning(
        self,
        shape: tuple[int, int, int, int],
        class_labels: int | Sequence[int] | torch.Tensor | None,
        guidance_scale: float,
        negative_class_labels: int | Sequence[int] | torch.Tensor | None,
        x: torch.Tensor | None,
        strength: float | None,
        mask: torch.Tensor | None,
        latents: torch.Tensor | None,
        num_particles: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> None:
        """A ValueError that says which condition does not fit."""
        if guidance_scale != 1:
            if class_labels is None:
                raise ValueError("`guidance_scale` needs `class_labels`: the classes to drive towards.")
            if self._negative_labels(guidance_scale, negative_class_labels) is None:
                raise ValueError(
                    "`negative_class_labels` are needed: the model has no label of its own that means 'no class'. "
                    "Pass the one that it "
                    "was trained with in place of dropped labels."
                )
        elif negative_class_labels is not None:
            raise ValueError("`negative_class_labels` need a `guidance_scale` other than 1.")
        if x is None:
            if mask is not None or strength is not None or num_particles != 1:
                raise ValueError("`mask`, `strength` and `num_particles` need an `image`.")
            return
        if len(x) not in (1, shape[0]) or tuple(x.shape[1:]) != shape[1:]:
            raise ValueError(f"`image` must be one image or {shape[0]} of shape {shape[1:]}, got {tuple(x.shape)}.")
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"`strength` must lie in (0, 1], got {strength}.")
        if num_particles < 1 or (num_particles > 1 and mask is None):
            raise ValueError(f"`num_particles` must be at least 1, and needs a `mask`, got {num_particles}.")
        if mask is not None:
            try:
                torch.broadcast_to(mask, shape)
            except RuntimeError as error:
                raise ValueError(f"`mask` must be broadcastable to {shape}, got {tuple(mask.shape)}.") from error
        if num_particles > 1:
            config = self.scheduler.config
            ancestral = config.get("stochasticity") == 1 and config.get("multistep_order") == 1
            by_frequency = config.variance_type == "optimal" and "shape" in (config.get("optimal_variance") or {})
            if not ancestral or config.variance_type.startswith("learned") or by_frequency:
                raise ValueError(
                    "`num_particles` above 1 needs a VDMScheduler with stochasticity=1, multistep_order=1 and a "
                    "variance that is not "
                    "learned and one for all frequencies: the particles are weighed by the density of its steps, "
                    "pixel by pixel."
                )
            if latents is not None or isinstance(generator, list):
                raise ValueError("`num_particles` above 1 goes with neither `latents` nor a list of generators.")

    def _check_inputs(
        self,
        batch_size: int | None,
        num_inference_steps: int | None,
        class_labels: int | Sequence[int] | torch.Tensor | None,
        latents: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> tuple[int, int, int, int]:
        """The latents' shape, or a ValueError that says what does not fit."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        if labels is not None and (labels.ndim > 1 or labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(f"`class_labels` must be whole numbers, one or a list of them, got {class_labels!r}.")
        if labels is not None and num_classes(self.unet) is None and hasattr(self.unet, "config"):
            raise ValueError("`class_labels` mean nothing to this model: its network has no classes. Leave them out.")
        counts = {
            "latents": None if latents is None else len(latents),
            "class_labels": len(labels) if labels is not None and labels.ndim else None,
        }
        if batch_size is None:
            batch_size = next((count for count in counts.values() if count is not None), 1)
        if whole_number("batch_size", batch_size) < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        counts["generator"] = len(generator) if isinstance(generator, list) else None
        for name, count in counts.items():
            if count is not None and count != batch_size:
                raise ValueError(f"`{name}` must have one entry for each of the {batch_size} images, got {count}.")
        channels, size = self.unet.config.in_channels, self.unet.config.get("sample_size")
        if output_type == "pil" and channels not in PIL_MODES:
            raise ValueError(
                f"`output_type='pil'` needs 1 to 4 channels, the model has {channels}: take 'np' or 'pt'."
            )
        if latents is not None:
            if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
                raise ValueError(
                    f"`latents` must be floats of shape ({batch_size}, {channels}, H, W), got {latents.dtype} of "
                    "shape "
                    f"{tuple(latents.shape)}."
                )
            return (batch_size, channels, latents.shape[2], latents.shape[3])
        if size is None:
            raise ValueError(
                "the model's config has no `sample_size`: pass `latents`, standard normal noise of shape "
                f"({batch_size}, {channels}, H, W)."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return (batch_size, channels, height, width)


def _is_one(class_labels: int | Sequence[int] | torch.Tensor) -> bool:
    return torch.as_tensor(class_labels).ndim == 0


def _labels(class_labels: int | Sequence[int] | torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.as_tensor(class_labels).long().expand(batch_size)
