"""Likelihoods of images under models of Diffusers: the front door, and what adapts pipelines, schedulers and data
sets to it.
"""

from vdm_diffusers.evaluation.chains import Grid as Grid
from vdm_diffusers.evaluation.chains import chain_log_snrs as chain_log_snrs
from vdm_diffusers.evaluation.classification import MutualInformationReport as MutualInformationReport
from vdm_diffusers.evaluation.classification import classify as classify
from vdm_diffusers.evaluation.classification import mutual_information as mutual_information
from vdm_diffusers.evaluation.comparison import compare_likelihood as compare_likelihood
from vdm_diffusers.evaluation.likelihood import evaluate_likelihood as evaluate_likelihood
from vdm_diffusers.evaluation.methods import METHODS as METHODS
from vdm_diffusers.evaluation.methods import Continuous as Continuous
from vdm_diffusers.evaluation.methods import Discrete as Discrete
from vdm_diffusers.evaluation.methods import EstimationMethod as EstimationMethod
from vdm_diffusers.evaluation.methods import ImportanceWeighted as ImportanceWeighted
from vdm_diffusers.evaluation.methods import Method as Method
from vdm_diffusers.evaluation.methods import ProbabilityFlow as ProbabilityFlow
from vdm_diffusers.evaluation.optimal_variance import estimate_optimal_variance as estimate_optimal_variance
