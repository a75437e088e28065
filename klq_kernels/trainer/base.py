"""What all trainers here share: a run that resumes from its last complete checkpoint, and a log of running means.

A checkpoint is complete when its state file is there, which is written last, and so are the means of a process, which
are written after the optimiser. So whoever writes a checkpoint over an older one, of another run in the same folder or
of this one before it was resumed from an earlier step, first takes away what would make the mixture of both look whole.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..call.checks import require
from .means import Means
from .sharding import check_parallelism

T = TypeVar("T")

MEANS = "means"
EXAMPLES = "examples.pt"  # of a guide
PROGRESS = (MEANS, "running", "memory", "ahead", "experience")  # NAME_RANK.pt, of the run in progress
# What a run writes beside the weights into a checkpoint, the state file, which says that all is there, first.
STATE_FILES = (
    TRAINER_STATE_NAME, *(f"{name}_[0-9]*.pt" for name in PROGRESS), EXAMPLES, OPTIMIZER_NAME, SCHEDULER_NAME,
    SCALER_NAME, "rng_state*.pth",
)  # fmt: skip


class BaseTrainer(Trainer):
    """The part of ``KLQTrainer``, ``QSharpTrainer`` and ``DPOTrainer`` that does not depend on what they learn."""

    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require(self.args.n_gpu <= 1, "args", "DataParallel is not supported; use `accelerate launch` for several GPUs")
        check_parallelism(self.accelerator)
        self._forget_means()

    def _forget_means(self) -> None:
        self.means = Means()
        self.seconds: dict[str, float] = {}  # that each part of a run has taken since the last log

    # ---- a run --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. ``True`` resumes from the last *complete* checkpoint in ``output_dir``. A run that has
        taken ``max_steps`` already is loaded as it is, and takes no step.
        """
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_complete_checkpoint(Path(folder))
            require(resume_from_checkpoint is not None, "resume_from_checkpoint", f"none is complete in {folder}")
        if not resume_from_checkpoint:
            self._warn_of_checkpoints()
        self._forget_means()
        self._begin()
        if resume_from_checkpoint and (done := self._finished(str(resume_from_checkpoint))) is not None:
            return done
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _warn_of_checkpoints(self) -> None:
        """A run that begins beside another one's checkpoints could later be resumed from those, which are further."""
        newest = last_complete_checkpoint(Path(str(self.args.output_dir)))
        if newest is not None and self.accelerator.is_main_process:
            warnings.warn(
                f"output_dir: holds checkpoints of an earlier run, as {newest}, and this one begins anew; "
                "resume_from_checkpoint=True would go on from whichever is further. Give this run another folder, or "
                "resume the earlier one",
                stacklevel=3,
            )

    def _finished(self, checkpoint: str) -> TrainOutput | None:
        """Loads a checkpoint that is at ``max_steps``, or past it; None of one that has steps left.

        transformers' loop would take one more step before it looks.
        """
        file = Path(checkpoint) / TRAINER_STATE_NAME
        state = TrainerState.load_from_json(str(file)) if file.exists() else None
        if state is None or not 0 < self.args.max_steps <= state.global_step:
            return None
        done = f"{checkpoint} has taken {state.global_step} steps, and max_steps is {self.args.max_steps}"
        # an engine that shards weights loads them inside of transformers' loop
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        require(not sharded, "resume_from_checkpoint", f"{done}: nothing is left to train")
        warnings.warn(f"{done}: it is loaded, and nothing is trained", stacklevel=3)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(checkpoint)
        return TrainOutput(state.global_step, 0.0, {})

    def _begin(self) -> None:
        """Forgets what else belongs to another run."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # compute_loss puts on the device what belongs there

    def _evaluate_each(self, data: dict[str, Any], ignore_keys: list[str] | None, prefix: str) -> dict[str, float]:
        """``evaluate`` of several datasets, their names behind the prefix."""
        parts = (self.evaluate(d, ignore_keys, f"{prefix}_{name}") for name, d in data.items())
        return {name: value for part in parts for name, value in part.items()}

    # ---- what is logged -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to what transformers logs of training the means since the last log, the seconds, and ``_counts``."""
        if self.is_in_train and "loss" in logs:
            logs = {**logs, **self.means.drain(self.accelerator), **self.seconds, **self._counts()}
            self.seconds.clear()
        super().log(logs, start_time)

    def _counts(self) -> dict[str, float]:
        """How far the run is, in units of its own."""
        return {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Adds the seconds a part of the run takes to the log (on a GPU, of the host's waiting)."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def _bar(self, work: Sequence[T], what: str) -> Iterable[T]:
        """``work`` under a progress bar of the main process."""
        quiet = self.args.disable_tqdm or not self.accelerator.is_main_process
        return tqdm(work, desc=what, disable=quiet, leave=False)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            _take_apart(Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state, what the next log will say, and what else belongs to the run in progress."""
        super()._save_rng_state(output_dir)
        self._save_progress(output_dir)
        torch.save(self.means.state(), self._file_of_process(output_dir, MEANS))
        self.accelerator.wait_for_everyone()  # the state file, which says that all is there, is written next

    def _save_progress(self, folder: str) -> None:
        """Writes what a trainer's own ``_load_rng_state`` reads."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (means := self._file_of_process(checkpoint, MEANS)).exists():
            self.means.load_state(torch.load(means, weights_only=True))

    def _file_of_process(self, folder: str, name: str) -> Path:
        return Path(folder) / f"{name}_{self.args.process_index}.pt"

    def _load_best_model(self) -> None:
        """Loads the best checkpoint, for ``load_best_model_at_end``."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_beside(self, folder: Path) -> None:
        """The tokenizer and the arguments, beside a model."""
        self.tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")


@contextmanager
def fitting() -> Iterator[None]:
    """Weights that do not fit the model that they are loaded into are a ValueError about the checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error).lower():
            raise
        raise ValueError(f"resume_from_checkpoint: does not fit the model: {error}") from error


def check_loaded(model: nn.Module, load_result: Any) -> None:
    """Refuses the weights of another architecture, where transformers warns.

    Tied weights are stored by one of their names; so a parameter is missing where all of its names are.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(p) for name, p in named.items() if name not in load_result.missing_keys}
    missing = [n for n in load_result.missing_keys if n not in named or id(named[n]) not in stored]
    for names, problem in ((missing, "it lacks"), (load_result.unexpected_keys, "the model lacks")):
        found = f"does not fit the model: {problem} {len(names)} weights, {', '.join(names[:3])}"
        require(not names, "resume_from_checkpoint", f"{found}{' …' * (len(names) > 3)}")


def _take_apart(checkpoint: Path) -> None:
    """Removes what a run wrote beside the weights."""
    for pattern in STATE_FILES:
        for file in checkpoint.glob(pattern):
            file.unlink(missing_ok=True)


def last_complete_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end and can be resumed from, or None.

    Those of ``save_only_model`` cannot: they have neither the optimiser nor the run in progress.
    """
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(p).isdecimal()]
    for folder in sorted(found, key=lambda p: int(step_of(p)), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            continue
        if any(folder.glob(f"{MEANS}_[0-9]*.pt")):
            return str(folder)
    return None


def step_of(checkpoint: Path) -> str:
    """The part of the name after ``checkpoint-``, which for those of transformers is the step."""
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
