"""The supervised start: a policy that writes like the task's writers, good and bad, for reinforcement to pick from.

It is kept as a ``save_pretrained`` folder under a name that says what it is made of. A folder is written under another
name first and renamed when it is complete, so that one that exists is whole, and of two processes either may win.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEARNING_RATE = 4e-3
IGNORED = -100  # transformers' label of a token that is not trained on
Progress = Callable[[int, int, float], None]  # steps done, steps in all, the last one's loss


def warm_started(
    task: Task,
    seed: int = 0,
    steps: int | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The task's model after supervised steps on its writers' completions, in eval mode.

    Args:
        task: see ``load_task``.
        seed: of the weights and of the examples.
        steps: how many; the task's own number by default.
        cache: a folder that keeps warm-started models for the next call. None keeps none.
        progress: called after each step with the steps done, the steps in all and the loss; not for a kept model.

    Raises:
        ValueError: where ``steps`` is negative.
    """
    from transformers import AutoModelForCausalLM

    steps = task.warm_steps if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps: must not be negative, got {steps}")
    model, tokenizer = task.build_model(seed), task.tokenizer()
    name = f"{task.name}-seed{seed}-steps{steps}-{fingerprint(task, model)}"
    kept = None if cache is None else Path(cache) / name
    if kept is not None and kept.is_dir():
        return AutoModelForCausalLM.from_pretrained(kept, local_files_only=True).eval()
    examples = ((example.prompt, example.completion) for example in task.examples(seed))
    losses = supervise(model, tokenizer, examples, steps=steps, batch=task.warm_batch, lr=LEARNING_RATE)
    for step, loss in enumerate(losses, 1):
        if progress is not None:
            progress(step, steps, loss)
    if kept is not None:
        keep(kept, model, tokenizer)
    return model.eval()


def fingerprint(task: Task, model: PreTrainedModel) -> str:
    """Of what a warm start is made of: text, model and schedule. Another one is never taken for this one."""
    made_of = (list(islice(task.examples(0), 256)), model.config.to_json_string(), task.warm_batch, LEARNING_RATE)
    return sha256(repr(made_of).encode()).hexdigest()[:8]


def supervise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[tuple[str, str]],
    *,
    steps: int,
    batch: int,
    lr: float,
) -> Iterator[float]:
    """Steps on the completions of (prompt, completion) pairs; yields the loss of each, in nats per token."""
    stream = iter(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
    for _ in range(steps):
        loss = model(**encode(tokenizer, list(islice(stream, batch)))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Prompt + completion + EOS, int64 [B, T], completions labelled; padded on the right, so positions count from 0."""
    pairs: list[tuple[list[int], list[Any]]] = [
        (tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eos_token_id])
        for prompt, completion in examples
    ]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), width), int(tokenizer.pad_token_id))
    labels = torch.full_like(ids, IGNORED)
    attention = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        attention[row, :end] = 1
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes model and tokenizer as ``folder``, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.chmod(unfinished, 0o755)  # mkdtemp's are private
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, with the same weights
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
