"""Checkpoints: the policy as ``from_pretrained`` reads it, the value function, and the state of a cycle in progress."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..call.checks import require
from . import sharding
from .config import KLQConfig
from .cycle import Cycle
from .experience import Experience, changes, conditions
from .replay import Memory
from .resuming import check_kind, check_loaded, fitting
from .running import Running

VALUE_FILE = "value_function.safetensors"


class Checkpoints(Cycle):
    """Saving and resuming, so that a resumed run repeats exactly what an uninterrupted one would have done."""

    args: KLQConfig
    experience: Experience | None  # of the cycle in progress
    micro_step: int  # within the optimizer step
    step_rows: Tensor  # trained tokens of each optimizer step of the cycle, over all processes; empty until counted

    def _set_aside(self, step: int) -> None:
        super()._set_aside(step)
        if self.completions_log is not None:
            self.completions_log.begin(step)

    def _begin(self) -> None:
        self.episodes = 0
        self.experience, self.micro_step, self.step_rows = None, 0, torch.zeros(0)
        self.running = {name: Running() for name in ("scores", "errors")}
        self.memory = Memory(self.args.replay_cycles, self.args.num_generations)
        self.ahead.drop()
        lm_head = self.language_model.lm_head if self.args.head_sharding == "tokens" else None
        sharding.shard_heads(self.accelerator, self.actor_critic.value.head, lm_head)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy, its tokenizer and the value function. All processes must call it; one writes.

        Whole weights are also written under FSDP2's SHARDED_STATE_DICT and by ZeRO-3, whatever it is told, but not at
        each checkpoint, which has the shards.
        """
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        elif sharding.zero_stage(self.accelerator) == 3 and not _internal_call:
            self._save(output_dir, state_dict=sharding.whole_state(self.actor_critic, keep=self.args.should_save))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy as ``from_pretrained`` reads it, its tokenizer, and the value function in a file beside it."""
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self.actor_critic.state_dict() if state_dict is None else state_dict
        once = {name for name, _ in self.actor_critic.named_parameters()}  # of tied weights, the first name
        again = {name for name, _ in self.actor_critic.named_parameters(remove_duplicate=False)} - once
        policy, value = (
            {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and n not in again}
            for prefix in ("policy.", "value.")
        )
        self.policy.save_pretrained(folder, state_dict=policy)
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, folder / VALUE_FILE)
        self._save_beside(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check_kind(resume_from_checkpoint, adapters=self.language_model.is_peft)
        values = Path(resume_from_checkpoint) / VALUE_FILE
        require(values.exists(), "resume_from_checkpoint", f"{resume_from_checkpoint} has no {VALUE_FILE}")
        with fitting():
            super()._load_from_checkpoint(resume_from_checkpoint, self.policy)
            self.actor_critic.value.load_state_dict(load_file(values))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_loaded(self.policy, load_result)

    def _save_progress(self, folder: str) -> None:
        """Counts and spreads, what is replayed, what is sampled ahead, the experience of a cycle that is not over."""
        running = {"episodes": self.episodes, "spreads": {name: r.state() for name, r in self.running.items()}}
        torch.save(running, self._file_of_process(folder, "running"))
        if self.args.replay_cycles:
            torch.save(self.memory.state(), self._file_of_process(folder, "memory"))
        if self.args.async_rollouts:
            self.ahead.wait()
        if (upcoming := self.ahead.state()) is not None:
            torch.save({**upcoming, "made_under": self._conditions}, self._file_of_process(folder, "ahead"))
        if self.experience is not None and self.state.global_step % self.args.steps_per_cycle:
            self.experience.save(self._file_of_process(folder, "experience"), self._conditions)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file, args = self._file_of_process(checkpoint, "running"), self.args
        cycles = math.ceil(self.state.global_step / args.steps_per_cycle)
        self.episodes = cycles * args.rollouts_per_device * self.accelerator.num_processes  # where it does not say
        if file.exists():
            running = torch.load(file, weights_only=True)
            self.episodes = running.get("episodes", self.episodes)
            for name, state in running.get("spreads", {}).items():
                self.running[name].load_state(state)
        memory = self._file_of_process(checkpoint, "memory")
        if self.args.replay_cycles and memory.exists():
            self.memory.load_state(torch.load(memory, weights_only=True))
        ahead = self._file_of_process(checkpoint, "ahead")
        if self.args.async_rollouts and ahead.exists():
            self._load_ahead(torch.load(ahead, weights_only=True))
        file = self._file_of_process(checkpoint, "experience")
        present = torch.tensor(float(file.exists()), device=self.args.device)
        # all processes fail together: one that stopped alone would leave the others waiting for it
        found, processes = int(self.accelerator.reduce(present, reduction="sum")), self.accelerator.num_processes
        if found == 0 and self.state.global_step % self.args.steps_per_cycle == 0:
            return
        require(
            found == processes,
            "resume_from_checkpoint",
            f"experience_RANK.pt is missing for {processes - found} of {processes} processes: the checkpoint was not "
            "written to its end, or by a run with other processes, epochs or mini-batches; resume that run, or from "
            "another checkpoint",
        )
        self.experience = Experience.load(file, self.args.device, self._conditions)

    def _load_ahead(self, state: dict[str, Any]) -> None:
        changed = changes(state.pop("made_under"), self._conditions)
        if changed:
            warnings.warn(
                f"resume_from_checkpoint: the completions in it that were sampled ahead were made with "
                f"{', '.join(changed)}; they are dropped, and the next cycle is sampled as it begins",
                stacklevel=2,
            )
        else:
            self.ahead.load_state(state)

    @property
    def _conditions(self) -> dict[str, Any]:
        return conditions(self.args, self.accelerator.num_processes)
