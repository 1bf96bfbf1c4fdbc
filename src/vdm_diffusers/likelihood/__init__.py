r"""Estimators of the likelihood of integer data under a diffusion model, with an error bar that can be trusted.

The bound of `vdm_diffusers.elbo` has three terms. The prior's is closed form. VDM's reconstruction term is an integral
over one normal variable for each level of a pixel, done here by quadrature; DDPM's needs the network at x_1. The
diffusion term is a sum (or an integral) over log SNR of an expectation over noise, and is estimated by Monte Carlo:

    L = sum over the sites of w(site) E|x - x_hat|^2 + constant(site)    ~    mean_j f(site_j, eps_j) / density(site_j)

Sites are placed by a randomly shifted lattice over all images of a group and all their evaluations, folded
(`time_sampling.fold`) and passed through the inverse of a cumulative density. Every image has several lattices with
independent shifts and noise: they are replicates, and their scatter gives the error of the estimate for these very
images. (The scatter of the points of one lattice says nothing of the lattice's error, which may be a hundred times
smaller.)

Evaluations of an image at neighbouring sites have noise from one Latin hypercube: each pixel has one of them in each
quarter of the normal distribution, and what single pixels add to the loss averages out (Stein 1987, "Large sample
properties of simulations using Latin hypercube sampling"). More of them at a time would lie too far apart in log SNR.

Everything here is in torch alone. `vdm_diffusers.evaluate_likelihood` adapts pipelines, schedulers and data sets to
it.
"""

from vdm_diffusers.likelihood.bound import evaluate_bound as evaluate_bound
from vdm_diffusers.likelihood.chains import measure_mse as measure_mse
from vdm_diffusers.likelihood.chains import sample_chain as sample_chain
from vdm_diffusers.likelihood.classification import ClassificationReport as ClassificationReport
from vdm_diffusers.likelihood.comparison import ComparisonReport as ComparisonReport
from vdm_diffusers.likelihood.comparison import evaluate_difference as evaluate_difference
from vdm_diffusers.likelihood.denoising_model import DenoisingModel as DenoisingModel
from vdm_diffusers.likelihood.denoising_model import Predict as Predict
from vdm_diffusers.likelihood.denoising_model import learned_variance_of as learned_variance_of
from vdm_diffusers.likelihood.denoising_model import sum64 as sum64
from vdm_diffusers.likelihood.importance_weighted import evaluate_importance_weighted as evaluate_importance_weighted
from vdm_diffusers.likelihood.reconstruction import Decoder as Decoder
from vdm_diffusers.likelihood.reconstruction import DensityDecoder as DensityDecoder
from vdm_diffusers.likelihood.reconstruction import GaussianDecoder as GaussianDecoder
from vdm_diffusers.likelihood.reconstruction import SoftmaxDecoder as SoftmaxDecoder
from vdm_diffusers.likelihood.reconstruction import expected_reconstruction as expected_reconstruction
from vdm_diffusers.likelihood.reconstruction import expected_softmax_nats as expected_softmax_nats
from vdm_diffusers.likelihood.report import LikelihoodReport as LikelihoodReport
from vdm_diffusers.likelihood.terms import ContinuousTerm as ContinuousTerm
from vdm_diffusers.likelihood.terms import DiffusionTerm as DiffusionTerm
from vdm_diffusers.likelihood.terms import DiscreteTerm as DiscreteTerm
from vdm_diffusers.likelihood.terms import Profile as Profile
