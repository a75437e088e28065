"""Every kernel as the compiler makes it, without a GPU: registers, stack, shared memory, wide accesses, instructions.

    python -m bench.static_gate                    print the table
    python -m bench.static_gate --write            record it in bench/results/static_gate.json
    python -m bench.static_gate --check            compare with the record; exit 1 where anything got worse
    python -m bench.static_gate --check --spot     the same on sm_90 alone, unless a kernel or Triton has changed

Each variant of each kernel is compiled for sm_80, sm_90, sm_100 and gfx942 as the launcher would on aligned tensors.
Triton's launcher makes a constant of an integer that is 1, so ``klq_residual`` over one token is another kernel; the
scans take their counts as they are (``scans.COUNTS``). For NVIDIA the machine code is read back with the disassembler
that ships with Triton. Rules that hold whatever the record: no stack (a stack frame is a register spill), and 16-byte
accesses where bulk data moves.

The budget of the row kernels comes from bandwidth. A Hopper SM moves about 8 bf16 logits per clock from memory, issues
4 warp instructions (128 lanes) and evaluates 16 special functions. So 16 issue slots and 2 special functions per logit
keep up with memory; the inner loops have to stay below. A soft cap costs one special function and about thirteen
slots more, so those variants have 1.8 times the budget: they run at more than half of the memory rate. ``row_select``
adds up integers of 64 bits besides, for which it has another 1.75 times; ``row_kl`` has another 1.25 times, for the two
forms of each term; ``row_grad`` writes each logit as well, so that it has twice the time. A bias is another load, from
a cache, and an addition: 1.2 times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from klq_kernels.backends.triton import launch
from klq_kernels.backends.triton.klq_metrics import SLOTS

RECORD = Path(__file__).parent / "results" / "static_gate.json"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ISSUE_SLOTS_PER_LOGIT = 16.0
SPECIAL_FUNCTIONS_PER_LOGIT = 2.0
SPECIAL_SLACK = 0.25  # the rescaling of each lane, once per group of logits
STAGES = {"pairs": True, "scan": False, "alone": False}  # of a scan over tiles, and whether it summarises them
LOSS_TYPES = ("l2", "huber", "value_clipped", "ratio_clipped", "double_clipped")


class Variant(NamedTuple):
    """One specialisation of a kernel: what its arguments are, and which are absent (None) or constant."""

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    config: launch.Config
    logits_per_turn: int = 0  # logits that one turn of the loop over them handles, per thread; 0: no such loop
    loop: str = "longest"  # which one of the kernel's loops that is: the longest, the first or the last
    wide: bool = True  # whether bulk data should move 16 bytes at a time


class Report(NamedTuple):
    """Resources of a compiled kernel. Instructions are per logit and thread in the inner loop, where there is one."""

    registers: int | None
    stack: int | None
    shared: int
    wide_accesses: int
    issue_slots: float | None
    special_functions: float | None


def options(*names: str) -> Iterator[tuple[str, list[str]]]:
    """(marks of those that are there, the absent ones): each without a bias, and with one none or all of the others."""
    for there in product((False, True), repeat=len(names)):
        *others, bias = there
        if names[-1] != "bias" or not bias or len(set(others)) < 2:
            chosen = dict(zip(names, there, strict=True))
            yield "".join(f"+{n}" for n, given in chosen.items() if given), [n for n, g in chosen.items() if not g]


def variants() -> Iterator[Variant]:
    """Every kernel in each dtype, bare and with all that may be there, and with what the launcher makes constant."""
    row = {"actions": "*i64", "top": "*fp32", "log_total": "*fp32", "stride": "i32", "scale": "fp32", "softcap": "fp32"}
    stats = row | {"logp": "*fp32", "entropy": "*fp32", "vocab": "i32"}
    grad = row | dict.fromkeys(("d_action", "d_softmax", "d_entropy", "entropy"), "*fp32") | {"out_stride": "i32"}
    for dtype in ("bf16", "fp16", "fp32"):
        for marks, absent in options("softcap", "entropy", "bias"):
            marks = f"{dtype}{marks}"
            sizes = launch.ROW_STATS[4 if dtype == "fp32" else 2]
            yield Variant(
                f"row_stats[{marks}]", "row_stats", "row_stats_kernel",
                stats | {"logits": f"*{dtype}", "bias": f"*{dtype}"}, dict.fromkeys(absent), sizes,
                sizes.sizes["GROUPS"] * sizes.sizes["LANES"] // (32 * sizes.num_warps),
            )  # fmt: skip
            absent += ["d_entropy"] if "entropy" in absent else []
            yield Variant(
                f"row_grad[{marks}]", "row_grad", "row_grad_kernel",
                grad | {"logits": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}"},
                dict.fromkeys(absent) | {"NARROW": False}, launch.ROW_GRAD,
            )  # fmt: skip
            summed = launch.ROW_GRAD_SUMS
            yield Variant(
                f"row_grad_sums[{marks}]", "row_grad", "row_grad_sums_kernel",
                grad | {"logits": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}", "sums": "*fp32", "n": "i32"},
                dict.fromkeys(absent), summed, summed.sizes["BLOCK"] // (32 * summed.num_warps),
            )  # fmt: skip
            if dtype != "fp32":
                yield Variant(
                    f"row_grad[fp32 to {marks}]", "row_grad", "row_grad_kernel",
                    grad | {"logits": "*fp32", "bias": "*fp32", "out": f"*{dtype}"},
                    dict.fromkeys(absent) | {"NARROW": True}, launch.ROW_GRAD,
                )  # fmt: skip
    ref = {"ref_logits": "*fp32", "ref_top": "*fp32", "ref_log_total": "*fp32", "kl": "*fp32", "d_kl": "*fp32"}
    ref |= {"ref_stride": "i32", "out_stride": "i32", "vocab": "i32", "ref_scale": "fp32", "ref_softcap": "fp32"}
    for dtype in ("bf16", "fp16", "fp32"):
        for softcap in (False, True):
            caps = dict.fromkeys([] if softcap else ["softcap", "ref_softcap"])
            tiles = launch.ROW_KL[4 if dtype == "fp32" else 2]
            for reverse in (False, True):
                marks = dtype + ("+softcap" if softcap else "") + ("+reverse" if reverse else "")
                kinds = row | ref | {"logits": f"*{dtype}", "ref_logits": f"*{dtype}"}
                yield Variant(
                    f"row_kl[{marks}]", "row_kl", "row_kl_kernel", kinds, caps | {"REVERSE": reverse},
                    tiles, 2 * tiles.sizes["BLOCK"] // (32 * tiles.num_warps), loop="last",
                )  # fmt: skip
                yield Variant(
                    f"row_kl_grad[{marks}]", "row_kl", "row_kl_grad_kernel", kinds | {"out": f"*{dtype}"},
                    caps | {"REVERSE": reverse, "NARROW": False}, launch.ROW_KL_GRAD,
                )  # fmt: skip
                if dtype != "fp32":
                    yield Variant(
                        f"row_kl_grad[fp32 to {marks}]", "row_kl", "row_kl_grad_kernel",
                        row | ref | {"logits": "*fp32", "out": f"*{dtype}"},
                        caps | {"REVERSE": reverse, "NARROW": True}, launch.ROW_KL_GRAD,
                    )  # fmt: skip
    select = row | dict.fromkeys(("d_action", "d_softmax", "threshold", "values"), "*fp32") | {"vocab": "i32"}
    select |= {
        "sums": "*i64",
        "segments": "i32",
        "fractions": "*i32",
        "offsets": "*i64",
        "columns": "*i32",
        "counts": "*i32",
    }
    chosen = launch.ROW_SELECT.sizes
    for dtype in ("bf16", "fp16", "fp32"):
        for marks, absent in options("softcap", "bias"):
            yield Variant(
                f"row_select[{dtype}{marks}]", "row_select", "row_select_kernel",
                select | {"logits": f"*{dtype}", "bias": f"*{dtype}"}, dict.fromkeys(absent), launch.ROW_SELECT,
                chosen["GROUPS"] * chosen["SEGMENT"] // (32 * launch.ROW_SELECT.num_warps),
                loop="first",
            )  # fmt: skip
    sums = {"begins": "*i64", "ends": "*i64", "index": "*i32", "values": "*fp32", "width": "i32"}
    for source, out in (
        ("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp32", "bf16"),
        ("fp32", "fp16"),
    ):  # fmt: skip
        yield Variant(
            f"weighted_sums[{source} to {out}]", "weighted_sums", "weighted_sums_kernel",
            sums | {"source": f"*{source}", "out": f"*{out}"}, {}, launch.WEIGHTED_SUMS,
        )  # fmt: skip
    entries = {"positions": "*i64", "ids": "*i64", "bias": "*fp32", "out": "*fp32", "slopes": "*fp32"}
    entries |= dict.fromkeys(("width", "vocab", "entries", "atoms"), "i32") | {"scale": "fp32", "softcap": "fp32"}
    bare: dict[str, dict[str, Any]] = {
        "": dict.fromkeys(("positions", "bias", "softcap", "slopes")) | {"atoms": 1},
        "+full": {},
    }
    for states, rows in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32")):
        dots = launch.SELECTED_LOGITS[4 if rows == "fp32" else 2]
        for mark, absent_here in bare.items():
            yield Variant(
                f"selected_logits[{states} by {rows}{mark}]", "selected_logits", "selected_logits_kernel",
                entries | {"hidden": f"*{states}", "weight": f"*{rows}"}, absent_here, dots,
                dots.sizes["ENTRIES"] * dots.sizes["BLOCK"] // (32 * dots.num_warps),
            )  # fmt: skip
    vectors = ("logp", "values", "old_logp", "old_values", "advantages", "weights", "losses", "d_logp", "d_values")
    numbers = ("tau", "alpha", "huber_delta", "value_clip", "log_ratio_clip")
    update = dict.fromkeys(numbers, "fp32") | dict.fromkeys((*vectors[1:], "grad_scale"), "*fp32")
    for marks, without in (("", ["weights"]), ("+weights", [])):
        yield Variant(
            f"row_update[bf16{marks}]", "row_update", "row_update_kernel",
            stats | update | {"logits": "*bf16"}, dict.fromkeys(without) | {"LOSS_TYPE": "double_clipped"},
            launch.ROW_UPDATE,
        )  # fmt: skip
    residual = dict.fromkeys((*vectors, "grad_scale"), "*fp32") | dict.fromkeys(numbers, "fp32") | {"n": "i32"}
    for loss_type in LOSS_TYPES:
        for on_policy in (False, True):
            absent = ["weights", *(["old_logp", "old_values"] if on_policy else [])]
            yield Variant(
                f"klq_residual[{loss_type}{'+on_policy' if on_policy else ''}]", "klq_residual", "klq_residual_kernel",
                residual, dict.fromkeys(absent) | {"LOSS_TYPE": loss_type}, launch.KLQ_RESIDUAL, wide=False,
            )  # fmt: skip
    for mark, constant in (("", {}), ("+n=1", {"n": 1})):
        yield Variant(
            f"klq_residual[double_clipped+weights{mark}]", "klq_residual", "klq_residual_kernel",
            residual, {"LOSS_TYPE": "double_clipped", **constant}, launch.KLQ_RESIDUAL, wide=False,
        )  # fmt: skip
    for source, out, in_place in (("fp32", "bf16", False), ("fp32", "fp32", True), ("bf16", "bf16", True)):
        yield Variant(
            f"scale[{source} to {out}{'+in_place' if in_place else ''}]", "scale", "scale_kernel",
            {"source": f"*{source}", "out": f"*{out}", "scale": "*fp32", "elements": "i32"}, {"IN_PLACE": in_place},
            launch.SCALE,
        )  # fmt: skip
    columns = ("logp", "values", "old_logp", "old_values", "advantages", "ref_logp", "entropy", "decay_next")
    metrics = dict.fromkeys((*columns, "loss_sum", "out"), "*fp32") | {"n": "i32"}
    metrics |= dict.fromkeys(("tau", "alpha", "value_clip", "log_ratio_clip"), "fp32")
    slots = {name: slot for slot, name in enumerate(SLOTS)}
    for mark, absent in (("off_policy", ["decay_next"]), ("on_policy", ["old_logp", "old_values"])):
        yield Variant(
            f"klq_metrics[{mark}]", "klq_metrics", "klq_metrics_kernel", metrics, dict.fromkeys(absent) | slots,
            launch.KLQ_METRICS, wide=False,
        )  # fmt: skip
    common = {"mask": "*i1", "cu_seqlens": "*i32", "out": "*fp32", "pairs_a": "*fp32", "pairs_b": "*fp32"}
    common |= {"n": "i32", "batch": "i32"}
    errors = common | {"tail": "*fp32", "carry": "*fp32", "first_row": "i32"}
    errors |= dict.fromkeys(("tau", "gamma", "lam"), "fp32")
    lambdas = ("logp", "ref_logp", "values", "rewards", "trace")
    for dtype in ("fp32", "bf16"):
        for stage, summarise in STAGES.items():
            no_pairs = ["pairs_a", "pairs_b"] if stage == "alone" else []
            for masked in (False, True):
                marks = f"{dtype}+{stage}{'+mask' if masked else ''}"
                absent = no_pairs + ([] if masked else ["mask"])
                wide = dtype == "fp32" or not summarise  # 8 bytes are four neighbours of 16 bits (``scans``)
                yield Variant(
                    f"reverse_scan[{marks}]", "scans", "reverse_scan_kernel",
                    common | {"delta": f"*{dtype}", "decay": "*fp32"},
                    dict.fromkeys(absent) | {"ONE_DECAY": True, "SUMMARISE": summarise}, launch.SCAN,
                    wide=wide,
                )  # fmt: skip
                yield Variant(
                    f"lambda_errors[{marks}]", "scans", "lambda_errors_kernel",
                    errors | dict.fromkeys(lambdas, f"*{dtype}"),
                    dict.fromkeys([*absent, "rewards", "trace"]) | {"SUMMARISE": summarise}, launch.SCAN,
                    wide=wide,
                )  # fmt: skip
    for dtype, stage in [("bf16", "scan"), ("fp16", "scan"), *(("fp32", stage) for stage in STAGES)]:
        marks = f"{dtype}+{stage}+full"
        fixed: dict[str, Any] = dict.fromkeys(["pairs_a", "pairs_b"] if stage == "alone" else [])
        fixed |= {"SUMMARISE": STAGES[stage]}
        yield Variant(
            f"reverse_scan[{marks}]", "scans", "reverse_scan_kernel",
            common | {"delta": f"*{dtype}", "decay": f"*{dtype}"}, fixed | {"ONE_DECAY": False}, launch.SCAN,
        )  # fmt: skip
        yield Variant(
            f"lambda_errors[{marks}]", "scans", "lambda_errors_kernel", errors | dict.fromkeys(lambdas, f"*{dtype}"),
            fixed, launch.SCAN,
        )  # fmt: skip


# Bytes of stack that another version of Triton than the recorded one may need: a pair of registers.
SPILL_OF_OTHERS = 8
MULTIPLES = ("stride", "ref_stride", "out_stride", "elements", "width")


def compile_for(variant: Variant, target: GPUTarget) -> Any:
    """The compiled kernel. Pointers, row strides, widths and the elements of a weight are taken as multiples of 16."""
    kernel = getattr(import_module(f"klq_kernels.backends.triton.{variant.module}"), variant.kernel)
    constants = variant.constants | variant.config.sizes
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else variant.types[name] for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in MULTIPLES]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options=variant.config.options)


def inspect(variant: Variant, target: GPUTarget) -> Report:
    """Compiles a variant for a target and reads the result back."""
    compiled = compile_for(variant, target)
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        wide = len(re.findall(r"(?:global|buffer)_(?:load|store)_(?:dwordx4|b128)", code))
        registers = re.search(r"\.vgpr_count:\s+(\d+)", code)
        spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", code)
        counts = [int(m.group(1)) if m else None for m in (registers, spills)]
        return Report(counts[0], counts[1], shared, wide, None, None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {variant.name}")
    wide = len(re.findall(r"\b(?:LDG|STG)\.E[.\w]*\.128", code))
    found_loops = loops(code) if variant.logits_per_turn else []
    by_length = sorted(found_loops, key=len)
    picked = {"longest": by_length[-1:], "first": found_loops[:1], "last": found_loops[-1:]}[variant.loop]
    loop = picked[0] if picked else []
    per_logit = 1 / variant.logits_per_turn if loop else 0.0
    special = sum("MUFU" in line for line in loop)
    return Report(
        int(found.group(1)),
        int(found.group(2)),
        shared,
        wide,
        round(len(loop) * per_logit, 2) if loop else None,
        round(special * per_logit, 3) if loop else None,
    )


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop, the body of a backward branch, in the order in which they end."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(instructions)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if found:
            instructions.append(found.group(1))
    bodies: list[list[str]] = []
    for at, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        if branch and labels.get(branch.group(1), at) < at:
            bodies.append(instructions[labels[branch.group(1)] : at + 1])
    return bodies


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def recorded_compiler() -> bool:
    """Whether this is the minor version of Triton that the record was made with."""
    if not RECORD.exists():
        return True
    recorded: str = json.loads(RECORD.read_text())["triton"]
    return recorded.split(".")[:2] == triton.__version__.split(".")[:2]


def sources() -> str:
    """A digest of what the record depends on beside the compiler: the kernels, and this file."""
    files = [*sorted(Path(launch.__file__).parent.glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def is_current(record: dict[str, Any]) -> bool:
    """Whether the record was made from these sources by this compiler, which gives the same code again."""
    return bool(record.get("sources") == sources() and record["triton"] == triton.__version__)


def broken_rules(variant: Variant, target: str, report: Report) -> list[str]:
    """The rules that hold whatever is on record."""
    out = []
    if (report.stack or 0) > SPILL_OF_OTHERS * (not recorded_compiler()):
        out.append(f"uses {report.stack} bytes of stack")
    if variant.wide and report.wide_accesses == 0 and target.startswith("sm_"):
        out.append("has no 16-byte access")
    allowance = 1.8 if "softcap" in variant.name else 1.0
    slots = (
        allowance
        * (1.2 if "bias" in variant.name else 1.0)
        * {"row_select": 1.75, "row_kl": 1.25, "row_grad": 2.0}.get(variant.module, 1.0)
    )
    if (report.issue_slots or 0) > slots * ISSUE_SLOTS_PER_LOGIT:
        out.append(f"issues {report.issue_slots} instructions per logit")
    if (report.special_functions or 0) > allowance * SPECIAL_FUNCTIONS_PER_LOGIT + SPECIAL_SLACK:
        out.append(f"needs {report.special_functions} special functions per logit")
    return [f"{variant.name} on {target} {what}" for what in out]


def regressions(name: str, report: Report, recorded: dict[str, Any] | None) -> list[str]:
    """The fields that got worse against the record, beyond the small changes that another compiler version may make."""
    if recorded is None:
        return [f"{name} is not in the record; run python -m bench.static_gate --write"]
    out = []
    for field, slack in (
        ("registers", 8),
        ("stack", 0),
        ("shared", 0),
        ("issue_slots", 0.5),
        ("special_functions", 0.05),
    ):
        now, then = getattr(report, field), recorded[field]
        if now is not None and then is not None and now > then + slack:
            out.append(f"{name}: {field} rose from {then} to {now}")
    if report.wide_accesses < recorded["wide_accesses"]:
        out.append(f"{name}: 16-byte accesses fell from {recorded['wide_accesses']} to {report.wide_accesses}")
    return out


def _work(job: tuple[int, str]) -> Report:
    return inspect(list(variants())[job[0]], TARGETS[job[1]])


def measure(targets: list[str]) -> tuple[dict[str, dict[str, Report]], list[str]]:
    """(reports by target and variant, broken rules), compiling on all cores."""
    every = list(variants())
    jobs = [(i, target) for target in targets for i in range(len(every))]
    reports: dict[str, dict[str, Report]] = {target: {} for target in targets}
    complaints: list[str] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for done, ((i, target), report) in enumerate(zip(jobs, pool.map(_work, jobs, chunksize=4), strict=True), 1):
            if sys.stderr.isatty():
                print(f"\r{done}/{len(jobs)} kernels", end="", file=sys.stderr)
            reports[target][every[i].name] = report
            complaints += broken_rules(every[i], target, report)
    return reports, complaints


def show(reports: dict[str, dict[str, Report]]) -> None:
    header = ("kernel", *Report._fields)
    for target, rows in reports.items():
        print(f"\n{target}\n{header[0]:44}" + "".join(f"{name:>18}" for name in header[1:]))
        for name, report in rows.items():
            print(f"{name:44}" + "".join(f"{'-' if cell is None else cell:>18}" for cell in report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the table")
    parser.add_argument("--check", action="store_true", help="compare with the recorded table")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--spot", action="store_true", help="sm_90 alone, if the record is of these sources")
    arguments = parser.parse_args()
    if arguments.spot and is_current(json.loads(RECORD.read_text())):
        arguments.targets = ["sm_90"]
    reports, complaints = measure(arguments.targets)
    if not arguments.check:
        show(reports)
    if arguments.write:
        table = {t: {name: r._asdict() for name, r in rows.items()} for t, rows in reports.items()}
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        record = {"triton": triton.__version__, "sources": sources(), "targets": table}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.check:
        record = json.loads(RECORD.read_text())
        same_compiler = recorded_compiler()
        if not same_compiler:
            print(f"the record is of triton {record['triton']}, this is {triton.__version__}: fixed rules only")
        for target, rows in reports.items() if same_compiler else ():
            for name, report in rows.items():
                complaints += regressions(f"{name} on {target}", report, record["targets"][target].get(name))
    for complaint in complaints:
        print(complaint)
    print(f"{sum(map(len, reports.values()))} kernels compiled, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
