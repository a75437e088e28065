"""Builds the optional CPU extension; everything else about the package stands in pyproject.toml.

The package works without the extension, so a missing compiler or torch must not stop an installation.
``KLQ_BUILD_NATIVE`` decides: ``auto`` (the default) builds where it can and otherwise says in one line that it did not,
``1`` fails where it cannot, ``0`` does not try. The extension is compiled against torch's stable ABI and uses nothing
of Python's, so one binary serves every Python and every torch from 2.10 on. Only headers and libraries of torch are
needed, so an isolated build takes them from the environment that it installs into. ``KLQ_NATIVE_FLAGS`` adds compiler
and linker flags, for sanitizers.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("KLQ_BUILD_NATIVE", "auto")
EXTRA_FLAGS = os.environ.get("KLQ_NATIVE_FLAGS", "").split()
SOURCES = ["csrc/ops.cpp", "csrc/kernels_portable.cpp", "csrc/kernels_avx2.cpp", "csrc/kernels_avx512.cpp"]


def skip(reason: object) -> None:
    """The one line of ``auto``; under ``1`` the end of the build."""
    if MODE == "1":
        raise SystemExit(f"klq_kernels: KLQ_BUILD_NATIVE=1, but the CPU extension cannot be built: {reason}")
    print(f"klq_kernels: installing without the CPU extension ({str(reason).splitlines()[0]})", file=sys.stderr)


def find_torch() -> Path | None:
    """The folder of torch in this process's path, or else in the environment that its interpreter belongs to: pip's
    build isolation hides the latter from imports, not from sysconfig.
    """
    folders = [Path(folder) for folder in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
    found = (folder / "torch" for folder in folders if (folder / "torch" / "include").is_dir())
    return next(found, None)


def version_of(torch: Path) -> str:
    found = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    return found.group(1) if found else "0.0"


def extensions() -> list[Extension]:
    if MODE not in ("0", "1", "auto"):
        raise SystemExit(f"klq_kernels: KLQ_BUILD_NATIVE must be 0, 1 or auto, got {MODE!r}")
    if MODE == "0":
        return []
    torch = find_torch()
    if torch is None:
        skip("there is no torch yet; with torch installed, repeat this with --force-reinstall --no-deps")
        return []
    version = version_of(torch)
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        skip(f"torch {version} is older than 2.10")
        return []
    native = Extension(
        "klq_kernels.backends._native",
        SOURCES,
        depends=sorted(glob("csrc/*.h")),
        include_dirs=[str(torch / "include"), str(torch / "include" / "torch" / "csrc" / "api" / "include")],
        library_dirs=[str(torch / "lib")],
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


class Wheel(bdist_wheel):
    """A wheel that is for any platform where the extension could not be built: so it is built before the name is."""

    def finalize_options(self) -> None:
        if self.distribution.ext_modules:
            self.run_command("build_ext")
            if not self.get_finalized_command("build_ext").extensions:
                self.distribution.ext_modules = []
                self.py_limited_api = False
        super().finalize_options()


native = extensions()
setup(
    ext_modules=native,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
