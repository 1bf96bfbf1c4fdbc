"""Networks: what predicts the noise, in the shape that Diffusers' pipelines expect."""

from vdm_diffusers.models.analytic_start import AnalyticStartModel as AnalyticStartModel
from vdm_diffusers.models.analytic_tables import fit_analytic_start as fit_analytic_start
from vdm_diffusers.models.autoencoder_variational import VariationalAutoencoder as VariationalAutoencoder
from vdm_diffusers.models.fourier import FourierFeatures as FourierFeatures
from vdm_diffusers.models.fourier import FourierFeaturesUNet as FourierFeaturesUNet
from vdm_diffusers.models.hierarchical_vae import HierarchicalVAE as HierarchicalVAE
from vdm_diffusers.models.learned_noise_schedule import LearnedNoiseSchedule as LearnedNoiseSchedule
from vdm_diffusers.models.mlp_vdm import VDMMLPModel as VDMMLPModel
from vdm_diffusers.models.unet_vdm import VDMUNet2DModel as VDMUNet2DModel
