"""`CheckpointMixin` for code that travels with a published model: saves and publishes together with this very file.

It takes the place of `pipelines.checkpoint_mixin` there. Without the package nothing looks over a checkpoint before it
is built.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi

_PUBLISHED = ("*.safetensors", "*.json", "*.py", "README.md")


class CheckpointMixin:
    """Loading from safetensors only; saving and publishing with the code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As `DiffusionPipeline.from_pretrained`, from safetensors."""
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("`use_safetensors` must be True: a pickled checkpoint runs code when it is loaded.")
        return DiffusionPipeline.from_pretrained.__func__(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As `DiffusionPipeline.save_pretrained`, with this file, so that what is saved loads in the same way."""
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: a pickled checkpoint runs code when it is loaded.")
        options = {name: kwargs.pop(name) for name in ("variant", "max_shard_size") if name in kwargs}
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        DiffusionPipeline.save_pretrained(self, save_directory, **options)
        code = pathlib.Path(__file__)
        for folder in (".", "unet", "scheduler"):
            target = pathlib.Path(save_directory) / folder / code.name
            target.write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
        if push:
            self._publish(save_directory, repo_id or pathlib.Path(save_directory).resolve().name, **kwargs)

    def push_to_hub(
        self, repo_id: str, commit_message: str = "Upload VDMPipeline", private: bool | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Publish on the Hub. A model card with figures is written by the package `vdm-diffusers` alone."""
        options = {name: kwargs.pop(name) for name in ("variant", "max_shard_size") if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, kwargs.pop("safe_serialization", True), **options)
            return self._publish(folder, repo_id, commit_message=commit_message, private=private, **kwargs)

    @staticmethod
    def _publish(
        folder: str | os.PathLike[str],
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload VDMPipeline",
        **options: Any,
    ) -> CommitInfo:
        api = HfApi(token=token)
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            commit_message=commit_message,
            allow_patterns=list(_PUBLISHED),
            **options,
        )
