#!/bin/sh
# Builds the extension with the address and undefined-behaviour sanitizers into a temporary folder and runs the native
# backend's tests on that build. Run from the checkout, with the interpreter to use as $PYTHON. GCC, Linux.
set -eu
python=${PYTHON:-python}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
KLQ_BUILD_NATIVE=1 KLQ_NATIVE_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O1 -Wno-uninitialized" \
  "$python" setup.py --quiet build_ext --build-lib "$build" --build-temp "$build/objects"
# Python itself is not instrumented: the runtime comes first, and what Python leaves allocated is no leak of ours.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 \
  UBSAN_OPTIONS=print_stacktrace=1 \
  KLQ_NATIVE_LIBRARY="$(ls "$build"/klq_kernels/backends/_native*.so)" \
  "$python" -m pytest -q -p no:cacheprovider -k "native or vocabulary_major" "$@" \
  tests/kernels/test_native.py tests/kernels/test_vocabulary_major.py \
  tests/core/test_returns.py tests/core/test_logprobs.py tests/core/test_loss.py tests/core/test_selected.py
