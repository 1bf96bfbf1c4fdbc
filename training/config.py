"""The arguments under the name they had before `arguments` was a package."""

from arguments import *  # noqa: F403
