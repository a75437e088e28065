"""The package as an installer and an importer see it."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import klq_kernels

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    """The output of this code in an interpreter of its own, started at the root of the source tree."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# DESIGN: names, order and defaults of the public functions, which outside code is written against.
REQUIRED = inspect.Parameter.empty
LAYOUT = {"mask": None, "cu_seqlens": None}
HEAD = {
    "bias": None, "temperature": 1.0, "softcap": None, "logits_dtype": None, "workspace_bytes": None,
    "process_group": None,
}  # fmt: skip
RETURNS = {"gamma": 1.0, "lam": 0.95, "bootstrap_values": None, "process_group": None, **LAYOUT}
LOSS = {"tau": 0.05, "alpha": 1.0, "loss_type": "l2", "denom": None, **LAYOUT}
SIGNATURES = {
    "linear_logprobs": ("hidden weight actions", {**HEAD, **LAYOUT, "return_entropy": False}),
    "linear_kl": (
        "hidden weight ref_hidden ref_weight",
        {
            **{name: default for name, default in HEAD.items() if name != "process_group"},
            **LAYOUT,
            "ref_bias": None,
            "ref_temperature": None,
            "ref_softcap": None,
            "direction": "forward",
        },
    ),
    "linear_select": (
        "hidden weight ids",
        {"bias": None, "atoms": None, "temperature": 1.0, "softcap": None, "mask": None},
    ),
    "reverse_scan": ("delta decay", {**LAYOUT, "process_group": None}),
    "gae": ("rewards values", RETURNS),
    "lambda_returns": ("rewards values", RETURNS),
    "klq_targets": ("logprobs ref_logprobs values rewards", {**RETURNS, "tau": 0.05, "trace": None}),
    "klq_loss": ("logprobs values targets", LOSS),
    "fused_klq_loss": (
        "hidden weight actions values",
        {**LOSS, **HEAD, **RETURNS, "targets": None, "ref_logprobs": None, "rewards": None, "trace": None},
    ),
}
FIELDS = {
    "LinearLogprobs": ("logprobs", "logsumexp", "entropy"),
    "KLQTargets": ("old_logprobs", "old_values", "advantages"),
    "KLQLoss": ("loss", "metrics"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_functions_keep_their_signature(name: str):
    positional, keywords = SIGNATURES[name]
    assert name in klq_kernels.__all__
    parameters = inspect.signature(getattr(klq_kernels, name)).parameters
    leading = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert leading == positional.split()
    for keyword, default in keywords.items():
        assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[keyword].default == default
    for threshold in ("huber_delta", "value_clip", "log_ratio_clip") if "klq_loss" in name else ():
        assert parameters[threshold].default > 0


@pytest.mark.parametrize("name", FIELDS)
def test_results_keep_their_fields(name: str):
    assert getattr(klq_kernels, name)._fields == FIELDS[name]


def test_every_public_name_exists():
    assert [name for name in klq_kernels.__all__ if not hasattr(klq_kernels, name)] == []


def test_import_brings_only_torch_and_numpy():
    heavy = {"transformers", "matplotlib", "pandas", "typer", "rich", "triton", "hypothesis", "pytest"}
    assert python(f"import klq_kernels, sys; print(sorted({heavy!r} & set(sys.modules)))") == "[]"


ON_POLICY_STEP = """
import torch
from klq_kernels import fused_klq_loss
hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
values = torch.zeros(2, 3, requires_grad=True)
actions, ref = torch.randint(17, (2, 3)), torch.full((2, 3), -3.0)
fused_klq_loss(hidden, weight, actions, values, ref_logprobs=ref, rewards=torch.ones(2)).loss.backward()
assert weight.grad.abs().sum() > 0
"""


def test_a_loss_on_the_cpu_works_without_triton():
    absent = "import os, sys\nos.environ.pop('KLQ_BACKEND', None)\nsys.modules['triton'] = None\n"
    assert python(absent + ON_POLICY_STEP + "print('done')") == "done"


def test_no_module_imports_triton_unless_a_kernel_is_used():
    """torch itself may import triton, so every import of it is traced to the module that makes it."""
    watch = """
import builtins, os, pkgutil, importlib
os.environ.pop("KLQ_BACKEND", None)
askers, real = [], builtins.__import__
def traced(name, globals=None, *rest, **named):
    scope = globals
    if name.partition(".")[0] == "triton" and scope and scope["__name__"].startswith("klq_kernels"):
        askers.append(scope["__name__"])
    return real(name, globals, *rest, **named)
builtins.__import__ = traced
import klq_kernels
for module in pkgutil.iter_modules(klq_kernels.__path__, "klq_kernels."):
    package = importlib.import_module(module.name)
    for inner in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{module.name}."):
        # _native is no Python module, and vllm_worker and vllm_requests are imported by vLLM alone
        if inner.name.rpartition(".")[2] not in ("triton", "_native", "vllm_worker", "vllm_requests"):
            importlib.import_module(inner.name)
"""
    assert python(watch + ON_POLICY_STEP + "print(askers)") == "[]"
    kernels = "try:\n    import klq_kernels.backends.triton\nexcept ImportError:\n    pass\nprint(bool(askers))"
    assert python(watch + kernels) == "True"  # so the trace sees what it looks for


def build(source: Path, code: str) -> None:
    """Runs a build without the native extension, offline and in the environment at hand."""
    environment = {**os.environ, "KLQ_BUILD_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, *code.split()], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building writes nothing into the checkout and reads nothing stale from it."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs", "demo_output")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("build") / "klq_kernels", ignore=ignore))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build(source, f"-m pip wheel -qq --no-build-isolation --no-deps --wheel-dir {out} .")
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_its_types_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.partition("/")[0] for name in names}
    assert top == {"klq_kernels", f"klq_kernels-{klq_kernels.__version__}.dist-info"}
    assert {
        "klq_kernels/py.typed",
        "klq_kernels/commands/cli.py",
        "klq_kernels/lab/experiments/configs/lambda.yaml",
    } <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "klq_kernels").rglob("*.py")}
    assert modules <= names


