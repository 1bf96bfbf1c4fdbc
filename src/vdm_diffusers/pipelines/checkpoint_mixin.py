"""Loading, saving and publishing of this package's pipelines: safetensors only, looked over before anything is
built.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from concurrent.futures import Future
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo

from vdm_diffusers.hub.cards import ModelDescription, write_model_card
from vdm_diffusers.hub.publishing import publish_folder, replacing_weights
from vdm_diffusers.safety import cache_if_unreachable, check_checkpoint, check_location, check_repository


class CheckpointMixin:
    """What stands in the place of `DiffusionPipeline`'s own loading and saving. Put it before that class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load from a folder or a repository of the Hub, as [`DiffusionPipeline.from_pretrained`] does, and more
        carefully.

        Weights are read from safetensors only, and the checkpoint is looked over before anything is built from it, or,
        on the Hub, downloaded (see `vdm_diffusers.safety`). Code of a repository is run with `trust_remote_code=True`
        alone.

        Args:
            pretrained_model_name_or_path, kwargs: as there: `torch_dtype`, `variant`, `revision`, `token`,
                `device_map`, `local_files_only`, components such as `scheduler`, and the pipeline's own `num_levels`,
                `pixel_encoding`.

        Raises:
            UnsafeCheckpointError (a ValueError): the checkpoint is damaged, hostile, or contradicts itself.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("`use_safetensors` must be True: a pickled checkpoint runs code when it is loaded.")
        check_location(pretrained_model_name_or_path)
        if os.path.isdir(pretrained_model_name_or_path):
            _check_folder(cls, pretrained_model_name_or_path, kwargs)
        return DiffusionPipeline.from_pretrained.__func__(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Fetch a repository into the cache, as [`DiffusionPipeline.download`] does, once its configs have been
        checked.
        """
        if not kwargs.get("local_files_only"):
            # what the cache holds is checked below
            with cache_if_unreachable(pretrained_model_name) as cached:
                check_repository(
                    pretrained_model_name,
                    pipeline=cls.__name__,
                    revision=kwargs.get("revision"),
                    token=kwargs.get("token"),
                    cache_dir=kwargs.get("cache_dir"),
                    passed=kwargs,
                    trust_remote_code=kwargs.get("trust_remote_code", False),
                )
            kwargs |= cached
        folder = DiffusionPipeline.download.__func__(cls, pretrained_model_name, **kwargs)
        _check_folder(cls, folder, kwargs)
        return folder

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str = "Upload VDMPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Save as safetensors and JSON. Arguments as in [`DiffusionPipeline.save_pretrained`], the last five for
        `push_to_hub`.

        Raises:
            ValueError: `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: a pickled checkpoint runs code when it is loaded.")
        with replacing_weights(save_directory):
            DiffusionPipeline.save_pretrained(self, save_directory, variant=variant, max_shard_size=max_shard_size)
        if push_to_hub:
            publish_folder(
                save_directory,
                repo_id or pathlib.Path(save_directory).resolve().name,
                private=private,
                create_pr=create_pr,
                commit_message=commit_message,
                token=token,
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload VDMPipeline",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        revision: str | None = None,
        tag: str | None = None,
        max_shard_size: int | str | None = None,
        card: ModelDescription | None = None,
        run_as_future: bool = False,
    ) -> CommitInfo | Future[CommitInfo]:
        """Publish on the Hub, with a card and with the code that loads it where this package is not installed.

        Args:
            repo_id, private, token, create_pr, revision, tag, commit_message, run_as_future: see
                [`~vdm_diffusers.hub.publish_folder`], also on what is raised and returned.
            safe_serialization, variant, max_shard_size: see `save_pretrained`.
            card: what the model card says; `None`: the repository's own card stays, or a short one without figures is
                made.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            if card is not None:
                write_model_card(folder, card)
            return publish_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                tag=tag,
                commit_message=commit_message,
                token=token,
                run_as_future=run_as_future,
            )


def _check_folder(pipeline: type, folder: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    trust = kwargs.get("trust_remote_code", False)
    check_checkpoint(folder, pipeline=pipeline.__name__, passed=kwargs, trust_remote_code=trust)
