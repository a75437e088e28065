"""The ``klq`` command: every command is declared here, in one place, and does its work elsewhere.

Commands import what they need when they are called, so that ``klq info`` does not wait for a training stack. A
ValueError, which is how this package reports bad input, is shown as one line, and so is an import that fails.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import rich  # noqa: F401  (what the commands print with; checked here so that none fails half-way)
    import typer
    import typer.core
except ImportError:
    raise SystemExit("klq needs typer and rich: pip install 'klq_kernels[cli]'") from None


class Commands(typer.core.TyperGroup):
    """The commands, with an EOFError of theirs kept from click, which would print "Aborted." and nothing else."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # a file that is cut short, or a reward function's
            raise RuntimeError(f"EOFError: {error}") from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="KL-regularised Q-learning on large-vocabulary language models.",
)


@app.command()
def info(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Versions, devices, and which backend each device uses and why not the others."""
    from . import info as report

    facts = report.environment()
    if json:
        report.print_json(facts)
    else:
        report.print_tables(facts)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the report and its pictures go.")] = Path("demo_output"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the model, its data and its samples.")] = 0,
) -> None:
    """Train a small model with the fused loss, and compare it with the naive implementation."""
    from ..lab import demo as demonstration
    from .folders import usable_folder

    usable_folder("--out", out)
    demonstration.run(out, steps, seed)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure against other implementations, side by side; runs from a source checkout (klq bench --help)."""
    checkouts = (Path(__file__).resolve().parents[2], Path.cwd())  # this package's own, or the one at hand
    root = next((folder for folder in checkouts if (folder / "bench" / "cli.py").exists()), None)
    if root is None:
        raise ValueError("bench: the benchmarks are not part of the installed package; run this in a source checkout")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    from bench.cli import app as benchmarks

    benchmarks(args=context.args, prog_name="klq bench")


@app.command()
def plan(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="A Hugging Face config: directory, file or id.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A known model in place of a config; a wrong name lists them.")
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size, where there is no config.")] = 4096,
    vocab: Annotated[int, typer.Option(min=1, help="Vocabulary size.")] = 128_256,
    layers: Annotated[int, typer.Option(min=0, help="Decoder layers.")] = 32,
    intermediate: Annotated[int, typer.Option(min=1, help="MLP size.")] = 14_336,
    kv_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Key/value heads over query heads.")] = 0.25,
    batch: Annotated[int, typer.Option(help="Sequences of a micro-batch, which tp x cp GPUs share.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence, prompt and response.")] = 2048,
    response: Annotated[int | None, typer.Option(help="Trained tokens per sequence; half of them.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    weights: Annotated[
        str | None, typer.Option(help="What weights are stored in: fp32 under autocast. By default as dtype.")
    ] = None,
    fp32_head: Annotated[bool, typer.Option("--fp32-head", help="Logits in fp32.")] = False,
    gradient: Annotated[str, typer.Option(help="Through the head: dense or sampled.")] = "dense",
    samples: Annotated[int, typer.Option(help="Entries per token of a sampled gradient.")] = 64,
    lora: Annotated[
        int, typer.Option("--lora-rank", "--lora", help="Rank of the adapters; 0 trains every parameter.")
    ] = 0,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit, sgd-momentum or sgd.")] = "adamw",
    models: Annotated[
        int | None, typer.Option(help="Models held: the policy, a reference, ...; 2, and with adapters 1.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in backward.")] = True,
    gpus: Annotated[int, typer.Option(help="All of them.")] = 1,
    shard: Annotated[
        str | None,
        typer.Option(help="none, ddp, fsdp2, zero1, zero2 or zero3. By default fsdp2 where gpus exceeds tp."),
    ] = None,
    tp: Annotated[int, typer.Option(help="GPUs that share every matrix product: tensor parallel.")] = 1,
    cp: Annotated[int, typer.Option(help="Groups of tp GPUs that share each sequence's time: context parallel.")] = 1,
    head: Annotated[
        str, typer.Option(help="Under fsdp2: gathered, or split: all ranks' tokens come to its rows.")
    ] = "gathered",
    ref_dtype: Annotated[str | None, typer.Option(help="Weights of frozen models; as those of the policy.")] = None,
    ref_placement: Annotated[
        str | None, typer.Option(help="Of frozen models: device, cpu or sharded, by default as the policy's weights.")
    ] = None,
    offload_optimizer: Annotated[
        bool, typer.Option("--offload-optimizer", help="Masters and optimiser states on the host (zero1 to zero3).")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu: decides the chunks. By default cuda, with --measure what is here.")
    ] = None,
    workspace_mib: Annotated[int | None, typer.Option(help="Memory for one chunk of logits.")] = None,
    budget_gib: Annotated[
        float | None, typer.Option(help="What fits into this much memory of a GPU? With several, 78 of an 80 GB one.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="GEMM rate to predict times from; on cuda 760 (H100).")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="Of a GPU, in GB/s; on cuda 3000 (H100).")] = None,
    node_bandwidth: Annotated[
        float | None, typer.Option(help="Of a GPU inside its node, in GB/s each way; on cuda 450 (NVLink 4).")
    ] = None,
    link_bandwidth: Annotated[
        float | None, typer.Option(help="Of a GPU to other nodes, in GB/s each way; on cuda 50 (400 Gb/s).")
    ] = None,
    host_bandwidth: Annotated[
        float | None, typer.Option(help="Between a GPU and its host, in GB/s each way; on cuda 64 (PCIe 5).")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs joined by --node-bandwidth.")] = 8,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the GEMM rate here instead.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predict memory, traffic and time of a training step on one GPU or many, with the naive and the fused loss."""
    import json as encoder

    from ..call.checks import require
    from ..call.head import check_sampling
    from .plan import options, run, shapes, table, timing
    from .plan.memory import problem

    if config is not None or preset is not None:
        shape = ("hidden", "vocab", "layers", "intermediate", "kv_share")
        given = [n for n in shape if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"]
        options_given = ", ".join("--" + n.replace("_", "-") for n in given)
        require(not given, options_given, "the --config or --preset says it already; give one or the other")
    check_sampling("gradient", gradient, "samples", samples)
    options.require_one("preset", preset, "config", config)
    model = shapes.Model(hidden, vocab, layers, intermediate, kv_share=kv_share)
    if config is not None:
        model = shapes.from_config(config)
    elif preset is not None:
        model = shapes.preset(preset)
    where = timing.device_for(device, measure)
    planned = run.Run(
        batch, length, max(length // 2, 1) if response is None else response,
        options.dtype("dtype", dtype), lora, optimizer, models, checkpointing, where,
        None if workspace_mib is None else workspace_mib * 2**20,
        options.dtype("weights", weights or dtype), fp32_head, samples if gradient == "sampled" else 0,
        gpus, shard or ("fsdp2" if gpus > tp else "none"), tp, cp, head,
        None if ref_dtype is None else options.dtype("ref_dtype", ref_dtype), ref_placement, offload_optimizer,
    )  # fmt: skip
    run.check(model, planned)
    rates = options.rates(
        timing.H100 if where.type == "cuda" else timing.Rates(), gpus_per_node, tflops=tflops,
        memory_bandwidth=memory_bandwidth, node_bandwidth=node_bandwidth, link_bandwidth=link_bandwidth,
        host_bandwidth=host_bandwidth,
    )  # fmt: skip
    if measure:
        rates = rates._replace(flop=timing.measured_gemm_rate(problem(model, planned)))
    content = table.report(model, planned, options.budget(budget_gib, planned), rates)
    if json:
        print(encoder.dumps(content, indent=1))
    else:
        table.show(content)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML: names of arguments and their values.")] = None,
) -> None:
    """Train a model by KLQ, PPO or a relative, or a guide for one, from a YAML file and flags (--help lists them)."""
    from ..trainer.processes import leave_process_group
    from .train import arguments
    from .train.run import run

    if {"-h", "--help"} & set(context.args):
        arguments.argument_parser(arguments.config_class(context.args)).print_help()
        return
    run(*arguments.parse(config, context.args))
    leave_process_group()


@app.command()
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="One of the experiments, or staleness, groups … for several, or all; a wrong name lists them."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A folder for results and pictures; the page goes beside it.")] = Path(
        "experiments"
    ),
    seeds: Annotated[int | None, typer.Option(help="Seeds per variant, in place of the experiment's own.")] = None,
    workers: Annotated[int, typer.Option(help="Jobs at a time, on one thread each.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to try it out.")] = False,
) -> None:
    """Run the paper's first experiments on built-in tasks; one that was interrupted goes on where it stopped."""
    from ..lab import experiments
    from .folders import usable_folder

    if name in (*experiments.NAMES, *experiments.GROUPS):  # no folder is made for a wrong name
        usable_folder("--out", out)
    experiments.run([name], out, seeds=seeds, workers=workers, quick=quick)


def main() -> None:
    """The entry point. Exits with 2 where the input was bad or a package is missing."""
    try:
        app()
    except (ValueError, ImportError) as error:
        print("klq:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
