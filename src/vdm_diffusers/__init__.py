"""Variational diffusion models for Hugging Face Diffusers."""

__version__ = "0.1.0"
