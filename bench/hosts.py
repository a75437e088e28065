"""A step of TRL's GRPOTrainer with and without ``patch_trl``: python -m bench.hosts [--write]

The model is a Llama built from a config, with a vocabulary of 128,256; a step is whatever lies between two steps of the
trainer: completions, rewards, loss, gradients, optimizer. It is timed in two ways. *Completions given*: they come from
a ``rollout_func``, as from an inference engine that runs elsewhere, and are the same for all. *Completions generated*:
``model.generate`` makes them in the step. The third contender is TRL as it is on a GPU, where it drops masked positions
before the head; on a CPU it is half of what the drop-in does.

Contenders take turns step by step in one process, so that what else the machine does falls on all of them; a ratio is
that of two steps of one round. Before anything counts, each runs two steps in a process of its own: losses, entropies
and gradient norms are compared with TRL's (on given completions; in the first epoch GRPO's loss itself is about 0), and
peak memory is the growth of the resident set over what stood there before training.

--write puts the table into docs/hosts.md; the figures lie in bench/results/hosts.json. It needs TRL.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from klq_kernels.integrations.host import Patch
from klq_kernels.integrations.trl import patch_trl
from klq_kernels.lab.display import markdown_table, with_text

from . import environment, report
from .environment import ROOT
from .harness import quartiles
from .memory import PROCESS, _settle, _status_bytes
from .report import bytes_text

OUTPUT = ROOT / "bench" / "results" / "hosts.json"
PAGE = ROOT / "docs" / "hosts.md"
CONTENDERS = ("TRL", "TRL, masked positions dropped", "TRL with patch_trl()")
WAYS = ("given", "generated")
ROUNDS = 9  # after one to warm up
STEPS = 2  # of a run alone
VOCAB, PROMPT, COMPLETION, SEQUENCES = 128_256, 48, 48, 4
MODEL = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "num_attention_heads": 4}
LOGGED = {"losses": "loss", "entropies": "entropy", "grad_norms": "grad_norm"}
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/hosts.md")
    parser.add_argument("--alone", nargs=2, metavar=("WAY", "CONTENDER"), help="one run in this process, as JSON")
    parser.add_argument("--turns", metavar="WAY", help="all contenders in turns in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(*arguments.alone)))
        return
    if arguments.turns:
        print(json.dumps(in_turns(arguments.turns)))
        return
    runs = [in_a_fresh_process("--alone", way, contender) for way in WAYS for contender in CONTENDERS]
    require_same_logs(runs)
    seconds = {way: in_a_fresh_process("--turns", way) for way in WAYS}
    described = environment.describe(torch.device("cpu"), "python -m bench.hosts")
    described |= {name: environment.version_of(name) for name in ("trl", "transformers")}
    shape = {"vocab": VOCAB, "prompt": PROMPT, "completion": COMPLETION, "sequences": SEQUENCES, **MODEL}
    report.save_json(OUTPUT, {"environment": described, "shape": shape, "alone": runs, "seconds": seconds})
    if arguments.write:
        PAGE.write_text(filled(PAGE.read_text()))
    print(table())


def in_a_fresh_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.hosts", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def alone(way: str, contender: str) -> dict[str, Any]:
    """What the trainer logged in a few steps, and the peak of the memory."""
    with TemporaryDirectory() as folder:
        trainer = build_trainer(folder, way, STEPS)
        _settle()
        (PROCESS / "clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _status_bytes("VmRSS")
        with replaced(contender):
            trainer.train()
        peak = _status_bytes("VmHWM") - before
    logs = [log for log in trainer.state.log_history if "loss" in log]
    logged = {name: [log[key] for log in logs] for name, key in LOGGED.items()}
    return {"way": way, "contender": contender, "peak_bytes": peak} | logged


def in_turns(way: str) -> dict[str, list[float]]:
    """Seconds of each contender's steps, round by round; the head is looked up at each call, so patches may change."""
    from transformers import TrainerCallback

    found: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.contender = CONTENDERS[state.global_step % len(CONTENDERS)]
            self.patch = replaced(self.contender)
            self.patch.__enter__()
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found[self.contender].append(time.perf_counter() - self.since)
            self.patch.__exit__(None, None, None)

    with TemporaryDirectory() as folder:
        trainer = build_trainer(folder, way, len(CONTENDERS) * (1 + ROUNDS))
        trainer.add_callback(Turns())
        trainer.train()
    return {contender: seconds[1:] for contender, seconds in found.items()}


def replaced(contender: str) -> AbstractContextManager[Any]:
    if contender == "TRL":
        return nullcontext()
    if contender == "TRL with patch_trl()":
        return patch_trl()
    from trl.trainer import utils

    return Patch([(utils, "_use_triton", lambda device: True)])


def build_trainer(folder: str, way: str, steps: int) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, **MODEL)  # type: ignore[arg-type]
    )
    g = torch.Generator().manual_seed(1)

    def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
        completions = torch.randint(2, VOCAB, (len(prompts), COMPLETION), generator=g).tolist()
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completions, "logprobs": None}

    config = GRPOConfig(
        folder, per_device_train_batch_size=SEQUENCES, num_generations=SEQUENCES, max_steps=steps, logging_steps=1,
        max_completion_length=COMPLETION, report_to=[], use_cpu=True, bf16=False, save_strategy="no", seed=0,
        disable_tqdm=True, generation_kwargs={"min_new_tokens": COMPLETION},
    )  # fmt: skip
    return GRPOTrainer(
        model,
        lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        config,
        train_dataset=Dataset.from_dict({"prompt": ["x " * PROMPT] * SEQUENCES * steps}),
        processing_class=tokenizer,
        rollout_func=given if way == "given" else None,
    )


def require_same_logs(runs: list[dict[str, Any]]) -> None:
    """What the trainer logged on given completions is TRL's; generated ones may differ by a token."""
    first = runs[0]
    for other in runs:
        if other["way"] != "given":
            continue
        for key in LOGGED:
            scale = max(1.0, *first[key])
            if not all(abs(a - b) <= TOLERANCE * scale for a, b in zip(first[key], other[key], strict=True)):
                raise SystemExit(f"{other['contender']}: {key} {other[key]} differ from TRL's {first[key]}")


def table() -> str:
    """The committed figures, as docs/hosts.md shows them."""
    content = json.loads(OUTPUT.read_text())
    peaks = {(run["way"], run["contender"]): run["peak_bytes"] for run in content["alone"]}
    body = []
    for way in WAYS:
        for contender, seconds in content["seconds"][way].items():
            rounds = ratios(content["seconds"][way]["TRL"], seconds)
            middle, (low, high) = quartiles(rounds)
            spread = f"{middle:.2f} ({low:.2f} to {high:.2f}; {min(rounds):.2f} to {max(rounds):.2f})"
            body.append([way, contender, f"{median(seconds):.2f}", spread, bytes_text(peaks[way, contender])])
    return markdown_table(("completions", "", "seconds a step", "steps a second, of TRL's", "peak memory"), body)


def ratios(base: list[float], seconds: list[float]) -> list[float]:
    """Throughput beside the base's, round by round."""
    return [a / b for a, b in zip(base, seconds, strict=True)]


def filled(page: str) -> str:
    """The page with the table as it is now."""
    return with_text(page, "table", table())


if __name__ == "__main__":
    main()
