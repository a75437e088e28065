#!/bin/sh
# Downloads the peers that `make gpu` measures, for a machine with a GPU and without a network:
#
#   sh bench/gpu_wheels.sh FOLDER [PYTHON [CUDA]]     the other machine's versions, 3.12 and 13 by default
#
# There, unpack them beside the installed packages and measure:
#
#   for wheel in FOLDER/*.whl; do python -m zipfile -e "$wheel" /tmp/peers; done
#   PYTHONPATH=/tmp/peers:/tmp/peers/nvidia_cutlass_dsl/dsl_packages make gpu ARGS="--parts loss,logprobs"
#
# torch, triton and transformers are taken as they are there. Of the 105 MB, 100 are quack's compiler (nvidia_cutlass_dsl*
# and cuda_*): left behind, quack is reported as missing. Not among them: verl and flash-attn, which have to be built.
set -eu
FOLDER=${1:?"usage: sh bench/gpu_wheels.sh FOLDER [PYTHON [CUDA]]"}
PYTHON=${2:-3.12}
CUDA=${3:-13}
QUACK=0.6.4 COMPILER=4.6.2 # each version of quack wants one of the compiler's

fetch() {
    python3 -m pip --disable-pip-version-check download -qq --no-deps --only-binary=:all: \
        --python-version "$PYTHON" --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        --dest "$FOLDER" "$@"
}

fetch liger-kernel cut-cross-entropy trl
fetch quack-kernels==$QUACK einops apache-tvm-ffi torch-c-dlpack-ext "cuda-bindings==$CUDA.*" cuda-pathfinder "protobuf<7" \
    nvidia-cutlass-dsl==$COMPILER nvidia-cutlass-dsl-libs-core==$COMPILER nvidia-cutlass-dsl-libs-base==$COMPILER \
    "nvidia-cutlass-dsl-libs-cu$CUDA==$COMPILER"
ls -l "$FOLDER"
