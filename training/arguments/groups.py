"""The arguments of `train.py`, in their groups.

Names are those of Diffusers' `train_unconditional.py` where it has the argument.
"""

# ruff: noqa: RUF009  (`argument` returns a dataclass field)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .fields import LOG_SNR, NOT_NEGATIVE, POSITIVE, SHARE, Bounds, argument
from .words import words

if TYPE_CHECKING:
    from vdm_diffusers.decoders import PixelEncoding
    from vdm_diffusers.models.autoencoder_variational import Likelihood
    from vdm_diffusers.objectives import Objective
    from vdm_diffusers.prediction import PredictionType

    BetaSchedule = str
else:  # words of the core, read without its seconds of imports: whoever adds one there has it here
    Likelihood = Literal[words("models.autoencoder_variational", "Likelihood")]
    Objective = Literal[words("objectives", "Objective")]
    PredictionType = Literal[words("prediction", "PredictionType")]
    PixelEncoding = Literal[words("decoders", "PixelEncoding")]
    BetaSchedule = Literal[words("noise_schedules", "LOG_SNR_SCHEDULES") + words("noise_schedules", "BETA_SCHEDULES")]

Storage = Literal["auto", "memory", "disk"]
ImageMode = Literal["1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"]
LRSchedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

COUNT = Bounds(1)
SIDE = Bounds(1, 16384)


