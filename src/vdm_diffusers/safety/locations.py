"""Where a checkpoint is loaded from: names that could be a folder or a repository, and a Hub that does not answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from diffusers.utils import logging
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

logger = logging.get_logger(__name__)

# of the library that huggingface_hub uses: no connection, and answers that are errors
HTTP_ERROR = HfHubHTTPError.__bases__[0]
OWN_FOLDERS = ("outputs/", "model_cards/")  # of this project's commands: no owner of repositories


def check_location(location: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError for what looks like a path and is not there: the Hub is asked for names alone."""
    text = os.fspath(location)
    looks = (
        not isinstance(location, str) or text.startswith((".", "/", "~", "\\", *OWN_FOLDERS)) or text.count("/") > 1
    )
    if looks and not os.path.isdir(text):
        raise FileNotFoundError(
            f"there is no folder {text!r}. (It looks like a path, so the Hub was not asked: a repository is called "
            "'owner/name'.)"
        )


@contextlib.contextmanager
def cache_if_unreachable(repo_id: str) -> Iterator[dict[str, bool]]:
    """Leave the block, with one line of warning, where the Hub cannot be reached or has too much to do: the cache may
    do.

    Yields the further arguments of a download: local_files_only=True once the block was left.
    """
    options: dict[str, bool] = {}
    try:
        yield options
    except OfflineModeIsEnabled:
        return  # which the client knows itself
    except HTTP_ERROR as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None and status != 429 and status < 500:
            raise
        options["local_files_only"] = True
        logger.warning(
            f"the Hub does not answer ({status or type(error).__name__}): {repo_id} is looked for in the cache."
        )
