#!/bin/sh
# Downloads the peers that `make gpu` measures, for a machine with a GPU and without a network:
#
#   sh bench/gpu_wheels.sh FOLDER [PYTHON]     PYTHON is the other machine's version, 3.12 by default
#
# There, unpack them beside the installed packages and measure:
#
#   for wheel in FOLDER/*.whl; do python -m zipfile -e "$wheel" /tmp/peers; done
#   PYTHONPATH=/tmp/peers make gpu ARGS="--parts loss,logprobs"
#
# Their own dependencies (torch, triton, transformers) are taken as they are there. Not among them: quack-kernels, whose
# compiler (nvidia-cutlass-dsl) is 90 MB and has to be installed; verl and flash-attn, which have to be built.
set -eu
FOLDER=${1:?"usage: sh bench/gpu_wheels.sh FOLDER [PYTHON]"}
PYTHON=${2:-3.12}
for package in liger-kernel cut-cross-entropy trl; do
    python3 -m pip --disable-pip-version-check download -qq --no-deps --only-binary=:all: \
        --python-version "$PYTHON" --implementation cp --platform manylinux_2_28_x86_64 \
        --dest "$FOLDER" "$package"
done
ls -l "$FOLDER"
