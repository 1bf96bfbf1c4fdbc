#!/usr/bin/env bash
# Print the Python to work with, after making sure that it has this package with the named extras:
#     scripts/environment.sh train,test
# The active environment is used where it has a suitable torch, whichever build that is. Otherwise .venv is made.
# Only the path goes to stdout; everything said goes to stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-train,test}"

say() { printf '%s\n' "$*" >&2; }

# One word for what the given Python offers: old (Python itself), notorch, torch (the rest is missing), or ready.
probe() {
    "$1" -W ignore - "$extras" <<'PY'
import re, sys
if sys.version_info < (3, 10):
    sys.exit(print("old"))
import importlib.util, os
from importlib import metadata

def release(version):
    return tuple(int(n) for n in re.match(r"\d+(?:\.\d+)*", version).group().split("."))

lowest = re.search(r'"torch>=([\d.]+)"', open("pyproject.toml").read()).group(1)
try:
    import torch  # a torch that is installed but cannot be loaded is none
except Exception:
    sys.exit(print("notorch"))
if release(torch.__version__) < release(lowest):
    sys.exit(print("notorch"))

def satisfied(requirement, extras):
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
        return True
    if requirement.name == "vdm-diffusers":  # an extra that includes another one
        return complete(requirement.extras)
    return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)

def complete(extras):
    requirements = map(Requirement, metadata.requires("vdm-diffusers"))
    return all(satisfied(requirement, extras) for requirement in requirements)

try:
    from packaging.requirements import Requirement
    here = os.path.realpath("src/vdm_diffusers/__init__.py")
    spec = importlib.util.find_spec("vdm_diffusers")
    ready = spec is not None and os.path.realpath(spec.origin) == here and complete(sys.argv[1].split(","))
except (ImportError, metadata.PackageNotFoundError):
    ready = False
print("ready" if ready else "torch")
PY
}

install() { # python, pip's further arguments
    local python="$1"
    shift
    say "Installing vdm-diffusers[$extras] with $python"
    "$python" -m pip install -e ".[$extras]" "$@" >&2
}

is_virtual() { "$1" -c 'import os, sys; sys.exit(sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ)'; }

active=""
for candidate in ${PYTHON:-python python3}; do
    if command -v "$candidate" >/dev/null && found="$(probe "$candidate")" && [ "$found" != old ]; then
        active="$(command -v "$candidate")"
        break
    fi
done
if [ -z "$active" ]; then
    say "No Python of version 3.10 or newer found. Activate an environment that has one, or name it: PYTHON=/path/to/python make ..."
    exit 1
fi

if [ "$found" = ready ]; then
    echo "$active"
    exit
elif [ "$found" = torch ] && is_virtual "$active"; then
    install "$active" # without constraints.txt, which would exchange the environment's torch
    echo "$active"
    exit
fi

python=.venv/bin/python
if [ ! -x "$python" ]; then
    if [ "$found" = torch ]; then
        say "Making .venv on top of $active, whose torch it uses (0.7 GB on disk for the other packages)."
        "$active" -m venv --system-site-packages .venv
    else
        say "The active Python ($active) has no suitable torch, so an environment is made in .venv."
        say "On Linux, pip's default build of torch includes CUDA: several GB to download. Without a GPU, the CPU build does"
        say "(0.2 GB, and as much for the other packages): press Ctrl-C, run \`$active -m venv .venv\`, install torch into"
        say ".venv as https://pytorch.org/get-started/locally/ says for CPU, and give this command again."
        "$active" -m venv .venv
    fi
fi
case "$(probe "$python")" in
    ready) ;;
    torch) install "$python" ;;
    *) install "$python" -c constraints.txt ;;
esac
echo "$PWD/$python"
