"""Variational diffusion models for Hugging Face Diffusers: exact maths, likelihoods in bits/dim, training.

    from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel, evaluate_likelihood

The exact core (`vdm_diffusers.prediction`, `.gaussian`, `.noise_schedules`, `.elbo`, ...) is pure torch; the classes
above are Diffusers' own kinds, and importing this package makes them known to Diffusers
(`vdm_diffusers.registration`).
"""

import sys

# Diffusers asks the module that a checkpoint names for these two, to learn what kind of component a class is.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from .evaluation import (
    Continuous,
    Discrete,
    ImportanceWeighted,
    MutualInformationReport,
    ProbabilityFlow,
    classify,
    compare_likelihood,
    estimate_optimal_variance,
    evaluate_likelihood,
    mutual_information,
)
from .latent_evaluation import evaluate_latent_likelihood
from .likelihood import ClassificationReport, ComparisonReport, LikelihoodReport
from .models import (
    AnalyticStartModel,
    FourierFeaturesUNet,
    HierarchicalVAE,
    LearnedNoiseSchedule,
    VariationalAutoencoder,
    VDMMLPModel,
    VDMUNet2DModel,
    fit_analytic_start,
)
from .pipelines import LatentVDMPipeline, VDMPipeline
from .registration import register_with_diffusers
from .schedulers import VDMFlowScheduler, VDMScheduler, VDMSigmaScheduler

__version__ = "0.1.0"

__all__ = [
    "AnalyticStartModel",
    "ClassificationReport",
    "ComparisonReport",
    "Continuous",
    "Discrete",
    "FourierFeaturesUNet",
    "HierarchicalVAE",
    "ImportanceWeighted",
    "LatentVDMPipeline",
    "LearnedNoiseSchedule",
    "LikelihoodReport",
    "MutualInformationReport",
    "ProbabilityFlow",
    "VDMFlowScheduler",
    "VDMMLPModel",
    "VDMPipeline",
    "VDMScheduler",
    "VDMSigmaScheduler",
    "VDMUNet2DModel",
    "VariationalAutoencoder",
    "classify",
    "compare_likelihood",
    "estimate_optimal_variance",
    "evaluate_latent_likelihood",
    "evaluate_likelihood",
    "fit_analytic_start",
    "mutual_information",
]

register_with_diffusers(
    sys.modules[__name__],
    [
        "AnalyticStartModel",
        "FourierFeaturesUNet",
        "HierarchicalVAE",
        "LatentVDMPipeline",
        "VDMFlowScheduler",
        "VDMMLPModel",
        "VDMPipeline",
        "VDMScheduler",
        "VDMSigmaScheduler",
        "VDMUNet2DModel",
        "VariationalAutoencoder",
    ],
)
