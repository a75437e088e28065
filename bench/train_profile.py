"""Where a whole training step spends its time and memory: ``python -m bench.train_profile`` (``--page`` only rewrites).

``KLQTrainer`` runs real cycles on a Llama built from a config: one billion parameters on a GPU, a model scaled down to
fit a CPU otherwise, with the same vocabulary of 128,256. Each phase of a cycle is timed, and its peak memory noted over
what stood there before training (on a GPU by the allocator, on a CPU by the process's high-water mark). The same cycles
then run with the naive loss and the naive scoring pass, which hold the logits of all their tokens. Each of the two runs
in a process of its own; bench/results/train_profile.json, docs/training-profile.md and a picture are what they leave.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klq_kernels.reference import klq_residual_loss
from klq_kernels.trainer import KLQConfig, KLQTrainer, objectives
from klq_kernels.trainer import cycle as cycle_module
from klq_kernels.trainer.actor_critic import States
from klq_kernels.trainer.objectives import Scored

from . import environment
from .contenders.plain import naive_logprobs
from .environment import ROOT
from .memory import PROCESS, _settle, _status_bytes, give_back
from .report import bytes_text

RESULT = ROOT / "bench" / "results" / "train_profile.json"
PAGE = ROOT / "docs" / "training-profile.md"
PICTURE = ROOT / "docs" / "training-profile.png"
INTRODUCTION = """One cycle of `KLQTrainer` with one update epoch, medians over {cycles} cycles after a warm-up. The
model is a Llama built from a config: {millions:,.0f}M parameters, hidden size {hidden}, {layers} layers, a vocabulary
of {vocab:,}; {sequences} prompts of {prompt} tokens get completions of {completion}. Memory is the highest point of a
phase over what stood before training, so gradients and the optimizer's state count where they stand. *Naive* is the
same cycle with the logits of all its tokens, in the loss and in the scoring pass.
"""
PHASES = ("rollout", "reward", "scoring", "forward", "loss", "backward", "optimizer")
LOSSES = ("fused", "naive")
CYCLES = 3  # the first is a warm-up
VOCAB = 128_256

ONE_BILLION = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32}
SMALL = {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 8}
BATCH = {"cuda": (16, 512, 512), "cpu": (8, 64, 64)}  # sequences, prompt and completion tokens


class Recorder:
    """Seconds and peak bytes of named phases, which may nest; an inner phase does not count for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._since = 0.0
        self._base = self._standing()
        self.cycles: list[dict[str, dict[str, float]]] = []

    def begin_cycle(self) -> None:
        self.cycles.append({name: {"seconds": 0.0, "peak_bytes": 0.0} for name in PHASES})

    def settle(self) -> None:
        """Later peaks are counted over the memory held now."""
        _settle()
        self._base = self._standing()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._open.append(name)
        yield
        self._book()
        self._open.pop()

    def _book(self) -> None:
        """Ends a stretch of time: it belongs to the innermost open phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open and self.cycles:
            entry = self.cycles[-1][self._open[-1]]
            entry["seconds"] += now - self._since
            entry["peak_bytes"] = max(entry["peak_bytes"], self._peak() - self._base)
        self._reset_peak()
        self._since = time.perf_counter()

    def _standing(self) -> int:
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else _status_bytes("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _status_bytes("VmHWM")

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back()  # a free place in the heap that an inner phase has filled would count for the outer one
            (PROCESS / "clear_refs").write_text("5")


def naive_score(states: States, inputs: Any, config: Any) -> Scored:
    """The cost of scoring through the logits of all tokens, entropy included."""
    logp = F.linear(states.hidden, states.head.weight).log_softmax(-1)
    taken = logp.gather(-1, inputs.actions[:, None]).squeeze(-1)
    return Scored(taken.float(), -(logp.exp() * logp).sum(-1).float(), states.values, states.last_values)


def naive_klq(
    states: States, inputs: Any, experience: Any, denom: Tensor, config: Any, seed: int | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The loss through the logits of all tokens, and autograd."""
    old_logprobs, old_values, advantages = experience.targets
    change = naive_logprobs(states.hidden, states.head.weight, inputs.actions, None).float() - old_logprobs
    losses = klq_residual_loss(change, states.values - old_values, advantages, tau=config.tau)
    return losses.sum() / denom, {}


class Profiled(KLQTrainer):
    """A trainer whose phases are recorded."""

    recorder: Recorder

    def roll_out(self, *args: Any) -> Any:
        self.recorder.begin_cycle()
        with self.recorder.phase("rollout"):
            return super().roll_out(*args)

    def reward(self, *args: Any) -> Any:
        with self.recorder.phase("reward"):
            return super().reward(*args)

    def score(self, *args: Any) -> Any:
        with self.recorder.phase("scoring"):
            return super().score(*args)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.phase("forward"):
            return super().compute_loss(*args, **kwargs)

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        step = optimizer.step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            with self.recorder.phase("optimizer"):
                return step(*args, **kwargs)

        optimizer.step = recorded  # type: ignore[method-assign]
        return optimizer