def test_wheel_metadata_matches_the_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        assert "klq = klq_kernels.commands.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
        assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()
    assert metadata["Version"] == klq_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) >= {"cli", "train", "bench", "test", "dev", "flash-attn"}
    core = {r.partition(">")[0].partition(";")[0] for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert core == {"torch", "triton", "numpy"}


def test_wheel_imports_and_runs_from_elsewhere(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ON_POLICY_STEP}"
    code += "import klq_kernels; print(klq_kernels.__file__)"
    assert python(code) == str(tmp_path / "klq_kernels" / "__init__.py")


def fresh_wheel(source: Path, folder: Path, *options: str, **environment: str) -> tuple[str, set[str], str]:
    """(file name, contents, output) of a wheel built from the sources as they are."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", str(folder), *options, "."]
    for rest in ("build", "klq_kernels.egg-info"):
        shutil.rmtree(source / rest, ignore_errors=True)
    done = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built.name, set(zipfile.ZipFile(built).namelist()), done.stdout + done.stderr


def has_library(names: set[str]) -> bool:
    return any(name.startswith("klq_kernels/backends/_native") and name.endswith(".so") for name in names)


HAS_COMPILER = shutil.which("g++") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler here")
def test_an_isolated_build_finds_torch_and_builds_the_extension(source: Path, tmp_path: Path):
    """``pip install .`` as the README says: without --no-build-isolation."""
    name, contents, _ = fresh_wheel(source, tmp_path, KLQ_BUILD_NATIVE="1")
    assert has_library(contents)
    assert "-cp310-abi3-linux" in name


def test_a_build_whose_compiler_fails_is_for_any_platform(source: Path, tmp_path: Path):
    name, contents, output = fresh_wheel(
        source, tmp_path, "--no-build-isolation", KLQ_BUILD_NATIVE="auto", CC="false", CXX="false"
    )
    assert name.endswith("-py3-none-any.whl")
    assert not has_library(contents)
    assert "installing without the CPU extension" in output


def test_a_build_that_needs_the_extension_fails_without_a_compiler(source: Path, tmp_path: Path):
    environment = {**os.environ, "KLQ_BUILD_NATIVE": "1", "CC": "false", "CXX": "false"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "KLQ_BUILD_NATIVE=1, but the CPU extension cannot be built" in done.stdout + done.stderr


def test_sdist_is_enough_to_build_test_and_reproduce(source: Path, tmp_path: Path):
    script = tmp_path / "sdist.py"
    script.write_text(f"from setuptools import build_meta\nbuild_meta.build_sdist({str(tmp_path)!r})\n")
    build(source, str(script))
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "Makefile",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "tests/core/test_packaging.py",
    } <= names
    left_out = [
        path.relative_to(source).as_posix()
        for folder in ("klq_kernels", "csrc", "bench", "tests")
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and path.relative_to(source).as_posix() not in names
    ]
    assert left_out == []
