#!/usr/bin/env bash
# DeepSpeed as a wheel, and what it needs beside PyTorch's own packages, in a folder for a machine without network:
#   tools/build_deepspeed.sh FOLDER [PYTHON_VERSION_THERE]        e.g. tools/build_deepspeed.sh wheels 3.12
# and there:
#   pip install --no-index --find-links FOLDER --no-deps FOLDER/*.whl
# It is built without its C++ and CUDA parts (DS_BUILD_OPS=0), which ZeRO stage 3 does without: no compiler is needed.
# PYTHON=python3 names the Python that has torch here.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: tools/build_deepspeed.sh FOLDER [PYTHON_VERSION_THERE]}
python=${PYTHON:-.venv/bin/python}
there=${2:-$("$python" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')}
version=$(sed -n 's/^deepspeed==//p' constraints.txt)

# Its setup.py imports torch, so it is built in this environment, not in one of its own.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir "$folder" "deepspeed==$version"
# hjson has no wheel of its own; it is pure Python.
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" hjson
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$there" \
  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any --dest "$folder" \
  einops msgpack ninja py-cpuinfo psutil
ls -l "$folder"
