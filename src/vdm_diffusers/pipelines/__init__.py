"""Pipelines: from noise to images, as Diffusers' users know it."""

from vdm_diffusers.pipelines.langevin_corrector import LangevinCorrector as LangevinCorrector
from vdm_diffusers.pipelines.pipeline_latent_vdm import LatentVDMPipeline as LatentVDMPipeline
from vdm_diffusers.pipelines.pipeline_vdm import VDMPipeline as VDMPipeline
