"""Checkpoints in a run's folder: which are whole, which are another run's, and whether one fits its models.

A checkpoint is complete when its state file is there, which is written last, and so are the means of a process, which
are written after the optimiser. So whoever writes a checkpoint over an older one, of another run in the same folder or
of this one before it was resumed from an earlier step, first takes away what would make the mixture of both look whole.

The last of a folder's checkpoints is the one that is furthest. So a run that begins anew, or again from an earlier
checkpoint, sets aside those that are as far as it is itself, or further, once it has loaded what it begins with: they
keep their content under a name that transformers neither counts nor uploads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..call.checks import require

MEANS = "means"
EXAMPLES = "examples.pt"  # of a guide
PROGRESS = (MEANS, "running", "memory", "ahead", "experience")  # NAME_RANK.pt, of the run in progress
# What a run writes beside the weights into a checkpoint, the state file, which says that all is there, first.
STATE_FILES = (
    TRAINER_STATE_NAME, *(f"{name}_[0-9]*.pt" for name in PROGRESS), EXAMPLES, OPTIMIZER_NAME, SCHEDULER_NAME,
    SCALER_NAME, "rng_state*.pth",
)  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"
NAMED = {False: "a whole model", True: "adapters (peft_config)"}
EARLIER = "_earlier-"  # in front of the name of what belongs to a run that is given up


def take_apart(checkpoint: Path) -> None:
    """Removes what a run wrote beside the weights."""
    for pattern in STATE_FILES:
        for file in checkpoint.glob(pattern):
            file.unlink(missing_ok=True)


def last_complete_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end and can be resumed from, or None.

    Those of ``save_only_model`` cannot: they have neither the optimiser nor the run in progress.
    """
    for folder in reversed(_checkpoints(output_dir)):
        if _state_of(folder) is not None and any(folder.glob(f"{MEANS}_[0-9]*.pt")):
            return str(folder)
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """Those of transformers, in the order of their steps."""
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(p).isdecimal()]
    return sorted(found, key=lambda p: int(step_of(p)))


def step_of(checkpoint: Path) -> str:
    """The part of the name after ``checkpoint-``, which for those of transformers is the step."""
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def step_in(checkpoint: str | Path) -> int | None:
    """The optimizer steps that a checkpoint has taken; None where it has no state file."""
    step = (_state_of(Path(checkpoint)) or {}).get("global_step")
    return None if step is None else int(step)


def _state_of(checkpoint: Path) -> dict[str, Any] | None:
    """What the state file says; None where there is none, or none that was written to its end."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def set_aside(output_dir: Path, step: int, own: Path | None = None) -> list[str]:
    """Renames the checkpoints at ``step`` or further but for a run's ``own``, and returns their new names.

    What they say of the best checkpoint names it as it is called then.
    """
    others = [f for f in _checkpoints(output_dir) if own is None or not f.samefile(own)]
    further = [f for f in others if int(step_of(f)) >= step and step_in(f) is not None]
    renamed = {folder.name: folder.rename(_unused(folder.with_name(EARLIER + folder.name))) for folder in further}
    for folder in renamed.values():
        state = _state_of(folder) or {}
        best = Path(state.get("best_model_checkpoint") or "")
        if best.name in renamed:
            state["best_model_checkpoint"] = str(renamed[best.name])
            (folder / TRAINER_STATE_NAME).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    return [folder.name for folder in renamed.values()]


def _unused(path: Path) -> Path:
    """The path, or with the first number behind its name that makes it new."""
    names = (path.with_name(f"{path.name}.{number}" if number else path.name) for number in range(1_000_000))
    return next(name for name in names if not name.exists())


@contextmanager
def fitting() -> Iterator[None]:
    """Weights that do not fit the model that they are loaded into are a ValueError about the checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error).lower():
            raise
        raise ValueError(f"resume_from_checkpoint: does not fit the model: {error}") from error


def check_kind(checkpoint: str | Path, *, adapters: bool) -> None:
    """Raises a ValueError where a checkpoint holds a model and the run trains ``adapters``, or the other way round."""
    places = [*Path(checkpoint).glob(ADAPTER_CONFIG), *Path(checkpoint).glob(f"*/{ADAPTER_CONFIG}")]
    held = NAMED[bool(places)]
    fits = not Path(checkpoint).is_dir() or held == NAMED[adapters]
    require(fits, "resume_from_checkpoint", f"{checkpoint} holds {held}, and this run trains {NAMED[adapters]}")


@contextmanager
def fitting_optimizer(optimizer: Any) -> Iterator[None]:
    """A state that does not fit the optimizer it is loaded into, or its schedule, or is another kind's, is a
    ValueError about the checkpoint. Of another kind it shows in its groups, which lack settings.
    """
    advice = (
        "resume with the optim, lr_scheduler_type, trained weights and value_learning_rate of the run that wrote it"
    )
    given = [set(group) - {"initial_lr"} for group in optimizer.param_groups]  # which is the schedule's
    try:
        yield
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"resume_from_checkpoint: its optimizer or schedule does not fit ({error}); {advice}"
        ) from error
    missing = sorted({name for old, new in zip(given, optimizer.param_groups, strict=True) for name in old - set(new)})
    message = f"its optimizer is of another kind, without {', '.join(missing)}; {advice}"
    require(not missing, "resume_from_checkpoint", message)


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
