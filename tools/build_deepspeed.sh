#!/usr/bin/env bash
# Collects DeepSpeed as a wheel, and its dependencies other than PyTorch, in a folder for a machine without network:
#   tools/build_deepspeed.sh FOLDER [TARGET_PYTHON_VERSION]        e.g. tools/build_deepspeed.sh wheels 3.12
# On that machine:
#   pip install --no-index --find-links FOLDER --no-deps FOLDER/*.whl
# It is built without its C++ and CUDA operators (DS_BUILD_OPS=0), so no compiler is needed. ZeRO stage 3 works without
# them. PYTHON=python3 selects the local Python that has torch.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: tools/build_deepspeed.sh FOLDER [TARGET_PYTHON_VERSION]}
python=${PYTHON:-.venv/bin/python}
target_version=${2:-$("$python" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')}
version=$(sed -n 's/^deepspeed==//p' constraints.txt)

# DeepSpeed's setup.py imports torch, so it is built in this environment and not in an isolated one.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir "$folder" "deepspeed==$version"
# hjson is published without a wheel; it is pure Python.
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" hjson
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$target_version" --implementation cp --platform manylinux_2_28_x86_64 \
  --platform manylinux2014_x86_64 --platform any --dest "$folder" \
  einops msgpack ninja py-cpuinfo psutil
ls -l "$folder"
