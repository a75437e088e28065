"""Builds the optional CPU extension; everything else about the package stands in pyproject.toml.

The package works without the extension, so a missing compiler or torch must not stop an installation.
``KLQ_BUILD_NATIVE`` decides: ``auto`` (the default) builds where it can and otherwise says in one line that it did not,
``1`` fails where it cannot, ``0`` does not try. The extension is compiled against torch's stable ABI and uses nothing
of Python's, so one binary serves every Python and every torch from 2.10 on; torch must be installed beforehand and
visible (``pip install --no-build-isolation``). ``KLQ_NATIVE_FLAGS`` adds compiler and linker flags, for sanitizers.
"""

from __future__ import annotations

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("KLQ_BUILD_NATIVE", "auto")
EXTRA_FLAGS = os.environ.get("KLQ_NATIVE_FLAGS", "").split()
SOURCES = ["csrc/ops.cpp", "csrc/kernels_portable.cpp", "csrc/kernels_avx2.cpp", "csrc/kernels_avx512.cpp"]
HEADERS = "kernels functions residual scans strips simd_plain simd_portable simd_avx2 simd_avx512".split()


def skip(reason: object) -> None:
    """The one line of ``auto``; under ``1`` the end of the build."""
    if MODE == "1":
        raise SystemExit(f"klq_kernels: KLQ_BUILD_NATIVE=1, but the CPU extension cannot be built: {reason}")
    print(f"klq_kernels: installing without the CPU extension ({str(reason).splitlines()[0]})", file=sys.stderr)


def extensions() -> list[Extension]:
    if MODE not in ("0", "1", "auto"):
        raise SystemExit(f"klq_kernels: KLQ_BUILD_NATIVE must be 0, 1 or auto, got {MODE!r}")
    if MODE == "0":
        return []
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        skip(f"{error}; install torch first and build with --no-build-isolation")
        return []
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        skip(f"torch {torch.__version__} is older than 2.10")
        return []
    native = Extension(
        "klq_kernels.backends._native",
        SOURCES,
        depends=[f"csrc/{name}.h" for name in HEADERS],
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
            "-fvisibility=hidden",
            *EXTRA_FLAGS,
        ],
        extra_link_args=EXTRA_FLAGS,
        language="c++",
        py_limited_api=True,
    )
    return [native]


class BuildNative(build_ext):
    """``build_ext`` for a library that is loaded by torch and not imported, and that may be left out."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            skip(f"{type(error).__name__}: {error}")
            self.extensions = []


native = extensions()
setup(
    ext_modules=native,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