def profile(loss: str) -> dict[str, Any]:
    """Cycles with one of the losses, in this process: medians of the counted cycles, by phase."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences, prompt, completion = BATCH[device.type]
    model = build_model(device)
    with TemporaryDirectory() as folder:
        config = KLQConfig(
            folder, per_device_train_batch_size=sequences, max_completion_length=completion, num_update_epochs=1,
            max_steps=CYCLES, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device.type == "cpu",
            bf16=device.type == "cuda", bootstrap_truncated=False, watch_failures=False,
            gradient_checkpointing=device.type == "cuda",
            generation_kwargs={"min_new_tokens": completion},
        )  # fmt: skip
        rows = [{"prompt": "x"} for _ in range(sequences)]
        run = Profiled(
            model, lambda completions, **_: [float(len(c) % 2) for c in completions], config, rows,
            processing_class=Words(prompt),  # type: ignore[arg-type]
        )  # fmt: skip
        run.recorder = recorder = Recorder(device)
        record_inner_phases(run, recorder, loss)
        recorder.settle()
        run.train()
    counted = recorder.cycles[1:]
    phases = {
        name: {key: median(cycle[name][key] for cycle in counted) for key in ("seconds", "peak_bytes")}
        for name in PHASES
    }
    shape = {
        "parameters": sum(p.numel() for p in model.parameters()), "vocab": VOCAB, "hidden": model.config.hidden_size,
        "layers": model.config.num_hidden_layers, "sequences": sequences, "prompt": prompt, "completion": completion,
    }  # fmt: skip
    return {"loss": loss, "shape": shape, "cycles": len(counted), "phases": phases}


def record_inner_phases(run: Profiled, recorder: Recorder, loss: str) -> None:
    """Puts the objective (fused or naive), backward and scoring under the recorder."""
    klq = objectives.klq if loss == "fused" else naive_klq

    def objective(*args: Any, **kwargs: Any) -> Any:
        with recorder.phase("loss"):
            return klq(*args, **kwargs)

    objectives.OBJECTIVES["klq"] = objective
    if loss == "naive":
        cycle_module.score = naive_score
    backward = run.accelerator.backward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with recorder.phase("backward"):
            return backward(*args, **kwargs)

    run.accelerator.backward = recorded


def build_model(device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = ONE_BILLION if device.type == "cuda" else SMALL
    config = LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, **sizes)
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.to(device)


class Words:
    """In place of a tokenizer, which a random model has no use for: every prompt is so many random ids."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": torch.randint(2, VOCAB, (self._length,)).tolist()}

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


def in_a_fresh_process(loss: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.train_profile", "--one", loss]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def page(content: dict[str, Any]) -> str:
    """docs/training-profile.md."""
    shape, machine = content["runs"][0]["shape"], content["environment"]
    fused, naive = (run["phases"] for run in content["runs"])
    lines = [
        "# A training step, by phase",
        "",
        f"`{machine['command']}` on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"commit "
        f"{machine['commit']}.",
        "",
        INTRODUCTION.format(**shape, millions=shape["parameters"] / 1e6, cycles=content["runs"][0]["cycles"]),
        "![Time and peak memory by phase](training-profile.png)",
        "",
        "| phase | seconds | share | peak memory | naive: seconds | naive: peak memory |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total = sum(p["seconds"] for p in fused.values())
    for name in PHASES:
        one, other = fused[name], naive[name]
        lines.append(
            f"| {name} | {one['seconds']:.2f} | {one['seconds'] / total:.0%} | {bytes_text(one['peak_bytes'])} | "
            f"{other['seconds']:.2f} | {bytes_text(other['peak_bytes'])} |"
        )
    tops = {loss: max(PHASES, key=lambda n: p[n]["peak_bytes"]) for loss, p in (("fused", fused), ("naive", naive))}
    lines += [
        f"| whole cycle | {total:.2f} | 100% | {bytes_text(fused[tops['fused']]['peak_bytes'])} | "
        f"{sum(p['seconds'] for p in naive.values()):.2f} | {bytes_text(naive[tops['naive']]['peak_bytes'])} |",
        "",
        f"With the fused loss the peak is in: {tops['fused']}. With the naive one it is in: {tops['naive']}.",
    ]
    return "\n".join(lines) + "\n"


def plot(content: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (seconds, memory) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for offset, run, colour in zip((-0.2, 0.2), content["runs"], ("#0072B2", "#999999"), strict=True):
        places = [i + offset for i in range(len(PHASES))]
        values = [run["phases"][name] for name in PHASES]
        seconds.bar(places, [v["seconds"] for v in values], 0.4, color=colour, label=run["loss"])
        memory.bar(places, [v["peak_bytes"] / 2**20 for v in values], 0.4, color=colour, label=run["loss"])
    for axes, title, unit in ((seconds, "Time", "seconds per cycle"), (memory, "Peak memory", "MiB")):
        axes.set(title=title, ylabel=unit)
        axes.set_xticks(range(len(PHASES)), PHASES, rotation=20)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    memory.legend(frameon=False)
    figure.savefig(PICTURE, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=LOSSES, help="profile one loss in this process and print JSON")
    parser.add_argument("--page", action="store_true", help="only write the page again, from the committed result")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(profile(arguments.one)))
        return
    if not arguments.page:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        runs = [in_a_fresh_process(loss) for loss in LOSSES]
        content = {"environment": environment.describe(device, "python -m bench.train_profile"), "runs": runs}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    content = json.loads(RESULT.read_text())
    PAGE.write_text(page(content))
    plot(content)
    print(page(content))


if __name__ == "__main__":
    main()
