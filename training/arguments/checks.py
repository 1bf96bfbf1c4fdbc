"""What is wrong with a set of arguments, each of which is possible by itself: said before anything heavy is done."""

from __future__ import annotations

from .groups import Arguments, DiffusionArguments
from .words import words

LOG_SNR_SCHEDULES = words("noise_schedules", "LOG_SNR_SCHEDULES")
ELBO_WEIGHTED = words("objectives", "ELBO_WEIGHTED")
LOWEST_POLYNOMIAL_RATE = 1e-7  # where Diffusers' polynomial schedule ends


def check_arguments(arguments: Arguments) -> None:
    """Make sure that the arguments can work together.

    Raises:
        ValueError: they cannot; one sentence that names the argument and says what to do.
    """
    _check_data(arguments)
    _check_latent(arguments)
    _check_diffusion(arguments)
    _check_learning(arguments.diffusion)
    optimization = arguments.optimization
    if optimization.lr_scheduler == "polynomial" and optimization.learning_rate <= LOWEST_POLYNOMIAL_RATE:
        raise ValueError(
            f"--learning_rate must exceed {LOWEST_POLYNOMIAL_RATE:g}, where --lr_scheduler polynomial ends, got "
            f"{optimization.learning_rate}."
        )


def trains_in_discrete_time(args: DiffusionArguments) -> bool:
    """What --train_time auto means: DDPM's own steps for DDPM's own losses, continuous time for the rest."""
    if args.train_time == "auto":
        return args.ddpm_beta_schedule not in LOG_SNR_SCHEDULES and args.loss not in ELBO_WEIGHTED
    return args.train_time == "discrete"


def _require(what: str, wanted: dict[str, bool]) -> None:
    """Raise ValueError that names what of `wanted` is missing."""
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise ValueError(f"{what} needs {', and '.join(missing)}.")


def _check_data(arguments: Arguments) -> None:
    data = arguments.data
    if data.dataset_name is not None and data.train_data_dir is not None:
        raise ValueError("--dataset_name and --train_data_dir both say which images to train on: give one of them.")
    if data.streaming:
        _require(
            "--streaming",
            {
                "a data set (--dataset_name or --train_data_dir)": bool(data.dataset_name or data.train_data_dir),
                "--max_train_steps": arguments.optimization.max_train_steps is not None,
                "--eval_split": data.eval_split is not None,
                "no --max_train_samples": data.max_train_samples is None,
            },
        )


def _check_latent(arguments: Arguments) -> None:
    """Arguments that do not go with a model that has a learned encoder."""
    model, diffusion = arguments.model, arguments.diffusion
    if model.model == "vdm":
        return
    if arguments.optimization.compile:
        raise ValueError(f"--compile is not done for --model {model.model}.")
    if model.model != "latent_vdm":
        return
    shares = model.latent_stages
    if len(shares) != 3 or not sum(shares):
        raise ValueError(f"--latent_stages must be three shares, not all 0, got {shares}.")
    _require(
        "--model latent_vdm",
        {
            "--loss elbo": diffusion.loss == "elbo",
            "--time_sampling low_discrepancy": diffusion.time_sampling == "low_discrepancy",
            "--variance_type fixed_small": diffusion.variance_type == "fixed_small",
            "no --learn_schedule": not diffusion.learn_schedule,
            "continuous --train_time": not trains_in_discrete_time(diffusion),
            "a --ddpm_beta_schedule in log SNR": diffusion.ddpm_beta_schedule in LOG_SNR_SCHEDULES,
        },
    )


def _check_diffusion(arguments: Arguments) -> None:
    """The diffusion with its evaluation and its classes."""
    diffusion, run = arguments.diffusion, arguments.run
    if not diffusion.log_snr_max > diffusion.log_snr_min:
        raise ValueError(
            f"--log_snr_max must exceed --log_snr_min, got {diffusion.log_snr_max} <= {diffusion.log_snr_min}. Did "
            "you "
            "pass gamma? log SNR = -gamma."
        )
    if arguments.model.class_dropout and not arguments.model.class_conditional:
        raise ValueError("--class_dropout needs --class_conditional.")
    _check_path(arguments)
    table = diffusion.ddpm_beta_schedule not in LOG_SNR_SCHEDULES
    if run.eval_num_samples < (4 if table else 2):
        raise ValueError(
            "--eval_num_samples must be at least 2, and 4 for a table of betas, for an error bar; got "
            f"{run.eval_num_samples}."
        )
    if 0 < run.eval_change_samples < (4 if table else 2):
        raise ValueError(
            "--eval_change_samples must be 0, or at least 2, and 4 for a table of betas, for an error bar; got "
            f"{run.eval_change_samples}."
        )
    if run.early_stopping is not None and not (run.eval_steps and run.eval_change_samples):
        raise ValueError(
            "--early_stopping needs --eval_steps and --eval_change_samples, which say when there is no gain."
        )
    if table and diffusion.train_time == "discrete" and diffusion.loss in ELBO_WEIGHTED:
        raise ValueError(
            f"--loss {diffusion.loss} with a table of betas needs --train_time continuous: the step from x_1 to clean "
            "data has no finite ELBO weight (evaluations give it DDPM's decoder)."
        )


def _check_path(arguments: Arguments) -> None:
    """Flow matching with what it does not have."""
    diffusion = arguments.diffusion
    if diffusion.path == "flow":
        _require(
            "--path flow",
            {
                "--prediction_type flow_prediction": diffusion.prediction_type == "flow_prediction",
                "continuous --train_time": not trains_in_discrete_time(diffusion),
                "--variance_type fixed_small": diffusion.variance_type == "fixed_small",
                "--model vdm": arguments.model.model == "vdm",
                "--ddpm_num_steps of at least 3": diffusion.ddpm_num_steps >= 3,
            },
        )


def _check_learning(args: DiffusionArguments) -> None:
    """Things to learn that do not go with the rest."""
    if args.learn_end_points and not (args.learn_schedule and args.loss == "elbo"):
        raise ValueError(
            "--learn_end_points needs --learn_schedule and --loss elbo: the bound alone says where they belong."
        )
    if args.learn_schedule:
        _require(
            "--learn_schedule",
            {
                "--ddpm_beta_schedule log_snr_linear": args.ddpm_beta_schedule == "log_snr_linear",
                f"--loss {' or '.join(ELBO_WEIGHTED)}": args.loss in ELBO_WEIGHTED,
                "continuous --train_time": not trains_in_discrete_time(args),
                "a --time_sampling that is not adaptive (the schedule itself is)": args.time_sampling != "adaptive",
                "no --log_snr_table (it makes its own)": args.log_snr_table is None,
            },
        )
    if args.variance_type != "fixed_small" and not trains_in_discrete_time(args):
        raise ValueError(
            f"--variance_type {args.variance_type} needs --train_time discrete: in continuous time every variance is "
            "the "
            "posterior's."
        )