@dataclass
class DataArguments:
    """Which images. Without --dataset_name and --train_data_dir: scikit-learn's 8x8 digits, 17 grey levels."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        None,
        "Data set on the Hub, local folder that `datasets` understands, or a .parquet file.",
        basic=True,
        path=True,
    )
    dataset_config_name: str | None = argument(None, "Configuration of the data set; none if it has only one.")
    train_data_dir: str | None = argument(
        None, "Folder of images (`datasets`' imagefolder layout), instead of --dataset_name.", basic=True, path=True
    )
    cache_dir: str | None = argument(
        None, "Where `datasets` keeps what it downloads and converts; none: its own default.", path=True
    )
    image_column: str | None = argument(None, "Column of the images; none: the only one whose feature is an image.")
    label_column: str | None = argument(
        None, "Column of the class labels; none: the only one whose feature is a ClassLabel."
    )
    image_mode: ImageMode | None = argument(
        None, "PIL mode to convert every image to; none: as stored, and mixed modes stop the run."
    )
    resolution: int | None = argument(
        None,
        "Resize the shorter side to this many pixels and crop a square of them; none: images as they are, and mixed "
        "sizes stop the run.",
        bounds=SIDE,
        basic=True,
    )
    array_channels: Literal["auto", "first", "last"] = argument(
        "auto",
        "Where the channels of images that are stored as arrays stand: (C, H, W) or (H, W, C). auto: the axis of at "
        "most four.",
    )
    skip_damaged: int = argument(
        0, "Leave out up to so many images that cannot be decoded; each is named.", bounds=NOT_NEGATIVE
    )
    center_crop: bool = argument(
        False,
        "Crop in the centre. Else each training image gets one seeded random crop, drawn when it is decoded. Images "
        "held "
        "out are always cropped in the centre.",
    )
    num_levels: int | None = argument(
        None,
        "Number of levels of a pixel; none: what the image files can hold, 256 for 8 bits.",
        bounds=Bounds(2, 65536),
    )
    random_flip: bool = argument(False, "Flip training images left to right with probability 1/2, on the device.")
    preserve_input_precision: bool = argument(
        False, "Keep 16-bit images at 65536 levels; else they are reduced to 8 bits and 256 levels."
    )
    train_split: str = argument("train", "Split to train on.")
    eval_split: str | None = argument(
        None,
        "Split for the periodic bits/dim; none: a seeded share of the training split (--eval_fraction) is held out.",
    )
    eval_fraction: float = argument(
        0.05,
        "Share of the training split that is held out when --eval_split is not given.",
        bounds=Bounds(0, 1, open_low=True, open_high=True),
    )
    max_train_samples: int | None = argument(None, "Use only so many (seeded, random) training images.", bounds=COUNT)
    dataloader_num_workers: int = argument(
        0,
        "Threads that decode images, at the start or from a stream; 0: as many as there are cores.",
        bounds=Bounds(0, 4096),
    )
    decoded_images: Storage = argument(
        "auto",
        "Where decoded images are kept: in each process's memory, or in a file beside `datasets`' cache (--cache_dir) "
        "that all processes map, and that the next run finds. auto: in memory up to --memory_share of it.",
    )
    memory_share: float = argument(
        0.5,
        "Share of the machine's memory that the decoded images of a split may take, all its processes together.",
        bounds=Bounds(0, 1, open_low=True),
    )
    streaming: bool = argument(
        False,
        "Read the training images in passing, in an order shuffled in --shuffle_buffer_size, instead of decoding all "
        "at "
        "the start. Needs --max_train_steps and --eval_split, of which the first --eval_max_images (none: 1024) are "
        "held "
        "in memory.",
    )
    shuffle_buffer_size: int = argument(
        4096, "Decoded images of a stream that are shuffled together, and held twice.", bounds=COUNT
    )


@dataclass
class ModelArguments:
    """The network: VDM's U-Net from the sizes below, or any Diffusers UNet2DModel or VDMUNet2DModel from its
    config.
    """

    _argument_group_name = "model"

    model: Literal["vdm", "vae", "hvae", "latent_vdm"] = argument(
        "vdm",
        "vdm: a diffusion model. vae, hvae: a (hierarchical) variational autoencoder, trained by its own bound. "
        "latent_vdm: a VAE whose prior is a diffusion model.",
        basic=True,
    )
    model_config_name_or_path: str | None = argument(
        None,
        "config.json, folder or Hub repository of a UNet2DModel, DiTTransformer2DModel, FourierFeaturesUNet or "
        "VDMUNet2DModel, made afresh from it. None: a VDMUNet2DModel with the sizes below.",
        path=True,
    )
    pretrained_model_name_or_path: str | None = argument(
        None,
        "Folder or Hub repository of such a network, or of a pipeline with one: training starts from its weights "
        "(safetensors).",
        path=True,
    )
    hidden_channels: int = argument(128, "Width of the VDM U-Net.", bounds=Bounds(1, 65536))
    layers_per_block: int = argument(
        32, "Residual blocks of its first half; one more stands in the second.", bounds=Bounds(1, 1024)
    )
    fourier_exponents: list[float] | None = argument(
        None,
        "Octaves n of its input features sin(2^n pi z), cos(2^n pi z). None: every octave down to the distance of two "
        "levels, 1 to 8 for "
        "256 levels. (VDM's paper has 7 8; on MNIST all eight are 0.14 bits/dim better.)",
        bounds=Bounds(-32, 32),
    )
    add_attention: bool = argument(True, "Self-attention in its middle.")
    attention_head_dim: int | None = argument(
        None, "Channels of an attention head; none: one head.", bounds=Bounds(1, 65536)
    )
    norm_num_groups: int = argument(
        32, "Groups of its group normalisations; must divide --hidden_channels.", bounds=Bounds(1, 65536)
    )
    dropout: float = argument(0.1, "Dropout in its residual blocks.", bounds=SHARE)
    analytic_start: bool = argument(
        False,
        "Start from the denoisers that are known in closed form (the training images' mean and covariance, and their "
        "pixels' levels), and learn "
        "what they leave. The tables are measured on the training images and saved with the weights.",
        basic=True,
    )
    class_conditional: bool = argument(False, "Condition on the data set's class labels.", basic=True)
    class_dropout: float = argument(
        0.0,
        "Probability of replacing a label by 'no class' while training (for classifier-free guidance).",
        bounds=SHARE,
    )
    latent_channels: int = argument(4, "vae, hvae: channels of every latent.", bounds=Bounds(1, 65536))
    block_out_channels: list[int] = argument(
        [32, 64],
        "vae, hvae: width at every resolution, from the finest on, each half as high and wide as the one before.",
        bounds=Bounds(1, 65536),
    )
    num_layers: int = argument(2, "hvae: layers of latents.", bounds=Bounds(1, 1024))
    vae: str | None = argument(
        None,
        "vae, latent_vdm: folder or repository of a VariationalAutoencoder to start from; latent_vdm: also of "
        "Diffusers' "
        "AutoencoderKL.",
        path=True,
    )
    latent_stages: list[float] = argument(
        [0.4, 0.4, 0.2],
        "latent_vdm: shares of the optimiser steps for the VAE alone, the prior alone (of the VAE as it then is), and "
        "both by the joint bound. 0 0 1: end to end; 0 1 0: the prior of a given --vae.",
        bounds=NOT_NEGATIVE,
    )
    likelihood: Likelihood = argument(
        "discretized_logistic", "vae, hvae: of a pixel's level given the latents; bernoulli for 2 levels."
    )


@dataclass
class DiffusionArguments:
    """The diffusion and its objective."""

    _argument_group_name = "diffusion"

    ddpm_beta_schedule: BetaSchedule = argument(
        "log_snr_linear",
        "Noise schedule: given in log SNR (VDM; between --log_snr_max and --log_snr_min), or a table of betas (DDPM).",
        alias="beta_schedule",
    )
    log_snr_max: float = argument(
        13.3, "Log SNR at the clean end of a schedule given in log SNR; 13.3 for 256 levels.", bounds=LOG_SNR
    )
    log_snr_min: float = argument(-5.0, "Log SNR at its noisy end.", bounds=LOG_SNR)
    log_snr_table: list[float] | None = argument(
        None,
        "Decreasing log SNRs at equally spaced times, for a schedule given in log SNR: where its times, and so "
        "training "
        "and the sampler's steps, are dense. None: --ddpm_beta_schedule as it is.",
        bounds=LOG_SNR,
    )
    ddpm_num_steps: int = argument(
        1000,
        "T of the timestep coordinate, and the number of betas.",
        alias="num_train_timesteps",
        bounds=Bounds(1, 100_000),
    )
    ddpm_num_inference_steps: int = argument(
        1000, "Steps of the sampler for sample grids.", alias="num_inference_steps", bounds=Bounds(1, 100_000)
    )
    stochasticity: float | None = argument(
        None,
        "The sampler's noise, kept in the scheduler's config: 1 ancestral, 0 deterministic, above 1 noisier. None: 1, "
        "and 0 for "
        "--path flow.",
        bounds=Bounds(0, 100),
    )
    prediction_type: PredictionType = argument("epsilon", "What the network predicts.")
    path: Literal["vp", "flow"] = argument(
        "vp",
        "The latents' path: vp, variance preserving; flow, the straight path of flow matching, which takes "
        "--prediction_type "
        "flow_prediction and has the schedule of --flow_shift instead of --ddpm_beta_schedule.",
    )
    flow_shift: float = argument(
        1.0, "Shift of the flow's sigmas towards noise, above 1 for larger images.", bounds=POSITIVE
    )
    loss: Objective = argument(
        "elbo",
        "elbo: bits/dim; simple: mean |eps - eps_hat|^2; mse: the network's own output; min_snr, truncated_snr, "
        "sigmoid, "
        "edm: other weightings. Every one goes with every prediction type.",
    )
    min_snr_gamma: float = argument(5.0, "gamma of min_snr.", bounds=POSITIVE)
    sigmoid_bias: float = argument(
        0.0, "Bias of the sigmoid weighting sigmoid(bias - log SNR).", bounds=Bounds(-100, 100)
    )
    train_time: Literal["auto", "continuous", "discrete"] = argument(
        "auto",
        "Times trained on: continuous, or the --ddpm_num_steps steps. auto: discrete for beta tables with a loss that "
        "does not weigh by the ELBO (DDPM), else continuous.",
    )
    time_sampling: Literal["low_discrepancy", "uniform", "adaptive"] = argument(
        "low_discrepancy",
        "Stratified over the global batch (all processes and micro-batches), independent, or stratified with a "
        "density "
        "that follows the root mean square of the losses (importance sampling: the expected loss stays).",
    )
    learn_schedule: bool = argument(
        False,
        "Learn how the schedule runs between its end points, starting from log_snr_linear, by minimising the variance "
        "of "
        "the loss (VDM). The result is saved in the scheduler's config.",
    )
    learn_end_points: bool = argument(
        False,
        "Learn the end points too, through the bound, inside --log_snr_max and --log_snr_min. With --learn_schedule.",
    )
    schedule_learning_rate: float = argument(
        0.01, "Adam's learning rate for the schedule, before --lr_scheduler.", bounds=POSITIVE
    )
    variance_type: Literal["fixed_small", "learned_range", "learned"] = argument(
        "fixed_small",
        "Reverse variance. learned_range, learned: the network predicts it in a second half of its channels, trained "
        "by "
        "the bound with the mean held fixed, besides --loss (simple: Improved DDPM's hybrid loss). In discrete time.",
    )
    vlb_weight: float = argument(0.001, "Weight of that bound, in bits/dim.", bounds=POSITIVE)
    pixel_encoding: PixelEncoding = argument(
        "bin_center",
        "Integers to [-1, 1]: bin_center (VDM) 2 (k + 1/2) / L - 1, endpoint (Diffusers) 2 k / (L - 1) - 1.",
    )


@dataclass
class OptimizationArguments:
    """Steps, batches, optimiser, learning rate, averaging."""

    _argument_group_name = "optimisation"

    max_train_steps: int | None = argument(
        None, "Optimiser steps; none: --num_epochs of them.", bounds=COUNT, basic=True
    )
    num_epochs: int = argument(
        100,
        "Passes through the data; only used without --max_train_steps.",
        alias="num_train_epochs",
        bounds=COUNT,
    )
    train_batch_size: int = argument(
        16, "Images in one forward pass of one process.", bounds=Bounds(1, 2**24), basic=True
    )
    gradient_accumulation_steps: int = argument(1, "Forward passes to an optimiser step.", bounds=Bounds(1, 2**24))
    global_batch_size: int | None = argument(
        None,
        "Images to an optimiser step on any number of processes, in place of --gradient_accumulation_steps.",
        bounds=Bounds(1, 2**24),
    )
    optimizer: Literal["adamw", "muon"] = argument(
        "adamw", "AdamW for all weights, or Muon for the matrices and AdamW for the rest, at one learning rate."
    )
    learning_rate: float = argument(1e-4, "Highest learning rate.", bounds=POSITIVE, basic=True)
    lr_scheduler: LRSchedule = argument("cosine", "Course of the learning rate over the optimiser steps.")
    lr_warmup_steps: int | None = argument(
        None, "Optimiser steps of linear warm-up. None: 500, but at most a tenth of the run.", bounds=NOT_NEGATIVE
    )
    adam_beta1: float = argument(0.95, "AdamW's decay of the mean gradient.", bounds=SHARE)
    adam_beta2: float = argument(0.999, "AdamW's decay of the mean squared gradient.", bounds=SHARE)
    adam_weight_decay: float = argument(1e-6, "AdamW's weight decay.", bounds=NOT_NEGATIVE)
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon.", bounds=POSITIVE)
    max_grad_norm: float = argument(1.0, "Clip the gradient to this norm; 0: no clipping.", bounds=NOT_NEGATIVE)
    max_skipped_steps: int = argument(
        0,
        "Leave out up to so many optimiser steps in a row whose gradient is not finite; 0: the first one stops the "
        "run. "
        "With it the device is waited for at every step.",
        bounds=NOT_NEGATIVE,
    )
    use_ema: bool = argument(True, "Evaluate, sample and publish an exponential moving average of the weights.")
    ema_inv_gamma: float = argument(
        1.0, "Warm-up of the average: decay = 1 - (1 + step / inv_gamma)^-power.", bounds=POSITIVE
    )
    ema_power: float = argument(0.75, "See --ema_inv_gamma.", bounds=POSITIVE)
    ema_max_decay: float = argument(0.9999, "Highest decay of the average.", bounds=SHARE)
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = argument(
        "no",
        "Precision of the network's arithmetic. Noise, loss and optimiser stay in float32. auto: bf16 on a GPU or CPU "
        "that has units for it, "
        "else no (float32); the start of the run says which.",
        basic=True,
    )
    allow_tf32: bool = argument(
        False, "Multiply float32 matrices with TF32 on a GPU: faster, with 10 bits of mantissa."
    )
    compile: bool = argument(False, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = argument(
        False, "Compute activations again in the backward pass: less memory for a third more arithmetic."
    )
    channels_last: bool = argument(False, "Lay tensors out with the channels last.")
    seed: int = argument(
        0,
        "Seed of everything: initial weights, data order, times, noise, dropout, samples.",
        bounds=Bounds(0, 2**32 - 1),
        basic=True,
    )


@dataclass
class RunArguments:
    """Where results go: checkpoints, logs, evaluations, samples, the Hub."""

    _argument_group_name = "run"

    output_dir: str = argument(
        "outputs/train", "Folder of the pipeline, checkpoints, logs and pictures.", basic=True, path=True
    )
    overwrite_output_dir: bool = argument(
        False, "Start anew in an occupied --output_dir, deleting what an earlier run of this script wrote there."
    )
    checkpointing_steps: int = argument(500, "Optimiser steps between checkpoints.", bounds=COUNT)
    checkpoints_total_limit: int = argument(2, "Checkpoints kept; 0: all.", bounds=NOT_NEGATIVE)
    async_checkpoints: bool = argument(
        False, "Copy the state to the host's memory and write it while training goes on, instead of stopping to write."
    )
    resume_from_checkpoint: str | None = argument(
        None,
        "'latest' (start from the beginning if there is none), or the path of a checkpoint.",
        basic=True,
        path=True,
    )
    logging_steps: int = argument(
        50, "Optimiser steps between log entries; the device is waited for only then.", bounds=COUNT
    )
    logging_dir: str = argument("logs", "Folder of the tracker's files, inside --output_dir.")
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = argument(
        "tensorboard", "Tracker; metrics.jsonl in --output_dir is written in any case."
    )
    eval_steps: int | None = argument(
        None, "Optimiser steps between evaluations of bits/dim; none: at the end; 0: never.", bounds=NOT_NEGATIVE
    )
    keep_best: bool = argument(
        False, "Keep the pipeline with the lowest bits/dim of all evaluations, with its figures, in --output_dir/best."
    )
    max_minutes: float | None = argument(
        None,
        "Stop after so many minutes with the state saved (exit code 142), for runs in slices: go on with "
        "--resume_from_checkpoint "
        "latest.",
        bounds=POSITIVE,
    )
    eval_change_samples: int = argument(
        4,
        "Evaluations an image, of either network, for the change of the bits/dim since the last evaluation and since "
        "the best one. 0: not "
        "measured.",
        bounds=Bounds(0, 4096),
    )
    early_stopping: int | None = argument(
        None,
        "End training after so many evaluations in a row that did not beat the best one by more than the error of "
        "the difference.",
        bounds=Bounds(1),
    )
    eval_num_samples: int = argument(
        4, "Network evaluations for each image and evaluation, stratified over time.", bounds=Bounds(1, 2**24)
    )
    eval_max_images: int | None = argument(None, "Evaluate on so many images of the split; none: all.", bounds=COUNT)
    eval_batch_size: int = argument(64, "Images at a time in evaluations and samples.", bounds=Bounds(1, 2**24))
    sample_steps: int | None = argument(
        None, "Optimiser steps between sample grids; none: at the end; 0: never.", bounds=NOT_NEGATIVE
    )
    num_sample_images: int = argument(64, "Images in a sample grid.", bounds=Bounds(1, 2**16))
    push_to_hub: bool = argument(
        False, "Publish the model, its card and its pictures on the Hub at the end.", basic=True
    )
    push_checkpoints: bool = argument(
        False, "With --push_to_hub: publish the model of every checkpoint too, while training goes on."
    )
    hub_token: str | None = argument(None, "Token for the Hub; none: the one that `hf auth login` stored.")
    hub_model_id: str | None = argument(None, "Repository to publish to; none: the name of --output_dir.")
    hub_private_repo: bool = argument(False, "Make the repository private.")
    hub_license: str = argument(
        "unknown", "Licence that the model card states, in the Hub's spelling, e.g. apache-2.0."
    )


GROUPS = (DataArguments, ModelArguments, DiffusionArguments, OptimizationArguments, RunArguments)


@dataclass
class Arguments:
    """All arguments of a run, in their groups.

    Attributes:
        notes: what was decided about them while they were read, in sentences for people.
    """

    data: DataArguments = field(default_factory=DataArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    diffusion: DiffusionArguments = field(default_factory=DiffusionArguments)
    optimization: OptimizationArguments = field(default_factory=OptimizationArguments)
    run: RunArguments = field(default_factory=RunArguments)
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[Any]:
        """The dataclasses, in the order of `GROUPS`."""
        return [self.data, self.model, self.diffusion, self.optimization, self.run]

    def flat(self) -> dict[str, Any]:
        """Argument name -> value, over all groups; never the Hub token."""
        values: dict[str, Any] = {}
        for group in self.groups:
            values |= dataclasses.asdict(group)
        del values["hub_token"]
        return values
