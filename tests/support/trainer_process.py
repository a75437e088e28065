"""Runs in a process of their own, for the tests that kill it or start two: python trainer_process.py JSON.

JSON is a list of runs, each with ``folder``, ``config`` (changes of the tiny config), ``kill_at`` (the micro-batch at
which the process kills itself, as a machine that goes down would), ``use_script`` (completions that depend on the
prompt alone, so that any number of processes sees the same), ``resume`` (a checkpoint to go on from) and ``lacks`` (a
file the checkpoint has lost: what each process says of it is left in refused_RANK.txt), ``kind`` (of ``KINDS``: what is
trained), ``sharded_as_loaded`` (ZeRO-3 of the run before shards the models as they are made). With a word after the
JSON, an engine that wants accelerators is told that the processes have some.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import tiny
import torch
from gloo_launch import pose_as_accelerators
from peft import LoraConfig
from safetensors.torch import save_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from klq_kernels import fused_klq_loss
from klq_kernels.trainer import Completions, KLQTrainer, objectives
from klq_kernels.trainer.processes import leave_process_group


class Killed(KLQTrainer):
    """Dies in the middle of an update."""

    kill_at: int | None = None
    _seen = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self._seen += 1
        if self._seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "tied": lambda: {"model": tiny.model(tie_word_embeddings=True)},
    "lora": lambda: {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")},
    "models": lambda: {"value_model": tiny.classifier(1), "reward_funcs": [tiny.even, tiny.classifier(2)]},
}


def scripted(prompts: list[str], trainer: KLQTrainer) -> Completions:
    ids = [[2 + (ord(p[0]) * 7 + 3 * i + len(p)) % 250 for i in range(1 + len(p) % 6)] + [tiny.EOS] for p in prompts]
    return Completions(ids)


def run(
    folder: Path,
    config: dict[str, Any],
    *,
    kill_at: int | None = None,
    use_script: bool = False,
    resume: str | None = None,
    lacks: str | None = None,
    kind: str = "plain",
    sharded_as_loaded: bool = False,
) -> None:
    """Trains, saves the model to ``folder``/final and the log to history.json."""
    torch.set_num_threads(1)
    if not sharded_as_loaded:
        unset_hf_deepspeed_config()
    tokenizer = tiny.tokenizer()
    given: dict[str, Any] = {"model": tiny.model(), "reward_funcs": tiny.even, **KINDS[kind]()}
    trainer = Killed(
        **given, args=tiny.arguments(folder, **config), train_dataset=tiny.prompts(), processing_class=tokenizer,
        rollout_func=scripted if use_script else None, reward_processing_classes=tokenizer,
    )  # fmt: skip
    trainer.kill_at = kill_at
    heads = set()  # the kinds of weight that the loss has read

    def watched(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        heads.add("sharded" if hasattr(weight, "placements") else "whole")
        return fused_klq_loss(hidden, weight, *args, **kwargs)

    objectives.fused_klq_loss = watched
    if lacks is not None:
        (Path(str(resume)) / lacks).unlink(missing_ok=True)
        try:
            trainer.train(resume_from_checkpoint=resume)
        except ValueError as error:
            (folder / f"refused_{trainer.args.process_index}.txt").write_text(str(error))
        return
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    exported = {name: weight.clone() for name, weight in trainer.policy_weights()}
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
        modules: dict[str, Any] = {"policy": trainer.actor_critic}
        if trainer.reference is not None:
            modules["reference"] = trainer.reference.module
        save_file(exported, folder / "exported.safetensors")
        assert trainer.experience is not None
        kept = trainer.experience.ref_logprobs
        (folder / "heads.json").write_text(json.dumps(sorted(heads)))
        (folder / "rounded.json").write_text(json.dumps(torch.equal(kept, kept.bfloat16().float())))
        (folder / "shares.json").write_text(json.dumps({name: share(module) for name, module in modules.items()}))


def share(module: torch.nn.Module) -> float:
    """The part of a module's weights that this process holds."""
    parts = [getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)) for p in module.parameters()]
    whole = [p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters()]
    return sum(part.numel() for part in parts) / sum(whole)


def native_threads() -> list[str]:
    """The names of this process's threads, where the system has them."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it ended in between
            names.append(path.read_text())
    return names


if __name__ == "__main__":
    if len(sys.argv) > 2:
        pose_as_accelerators()
    for told in json.loads(sys.argv[1]):
        run(Path(told.pop("folder")), told.pop("config"), **told)
    leave_process_group()
    if "deepspeed" in sys.modules:
        sys.exit()  # it has references to the group of its own
    for _ in range(100):  # a thread that has ended may be listed for a moment
        if not any("gloo" in name for name in native_threads()):
            break
        time.sleep(0.05)
    else:
        raise AssertionError(native_threads())
