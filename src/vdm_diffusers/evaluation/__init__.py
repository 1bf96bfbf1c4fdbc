"""Likelihoods of images under models of Diffusers: the front door, and what adapts pipelines, schedulers and data sets to it."""

from vdm_diffusers.evaluation.chains import Grid as Grid
from vdm_diffusers.evaluation.chains import chain_log_snrs as chain_log_snrs
from vdm_diffusers.evaluation.likelihood import METHODS as METHODS
from vdm_diffusers.evaluation.likelihood import Method as Method
from vdm_diffusers.evaluation.likelihood import evaluate_likelihood as evaluate_likelihood
from vdm_diffusers.evaluation.optimal_variance import estimate_optimal_variance as estimate_optimal_variance
