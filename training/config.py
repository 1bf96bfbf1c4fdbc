"""The arguments of `train.py`: dataclasses, their command line, and recipes in YAML.

Names are those of Diffusers' `train_unconditional.py` where it has the argument. A recipe (`--config recipe.yaml`) is read as if
its entries stood on the command line before the real ones: every value is converted to its argument's type (YAML reads 2e-4
as a string), an unknown key is refused, and the command line has the last word.
"""

# ruff: noqa: RUF009  (`argument` returns a dataclass field)

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from decoded import Storage
from transformers.hf_argparser import HfArgumentParser

from vdm_diffusers.decoders import PixelEncoding
from vdm_diffusers.models.autoencoder_variational import Likelihood
from vdm_diffusers.objectives import Objective
from vdm_diffusers.prediction import PredictionType

RECIPES = Path(__file__).parent / "recipes"
ARGUMENTS_FILE = "training_arguments.json"  # beside every model: what it was trained on and how
DIGITS_RECIPE = RECIPES / "digits.yaml"

LOG_SNR_SCHEDULES = ("log_snr_linear", "log_snr_cosine")
ELBO_WEIGHTED = ("elbo", "sigmoid", "edm")
BetaSchedule = Literal[
    "log_snr_linear", "log_snr_cosine", "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"
]
LRSchedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]

# Arguments of train_unconditional.py that have no counterpart here, and what to write instead.
REPLACED_ARGUMENTS = {
    "save_images_epochs": "samples are drawn every --sample_steps optimiser steps",
    "save_model_epochs": "models are saved every --checkpointing_steps optimiser steps, and at the end",
    "local_rank": "torchrun and `accelerate launch` set it in the environment",
    "enable_xformers_memory_efficient_attention": "the network uses PyTorch's scaled_dot_product_attention",
}


def argument(default: Any, help: str, *, alias: str | None = None) -> Any:
    """A dataclass field with its help text; a list as default is copied for each instance."""
    metadata: dict[str, Any] = {"help": help.replace("%", "%%")}
    if alias is not None:
        metadata["aliases"] = [f"--{alias}", f"--{alias.replace('_', '-')}"]
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Which images. Without --dataset_name and --train_data_dir: scikit-learn's 8x8 digits, 17 grey levels."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        None, "Data set on the Hub, local folder that `datasets` understands, or a .parquet file."
    )
    dataset_config_name: str | None = argument(None, "Configuration of the data set; none if it has only one.")
    train_data_dir: str | None = argument(
        None, "Folder of images (`datasets`' imagefolder layout). Ignored if --dataset_name is given."
    )
    cache_dir: str | None = argument(
        None, "Where `datasets` keeps what it downloads and converts; none: its own default."
    )
    image_column: str | None = argument(None, "Column of the images; none: the only one whose feature is an image.")
    label_column: str | None = argument(
        None, "Column of the class labels; none: the only one whose feature is a ClassLabel."
    )
    image_mode: str | None = argument(
        None, "PIL mode to convert every image to, e.g. L or RGB; none: as stored, and mixed modes stop."
    )
    resolution: int | None = argument(
        None,
        "Resize the shorter side to this many pixels and crop a square of them; none: images as they are, and mixed "
        "sizes stop.",
    )
    center_crop: bool = argument(
        False,
        "Crop in the centre. Else each training image gets one seeded random crop, drawn when it is decoded. Images held "
        "out are always cropped in the centre.",
    )
    num_levels: int | None = argument(
        None, "Number of levels of a pixel; none: what the image files can hold, 256 for 8 bits."
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
        0.05, "Share of the training split that is held out when --eval_split is not given."
    )
    max_train_samples: int | None = argument(None, "Use only so many (seeded, random) training images.")
    dataloader_num_workers: int = argument(
        0, "Threads that decode images, at the start or from a stream; 0: as many as there are cores."
    )
    decoded_images: Storage = argument(
        "auto",
        "Where decoded images are kept: in each process's memory, or in a file beside `datasets`' cache (--cache_dir) that all processes "
        "map, and that the next run finds. auto: in memory up to --memory_share of it.",
    )
    memory_share: float = argument(
        0.5, "Share of the machine's memory that the decoded images of a split may take, all its processes together."
    )
    streaming: bool = argument(
        False,
        "Read the training images in passing, in an order shuffled in --shuffle_buffer_size, instead of decoding all at the start. Needs "
        "--max_train_steps and --eval_split, of which the first --eval_max_images (none: 1024) are held in memory.",
    )
    shuffle_buffer_size: int = argument(4096, "Decoded images of a stream that are shuffled together, and held twice.")


