"""What all trainers here share: a run that resumes from its last complete checkpoint, and a log of running means."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..call.checks import require
from .means import Means
from .resuming import MEANS, fitting_optimizer, last_complete_checkpoint, set_aside, step_in, take_apart
from .sharding import check_parallelism

T = TypeVar("T")


class BeforeSteps(TrainerCallback):
    """Does something before each optimizer step, on all processes."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._do()


class BaseTrainer(Trainer):
    """The part of ``KLQTrainer``, ``QSharpTrainer`` and ``DPOTrainer`` that does not depend on what they learn."""

    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require(self.args.n_gpu <= 1, "args", "DataParallel is not supported; use `accelerate launch` for several GPUs")
        check_parallelism(self.accelerator)
        self._forget_means()
        self._begins_with: str | None = None  # the checkpoint that a run goes on from
        self._took_over = True
        self.add_callback(BeforeSteps(self.take_over))

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
        self._forget_means()
        self._begin()
        if resume_from_checkpoint and (done := self._finished(str(resume_from_checkpoint))) is not None:
            return done
        self._begins_with = str(resume_from_checkpoint) if resume_from_checkpoint else None
        self._took_over = False
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def take_over(self) -> None:
        """Puts out of the way what another run, or this one before it went back, has left in ``output_dir``.

        Called before each step; the first does it, when all that the run begins with has been loaded and fits.
        """
        if self._took_over:
            return
        self._took_over = True
        step = 0 if self._begins_with is None else step_in(self._begins_with)
        if step is not None and self.args.should_save:
            self._set_aside(step)
        self.accelerator.wait_for_everyone()

    def _set_aside(self, step: int) -> None:
        """Of one process: renames the checkpoints at ``step`` or further, if this run is going to write any."""
        folder, own = Path(str(self.args.output_dir)), self._begins_with
        if self.args.save_strategy == "no":
            return
        if renamed := set_aside(folder, step, None if own is None else Path(own)):
            warnings.warn(
                f"output_dir: held checkpoints of an earlier run that are further than step {step}, where this one "
                f"begins; they are now {', '.join(renamed)} in {folder}",
                stacklevel=2,
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

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """transformers' step of a micro-batch, whose loss enters the means, which a checkpoint holds.

        A log says the sum over the micro-batches of an optimizer step. transformers' own sum begins anew in a resumed
        run, and its mean would miss the steps between the last log and the checkpoint.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        parts = self.current_gradient_accumulation_steps
        counts = not self.args.logging_nan_inf_filter or bool(loss.isfinite())
        self.means.add({"loss": loss * parts}, counts / parts)
        return loss

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: there are no labels to predict."""
        raise NotImplementedError("predict: there are no labels to predict; use evaluate, or the model's generate")

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
            take_apart(Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:  # which loads its optimizer with the model
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with fitting_optimizer(self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _file_of_process(self, folder: str, name: str) -> Path:
        return Path(folder) / f"{name}_{self.args.process_index}.pt"

    def _load_best_model(self) -> None:
        """Loads the best checkpoint, for ``load_best_model_at_end``."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_beside(self, folder: Path) -> None:
        """The tokenizer and the arguments, beside a model."""
        self.tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