@dataclass
class ModelArguments:
    """The network: VDM's U-Net from the sizes below, or any Diffusers UNet2DModel or VDMUNet2DModel from its config."""

    _argument_group_name = "model"

    model: Literal["vdm", "vae", "hvae", "latent_vdm"] = argument(
        "vdm",
        "vdm: a diffusion model. vae, hvae: a (hierarchical) variational autoencoder, trained by its own bound. latent_vdm: a VAE "
        "whose prior is a diffusion model.",
    )
    model_config_name_or_path: str | None = argument(
        None,
        "config.json, folder or Hub repository of a UNet2DModel, DiTTransformer2DModel, FourierFeaturesUNet or VDMUNet2DModel, made afresh from it. None: a "
        "VDMUNet2DModel with the sizes below.",
    )
    hidden_channels: int = argument(128, "Width of the VDM U-Net.")
    layers_per_block: int = argument(32, "Residual blocks of its first half; one more stands in the second.")
    fourier_exponents: list[float] = argument(
        [7.0, 8.0], "Octaves n of its input features sin(2^n pi z), cos(2^n pi z): 7 8 for 256 levels, 2 3 4 for 17."
    )
    add_attention: bool = argument(True, "Self-attention in its middle.")
    attention_head_dim: int | None = argument(None, "Channels of an attention head; none: one head.")
    norm_num_groups: int = argument(32, "Groups of its group normalisations; must divide --hidden_channels.")
    dropout: float = argument(0.1, "Dropout in its residual blocks.")
    class_conditional: bool = argument(False, "Condition on the data set's class labels.")
    class_dropout: float = argument(
        0.0, "Probability of replacing a label by 'no class' while training (for classifier-free guidance)."
    )
    latent_channels: int = argument(4, "vae, hvae: channels of every latent.")
    block_out_channels: list[int] = argument(
        [32, 64],
        "vae, hvae: width at every resolution, from the finest on, each half as high and wide as the one before.",
    )
    num_layers: int = argument(2, "hvae: layers of latents.")
    vae: str | None = argument(
        None,
        "vae, latent_vdm: folder or repository of a VariationalAutoencoder to start from; latent_vdm: also of Diffusers' AutoencoderKL.",
    )
    latent_stages: list[float] = argument(
        [0.4, 0.4, 0.2],
        "latent_vdm: shares of the optimiser steps for the VAE alone, the prior alone (of the VAE as it then is), and both by the "
        "joint bound. 0 0 1: end to end; 0 1 0: the prior of a given --vae.",
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
        13.3, "Log SNR at the clean end of a schedule given in log SNR; 13.3 for 256 levels."
    )
    log_snr_min: float = argument(-5.0, "Log SNR at its noisy end.")
    log_snr_table: list[float] | None = argument(
        None,
        "Decreasing log SNRs at equally spaced times, for a schedule given in log SNR: where its times, and so training and the "
        "sampler's steps, are dense. None: --ddpm_beta_schedule as it is.",
    )
    ddpm_num_steps: int = argument(
        1000, "T of the timestep coordinate, and the number of betas.", alias="num_train_timesteps"
    )
    ddpm_num_inference_steps: int = argument(
        1000, "Steps of the sampler for sample grids.", alias="num_inference_steps"
    )
    stochasticity: float = argument(
        1.0, "The sampler's noise, kept in the scheduler's config: 1 ancestral, 0 deterministic, above 1 noisier."
    )
    prediction_type: PredictionType = argument("epsilon", "What the network predicts.")
    loss: Objective = argument(
        "elbo",
        "elbo: bits/dim; simple: mean |eps - eps_hat|^2; mse: the network's own output; min_snr, truncated_snr, sigmoid, edm: "
        "other weightings. Every one goes with every prediction type.",
    )
    min_snr_gamma: float = argument(5.0, "gamma of min_snr.")
    sigmoid_bias: float = argument(0.0, "Bias of the sigmoid weighting sigmoid(bias - log SNR).")
    train_time: Literal["auto", "continuous", "discrete"] = argument(
        "auto",
        "Times trained on: continuous, or the --ddpm_num_steps steps. auto: discrete for beta tables with a loss that does not "
        "weigh by the ELBO (DDPM), else continuous.",
    )
    time_sampling: Literal["low_discrepancy", "uniform", "adaptive"] = argument(
        "low_discrepancy",
        "Stratified over the global batch (all processes and micro-batches), independent, or stratified with a density that follows "
        "the root mean square of the losses (importance sampling: the expected loss stays).",
    )
    learn_schedule: bool = argument(
        False,
        "Learn how the schedule runs between its end points, starting from log_snr_linear, by minimising the variance of "
        "the loss (VDM). The result is saved in the scheduler's config.",
    )
    learn_end_points: bool = argument(
        False,
        "Learn the end points too, through the bound, inside --log_snr_max and --log_snr_min. With --learn_schedule.",
    )
    schedule_learning_rate: float = argument(0.01, "Adam's learning rate for the schedule, before --lr_scheduler.")
    variance_type: Literal["fixed_small", "learned_range", "learned"] = argument(
        "fixed_small",
        "Reverse variance. learned_range, learned: the network predicts it in a second half of its channels, trained by the bound with "
        "the mean held fixed, besides --loss (simple: Improved DDPM's hybrid loss). In discrete time.",
    )
    vlb_weight: float = argument(0.001, "Weight of that bound, in bits/dim.")
    pixel_encoding: PixelEncoding = argument(
        "bin_center",
        "Integers to [-1, 1]: bin_center (VDM) 2 (k + 1/2) / L - 1, endpoint (Diffusers) 2 k / (L - 1) - 1.",
    )


@dataclass
class OptimizationArguments:
    """Steps, batches, optimiser, learning rate, averaging."""

    _argument_group_name = "optimisation"

    max_train_steps: int | None = argument(None, "Optimiser steps; none: --num_epochs of them.")
    num_epochs: int = argument(
        100, "Passes through the data; only used without --max_train_steps.", alias="num_train_epochs"
    )
    train_batch_size: int = argument(16, "Images in one forward pass of one process.")
    gradient_accumulation_steps: int = argument(1, "Forward passes to an optimiser step.")
    optimizer: Literal["adamw", "muon"] = argument(
        "adamw", "AdamW for all weights, or Muon for the matrices and AdamW for the rest, at one learning rate."
    )
    learning_rate: float = argument(1e-4, "Highest learning rate.")
    lr_scheduler: LRSchedule = argument("cosine", "Course of the learning rate over the optimiser steps.")
    lr_warmup_steps: int = argument(500, "Optimiser steps of linear warm-up.")
    adam_beta1: float = argument(0.95, "AdamW's decay of the mean gradient.")
    adam_beta2: float = argument(0.999, "AdamW's decay of the mean squared gradient.")
    adam_weight_decay: float = argument(1e-6, "AdamW's weight decay.")
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = argument(1.0, "Clip the gradient to this norm; 0: no clipping.")
    max_skipped_steps: int = argument(
        0,
        "Leave out up to so many optimiser steps in a row whose gradient is not finite; 0: the first one stops the run. With it the "
        "device is waited for at every step.",
    )
    use_ema: bool = argument(True, "Evaluate, sample and publish an exponential moving average of the weights.")
    ema_inv_gamma: float = argument(1.0, "Warm-up of the average: decay = 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = argument(0.75, "See --ema_inv_gamma.")
    ema_max_decay: float = argument(0.9999, "Highest decay of the average.")
    mixed_precision: Literal["no", "fp16", "bf16"] = argument(
        "no", "Precision of the network's arithmetic. Noise, loss and optimiser stay in float32."
    )
    compile: bool = argument(False, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = argument(
        False, "Compute activations again in the backward pass: less memory for a third more arithmetic."
    )
    channels_last: bool = argument(False, "Lay tensors out with the channels last.")
    seed: int = argument(0, "Seed of everything: initial weights, data order, times, noise, dropout, samples.")


@dataclass
class RunArguments:
    """Where results go: checkpoints, logs, evaluations, samples, the Hub."""

    _argument_group_name = "run"

    output_dir: str = argument("outputs/train", "Folder of the pipeline, checkpoints, logs and pictures.")
    overwrite_output_dir: bool = argument(
        False, "Start anew in an occupied --output_dir, deleting what an earlier run of this script wrote there."
    )
    checkpointing_steps: int = argument(500, "Optimiser steps between checkpoints.")
    checkpoints_total_limit: int = argument(2, "Checkpoints kept; 0: all.")
    async_checkpoints: bool = argument(
        False, "Copy the state to the host's memory and write it while training goes on, instead of stopping to write."
    )
    resume_from_checkpoint: str | None = argument(
        None, "'latest' (start from the beginning if there is none), or the path of a checkpoint."
    )
    logging_steps: int = argument(50, "Optimiser steps between log entries; the device is waited for only then.")
    logging_dir: str = argument("logs", "Folder of the tracker's files, inside --output_dir.")
    logger: Literal["tensorboard", "wandb", "trackio", "none"] = argument(
        "tensorboard", "Tracker; metrics.jsonl in --output_dir is written in any case."
    )
    eval_steps: int | None = argument(
        None, "Optimiser steps between evaluations of bits/dim; none: at the end; 0: never."
    )
    eval_num_samples: int = argument(4, "Network evaluations for each image and evaluation, stratified over time.")
    eval_max_images: int | None = argument(None, "Evaluate on so many images of the split; none: all.")
    eval_batch_size: int = argument(64, "Images at a time in evaluations and samples.")
    sample_steps: int | None = argument(None, "Optimiser steps between sample grids; none: at the end; 0: never.")
    num_sample_images: int = argument(64, "Images in a sample grid.")
    push_to_hub: bool = argument(False, "Publish the model, its card and its pictures on the Hub at the end.")
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
    """All arguments of a run, in their groups."""

    data: DataArguments = field(default_factory=DataArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    diffusion: DiffusionArguments = field(default_factory=DiffusionArguments)
    optimization: OptimizationArguments = field(default_factory=OptimizationArguments)
    run: RunArguments = field(default_factory=RunArguments)

    def flat(self) -> dict[str, Any]:
        """Argument name -> value, over all groups; never the Hub token."""
        values: dict[str, Any] = {}
        for group in dataclasses.fields(self):
            values |= dataclasses.asdict(getattr(self, group.name))
        del values["hub_token"]
        return values


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one sentence, and say what to use in place of train_unconditional.py's others."""

    def __init__(self, groups: tuple[type, ...], **kwargs: Any) -> None:
        super().__init__(
            groups, allow_abbrev=False, usage="%(prog)s [--config RECIPE.yaml] [--argument VALUE ...]", **kwargs
        )
        # so that -5e-1 is a value: argparse itself knows exponents from Python 3.14 on
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists and explains all arguments)\n")

    def parse(self, tokens: list[str]) -> list[Any]:
        """The dataclasses of a command line; anything unknown is an error."""
        *parsed, unknown = self.parse_args_into_dataclasses(
            tokens, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.error(self._unknown(unknown[0]))
        return parsed

    @staticmethod
    def given(tokens: list[str]) -> set[str]:
        """The names of the arguments that stand on a command line."""
        return {token.removeprefix("--").split("=")[0].replace("-", "_") for token in tokens if token.startswith("--")}

    def names(self) -> set[str]:
        """All argument names and aliases, without dashes."""
        return {option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")}

    def _unknown(self, token: str) -> str:
        name = token.removeprefix("--").split("=")[0].replace("-", "_")
        if name in REPLACED_ARGUMENTS:
            return f"--{name} is not an argument of this script: {REPLACED_ARGUMENTS[name]}."
        if not token.startswith("--"):
            return f"{token!r} belongs to no argument."
        close = difflib.get_close_matches(name, self.names(), n=1)
        return f"unknown argument --{name}." + (f" Did you mean --{close[0]}?" if close else "")

    def recipe_tokens(self, path: Path) -> list[str]:
        """A recipe as command line tokens, checked on its own so that an error names the file."""
        if not path.is_file():
            self.error(
                f"--config: there is no file {path}; recipes that come with this script: {', '.join(recipes())}."
            )
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            self.error(f"--config {path}: not valid YAML: {error}")
        if not isinstance(recipe, dict):
            self.error(f"--config {path}: a recipe is a list of `argument: value` lines.")
        known = self.names() - {"help", "config"}
        tokens: list[str] = []
        for key, value in recipe.items():
            if key not in known:
                self.error(f"{path}: {self._unknown(f'--{key}')}")
            if isinstance(value, dict):
                self.error(f"{path}: {key} must be a value or a list of values, got {value!r}.")
            if isinstance(value, list):
                tokens += [f"--{key}", *map(str, value)]
            elif value is not None:  # null: the default
                tokens.append(f"--{key}={value}")
        _, unknown = _with_prog(self, f"{self.prog}: {path}").parse_known_args(tokens)
        if unknown:
            self.error(f"{path}: {self._unknown(unknown[0])}")
        return tokens


def _with_prog(parser: Parser, prog: str) -> Parser:
    same = Parser(tuple(parser.dataclass_types))
    same.prog = prog
    return same


def recipes() -> list[str]:
    """The recipes that come with the script."""
    return sorted(str(path) for path in RECIPES.glob("*.yaml"))


def split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take `--config X` or `--config=X` out of a command line."""
    rest, config, tokens = [], None, iter(argv)
    for token in tokens:
        if token == "--config":
            config = next(tokens, "")
        elif token.startswith("--config="):
            config = token.removeprefix("--config=")
        else:
            rest.append(token)
    return config, rest


def make_parser() -> Parser:
    """The parser of `train.py`."""
    parser = Parser(
        GROUPS,
        description="Train a variational diffusion model. With neither data nor recipe: the 8x8 digits, by recipes/digits.yaml.",
    )
    parser.add_argument(
        "--config", metavar="RECIPE.yaml", default=None, help="File of arguments; the command line overrides it."
    )
    return parser


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The arguments of a run from its command line (default: sys.argv), checked.

    Precedence: command line, then the recipe, then the defaults. The recipe is --config's; without it, and without a data
    set on the command line, it is the one for the embedded digits.
    """
    parser = make_parser()
    config, tokens = split_config(sys.argv[1:] if argv is None else argv)
    if config is None and not parser.given(tokens) & {"dataset_name", "train_data_dir"}:
        config = str(DIGITS_RECIPE)
    if config is not None:
        tokens = parser.recipe_tokens(Path(config)) + tokens
    data, model, diffusion, optimization, run, _ = parser.parse(tokens)
    arguments = Arguments(data, model, diffusion, optimization, run)
    try:
        check_arguments(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError for values that cannot work, before anything heavy is done."""
    values = arguments.flat()
    positive = [
        *("train_batch_size", "gradient_accumulation_steps", "num_epochs", "checkpointing_steps", "logging_steps"),
        *("eval_num_samples", "eval_batch_size", "num_sample_images", "ddpm_num_inference_steps", "learning_rate"),
        *("ddpm_num_steps", "max_train_steps", "resolution", "max_train_samples", "eval_max_images", "min_snr_gamma"),
        *("ema_inv_gamma", "adam_epsilon", "hidden_channels", "layers_per_block", "norm_num_groups"),
        *("latent_channels", "num_layers", "shuffle_buffer_size"),
    ]
    for name in positive:
        if values[name] is not None and not values[name] > 0:
            raise ValueError(f"--{name} must be positive, got {values[name]}.")
    for name in (
        "lr_warmup_steps",
        "max_grad_norm",
        "checkpoints_total_limit",
        "dataloader_num_workers",
        "adam_weight_decay",
        "max_skipped_steps",
    ):
        if not values[name] >= 0:
            raise ValueError(f"--{name} must not be negative, got {values[name]}.")
    for name in ("eval_steps", "sample_steps"):
        if values[name] is not None and values[name] < 0:
            raise ValueError(f"--{name} must not be negative, got {values[name]}.")
    for name in ("adam_beta1", "adam_beta2", "dropout", "class_dropout", "ema_max_decay"):
        if not 0 <= values[name] < 1:
            raise ValueError(f"--{name} must lie in [0, 1), got {values[name]}.")
    if not 0 < values["eval_fraction"] < 1:
        raise ValueError(f"--eval_fraction must lie in (0, 1), got {values['eval_fraction']}.")
    if not 0 < values["memory_share"] <= 1:
        raise ValueError(f"--memory_share must lie in (0, 1], got {values['memory_share']}.")
    if values["streaming"]:
        wanted = {
            "a data set (--dataset_name or --train_data_dir)": values["dataset_name"] or values["train_data_dir"],
            "--max_train_steps": values["max_train_steps"] is not None,
            "--eval_split": values["eval_split"] is not None,
            "no --max_train_samples": values["max_train_samples"] is None,
        }
        missing = [name for name, there in wanted.items() if not there]
        if missing:
            raise ValueError(f"--streaming needs {', and '.join(missing)}.")
    if not values["log_snr_max"] > values["log_snr_min"]:
        raise ValueError(
            f"--log_snr_max must exceed --log_snr_min, got {values['log_snr_max']} <= {values['log_snr_min']}. Did you pass gamma? "
            "log SNR = -gamma."
        )
    _check_latent(arguments)
    if values["class_dropout"] and not values["class_conditional"]:
        raise ValueError("--class_dropout needs --class_conditional.")
    _check_learning(arguments.diffusion)
    table = values["ddpm_beta_schedule"] not in LOG_SNR_SCHEDULES
    if values["eval_num_samples"] < (4 if table else 2):
        raise ValueError(
            f"--eval_num_samples must be at least 2, and 4 for a table of betas, for an error bar; got {values['eval_num_samples']}."
        )
    if table and values["train_time"] == "discrete" and values["loss"] in ("elbo", "sigmoid", "edm"):
        raise ValueError(
            f"--loss {values['loss']} with a table of betas needs --train_time continuous: the step from x_1 to clean data has "
            "no finite ELBO weight (evaluations give it DDPM's decoder)."
        )


def _check_latent(arguments: Arguments) -> None:
    """Raise ValueError for arguments that do not go with a model that has a learned encoder."""
    model, diffusion = arguments.model, arguments.diffusion
    if model.vae is not None and model.model not in ("vae", "latent_vdm"):
        raise ValueError(f"--vae is for --model vae and latent_vdm, not {model.model}.")
    if model.model == "vdm":
        return
    if arguments.optimization.compile:
        raise ValueError(f"--compile is not done for --model {model.model}.")
    if model.model != "latent_vdm":
        return
    shares = model.latent_stages
    if len(shares) != 3 or min(shares) < 0 or not sum(shares):
        raise ValueError(f"--latent_stages must be three shares, not all 0, got {shares}.")
    wanted = {
        "--loss elbo": diffusion.loss == "elbo",
        "--time_sampling low_discrepancy": diffusion.time_sampling == "low_discrepancy",
        "--variance_type fixed_small": diffusion.variance_type == "fixed_small",
        "no --learn_schedule": not diffusion.learn_schedule,
        "continuous --train_time": not trains_in_discrete_time(diffusion),
        "a --ddpm_beta_schedule in log SNR": diffusion.ddpm_beta_schedule in LOG_SNR_SCHEDULES,
    }
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise ValueError(f"--model latent_vdm needs {', and '.join(missing)}.")


def trains_in_discrete_time(args: DiffusionArguments) -> bool:
    """What --train_time auto means: DDPM's own steps for DDPM's own losses, continuous time for the rest."""
    if args.train_time == "auto":
        return args.ddpm_beta_schedule not in LOG_SNR_SCHEDULES and args.loss not in ELBO_WEIGHTED
    return args.train_time == "discrete"


def _check_learning(args: DiffusionArguments) -> None:
    """Raise ValueError for things to learn that do not go with the rest."""
    if args.schedule_learning_rate <= 0 or args.vlb_weight <= 0:
        raise ValueError("--schedule_learning_rate and --vlb_weight must be positive.")
    if args.learn_end_points and not (args.learn_schedule and args.loss == "elbo"):
        raise ValueError(
            "--learn_end_points needs --learn_schedule and --loss elbo: the bound alone says where they belong."
        )
    if args.learn_schedule:
        wanted = {
            "--ddpm_beta_schedule log_snr_linear": args.ddpm_beta_schedule == "log_snr_linear",
            f"--loss {' or '.join(ELBO_WEIGHTED)}": args.loss in ELBO_WEIGHTED,
            "continuous --train_time": not trains_in_discrete_time(args),
            "a --time_sampling that is not adaptive (the schedule itself is)": args.time_sampling != "adaptive",
            "no --log_snr_table (it makes its own)": args.log_snr_table is None,
        }
        missing = [name for name, there in wanted.items() if not there]
        if missing:
            raise ValueError(f"--learn_schedule needs {', and '.join(missing)}.")
    if args.variance_type != "fixed_small" and not trains_in_discrete_time(args):
        raise ValueError(
            f"--variance_type {args.variance_type} needs --train_time discrete: in continuous time every variance is the posterior's."
        )
