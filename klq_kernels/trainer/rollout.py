"""Sampling completions: the built-in way, and the hook for an engine of one's own.

``generate`` samples from the policy itself with its KV cache. A ``RolloutFunction`` replaces it, to sample with an
engine (``engine`` makes one of vLLM) or to run a conversation with tools. It gets the prompts, the trainer and the
columns it asks for (``ask``), and returns ``Completions``.

About engines whose weights or arithmetic differ from the trainer's: their log-probabilities are not used as the old
ones. The trainer computes those itself, at the training temperature, in the pass that also scores the reference, so a
stale or quantised sampler does not make the ratios wrong. It does make the samples off-policy. Pass the sampler's own
log-probabilities along and every log shows how far off (``rollout/sampler_kl``, ``rollout/ess``), and
``off_policy="retrace"`` corrects for it (``off_policy``).

A rollout function with a method ``begin`` can also sample ahead of the trainer, in a thread (``ask_ahead``, ``ahead``).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from ..call.checks import require, require_number
from .batches import Sequence
from .data import columns_of, tokenize_prompt

ROUNDING = 1e-2  # that a sampler's log-probability of a certain token may exceed 0 by


class RolloutContext(Protocol):
    """The part of the trainer that a rollout function may read."""

    args: Any  # KLQConfig
    tokenizer: Any
    generation_config: GenerationConfig  # how the trainer itself would sample
    accelerator: Any
    state: Any  # transformers' TrainerState: ``global_step``, ``max_steps``

    @property
    def policy(self) -> Any:
        """The language model that is trained."""

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the policy for an engine."""

    @property
    def cycle(self) -> int:
        """Cycles finished so far."""

    def tokenize(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, as the trainer itself would sample from it."""

    def rescore(self, sequences: list[Sequence]) -> Any:
        """``logprobs`` (fp32 [N], packed) and more that the policy says of sequences, at the training temperature."""


@dataclass
class Completions:
    """The completions that one process sampled, in the order of the prompts, those of one prompt together.

    Tensors and arrays serve as lists, and 0 and 1 as bools.
    ``prompt_ids`` may be left out where they are the tokenized prompts. ``trained`` marks the tokens the policy chose
    itself (all, by default); ``truncated`` says which completions were cut off (by default those without EOS);
    ``logprobs`` are the sampler's own, one per completion token, of the distribution that it sampled from: they are
    compared, and with ``off_policy="retrace"`` corrected for. ``staleness`` is the age of the sampler's weights in
    cycles, a number for all completions or one for each, for the log.
    """

    completion_ids: list[list[int]]
    prompt_ids: list[list[int]] | None = None
    truncated: list[bool] | None = None
    trained: list[list[bool]] | None = None
    logprobs: list[list[float]] | None = None
    staleness: float | list[float] | None = None


RolloutFunction = Callable[..., Completions]  # of (prompts, trainer) and what else it asks for: see ``ask``


def ask(function: RolloutFunction, rows: list[dict[str, Any]], number: int, trainer: RolloutContext) -> Completions:
    """The completions of a rollout function: ``number`` for the prompt of each row, one row after another.

    It is called as ``function(prompts, trainer)``. Columns of the dataset that it names as further parameters, or all
    where it takes ``**columns``, come by keyword, a list with an entry for each prompt. Every prompt comes ``number``
    times; a function with a parameter ``num_generations`` gets each once, and returns so many completions for it.

    Raises:
        ValueError: where it returns something else, or asks for a column that the dataset lacks.
    """
    return checked(_called(function, rows, number, trainer))


def ask_ahead(
    function: Any, rows: list[dict[str, Any]], number: int, trainer: RolloutContext
) -> Callable[[], Completions]:
    """What samples the completions of ``ask`` later, and in another thread, by the policy as it is now.

    It comes from the rollout function's method ``begin``, which has the parameters of the function and does all that
    needs the trainer: it draws seeds, makes token ids, gives weights. What it returns is called without arguments.
    ``trainer.cycle`` is still the cycle that begins, and the completions are for the next one.

    Raises:
        ValueError: where ``begin`` asks for a column that the dataset lacks, or returns nothing to call; and what it
            returned, where that does not return Completions.
    """
    sample = _called(function.begin, rows, number, trainer)
    require(
        callable(sample),
        "rollout_func",
        "its method begin must return a function without arguments, which returns Completions; got "
        f"{type(sample).__name__}",
    )
    return torch.no_grad()(lambda: checked(sample()))


def check_ahead(function: Any) -> None:
    """Raises a ValueError unless a rollout function (None: the policy's own ``generate``) can sample ahead."""
    require(
        function is not None,
        "async_rollouts",
        "needs an engine with weights of its own, and the policy's own generate reads those that are being learnt; set "
        "engine='vllm', give a rollout_func with a method begin, or leave async_rollouts False",
    )
    require(
        callable(getattr(function, "begin", None)),
        "rollout_func",
        "needs a method begin(prompts, trainer) for async_rollouts, which does all that needs the trainer and returns "
        "what samples, a function without arguments that is called in another thread; or leave async_rollouts False",
    )


def checked(completions: Any) -> Completions:
    require(
        isinstance(completions, Completions),
        "rollout_func",
        f"must return Completions, got {type(completions).__name__}",
    )
    return completions


def _called(function: Any, rows: list[dict[str, Any]], number: int, trainer: RolloutContext) -> Any:
    """What a function returns that has the parameters of a rollout function."""
    parameters = list(inspect.signature(function).parameters.values())
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p.default is p.empty for p in parameters[2:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    extra: dict[str, Any] = {"num_generations": number} if "num_generations" in named else {}
    repeats = 1 if extra else number
    for name, needed in named.items():
        lacks = needed and name not in extra and name not in rows[0]
        require(not lacks, "rollout_func", f"asks for the column {name!r}; the dataset has {', '.join(rows[0])}")
    extra |= {name: column for name, column in columns_of(rows, repeats).items() if every or name in named}
    return function([row["prompt"] for row in rows for _ in range(repeats)], trainer, **extra)


@dataclass
class Rollout:
    """Checked completions: what was sampled, whether it was cut off, and what the sampler thought of it."""

    sequences: list[Sequence]
    truncated: Tensor  # bool [S]
    sampler_logprobs: Tensor | None  # fp32 [N], at the trained tokens
    staleness: Tensor | None = None  # fp32 [S], cycles

    def without(self, skipped: Tensor) -> Rollout:
        """The rollout with no trained token in the ``skipped`` sequences, bool [S]."""
        if not skipped.any():
            return self
        rows = torch.tensor([s.rows for s in self.sequences])
        kept = (~skipped).repeat_interleave(rows)
        sequences = [
            s._replace(trained=torch.zeros_like(s.trained)) if skip else s
            for s, skip in zip(self.sequences, skipped.tolist(), strict=True)
        ]
        sampled = None if self.sampler_logprobs is None else self.sampler_logprobs[kept]
        return replace(self, sequences=sequences, sampler_logprobs=sampled)


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    generation_config: GenerationConfig,
    *,
    batch_size: int,
    device: torch.device,
    processor: Callable[[Tensor], Any] | None = None,
    max_new_tokens: int | None = None,
    positions: int | None = None,
) -> Completions:
    """Samples one completion for each prompt (token ids), ``batch_size`` at a time; EOS is part of a completion.

    ``processor`` makes a ``LogitsProcessor`` for each batch, of its attention mask. ``max_new_tokens`` takes the place
    of that of ``generation_config``. ``positions`` as in ``check_room``, whose ValueError it raises.
    """
    if max_new_tokens is not None:
        generation_config = copy.copy(generation_config)
        generation_config.max_new_tokens = max_new_tokens
    for prompt in prompts:
        check_room(len(prompt), generation_config.max_new_tokens or 0, positions)
    pad, ends = generation_config.pad_token_id, eos_ids(generation_config)
    completions: list[list[int]] = []
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
        extra = {} if processor is None else {"logits_processor": LogitsProcessorList([processor(attention)])}
        with replaced_config(model, generation_config):
            out = model.generate(input_ids=ids, attention_mask=attention, generation_config=generation_config, **extra)
        completions += [until_eos(row, ends) for row in out[:, width:].tolist()]
    return Completions(completions)


def continued(
    model: Any,
    prefixes: list[list[int]],
    most: list[int],
    generation_config: GenerationConfig,
    *,
    device: torch.device,
    positions: int | None,
) -> list[list[int]]:
    """What follows each prefix, at most so many tokens as ``most`` says of it.

    A batch goes on until its longest continuation ends, also behind its longest prefix. So prefixes are divided into as
    many batches as the ``positions`` ask for, those with as much ahead of them together.
    """
    found: list[list[int]] = [[] for _ in prefixes]

    def sample(rows: list[int]) -> None:
        longest = max(most[i] for i in rows)
        if positions is not None and len(rows) > 1 and longest + max(len(prefixes[i]) for i in rows) > positions:
            sample(rows[: len(rows) // 2])
            sample(rows[len(rows) // 2 :])
            return
        out = generate(
            model, [prefixes[i] for i in rows], generation_config, batch_size=len(rows), device=device,
            max_new_tokens=longest, positions=positions,
        )  # fmt: skip
        for i, ids in zip(rows, out.completion_ids, strict=True):
            found[i] = ids[: most[i]]

    fits = positions is None or max(most) + max(map(len, prefixes)) <= positions
    sample(list(range(len(prefixes))) if fits else sorted(range(len(prefixes)), key=most.__getitem__))
    return found


@contextmanager
def replaced_config(model: nn.Module, generation_config: GenerationConfig) -> Iterator[None]:
    """Inside, ``generation_config`` is also the one that belongs to the model, and to whatever it wraps.

    What a config leaves open transformers takes from the model's own, and checkpoints come with penalties and cut-offs
    (repetition_penalty, min_p): the policy that samples would not be the one that is trained.
    """
    own: list[tuple[Any, Any]] = [(m, m.generation_config) for m in model.modules() if "generation_config" in vars(m)]
    try:
        for module, _ in own:
            module.generation_config = generation_config
        yield
    finally:
        for module, config in own:
            module.generation_config = config


def until_eos(ids: list[int], ends: set[int]) -> list[int]:
    """A generated row without what pads it: up to and with its first EOS."""
    for at, token in enumerate(ids):
        if token in ends:
            return ids[: at + 1]
    return ids


def eos_ids(generation_config: GenerationConfig) -> set[int]:
    """The token ids that end a completion; models may have several."""
    eos = generation_config.eos_token_id
    return set(eos) if isinstance(eos, (list, tuple)) else {eos}


def sampling_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, temperature: float, max_new_tokens: int, extra: dict[str, Any]
) -> GenerationConfig:
    """The settings of sampling: from the whole distribution, at the training temperature, unless ``extra`` says so.

    EOS ids are the model's where it has any (some have several), else the tokenizer's.

    Raises:
        ValueError: where there is no EOS, or ``extra`` has a temperature or a length of its own.
    """
    require(
        "temperature" not in extra,
        "generation_kwargs",
        "must not hold the temperature; set the option temperature, which the trained policy has as well",
    )
    lengths = [name for name in ("max_new_tokens", "max_length") if name in extra]
    require(
        not lengths,
        "generation_kwargs",
        f"must not hold {', '.join(lengths)}; set the option max_completion_length, which the whole run goes by",
    )
    require(
        extra.get("num_return_sequences", 1) == 1,
        "generation_kwargs",
        "num_return_sequences must be 1; set num_generations for several completions per prompt",
    )
    unknown = [name for name in extra if not hasattr(GenerationConfig(), name)]
    require(not unknown, "generation_kwargs", f"GenerationConfig has no {', '.join(unknown)}")
    own = getattr(model, "generation_config", None)
    eos = getattr(own, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    require(eos is not None, "processing_class", "needs an EOS token: without one no completion ends")
    settings: dict[str, Any] = {
        "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens,
        "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id, "use_cache": True,
    }  # fmt: skip
    return GenerationConfig(**{**settings, **extra})


def prompt_ids(
    prompt: Any, tokenizer: Any, vocab: int, *, template: Any = None, longest: int | None = None
) -> list[int]:
    """The last ``longest`` token ids of a prompt, text or chat; ``template`` as in ``tokenize_prompt``.

    Raises:
        ValueError: where the model with ``vocab`` tokens does not know one of them.
    """
    ids = tokenize_prompt(prompt, tokenizer, template)
    check_ids("processing_class", ids, vocab)
    return ids if longest is None else ids[-longest:]


def check_ids(name: str, ids: Any, vocab: int) -> None:
    """Raises a ValueError unless they are token ids, ints below ``vocab``."""
    if all(type(token) is int for token in ids) and (len(ids) == 0 or (min(ids) >= 0 and max(ids) < vocab)):
        return
    for token in ids:  # among them ints of other types, and what the message is about
        whole = isinstance(token, Integral) and not isinstance(token, bool)
        require(whole and 0 <= token < vocab, name, f"must hold ints in [0, {vocab}), the policy's ids; got {token!r}")


def check_room(prompt: int, completion: int, positions: int | None) -> None:
    """Raises a ValueError where prompt and completion have more tokens than the models have learned ``positions`` for
    (None: any number). On a GPU the lookup itself would end the process.
    """
    require(
        positions is None or prompt + completion <= positions,
        "max_prompt_length",
        f"a prompt of {prompt} tokens and a completion of {completion} are longer than the {positions} positions that "
        "the models have learned; lower max_prompt_length or max_completion_length",
    )


def in_lists(completions: Completions) -> Completions:
    """The completions with lists in place of tensors, arrays and tuples, as a field or as its entries.

    Raises:
        ValueError: naming the field that has no such entries.
    """

    def listed(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        return list(value) if isinstance(value, tuple) else value

    def plain(value: Any) -> Any:
        """A row without tensors of one element."""
        if not isinstance(value, list) or not any(hasattr(kind, "item") for kind in set(map(type, value))):
            return value
        return [x.item() if hasattr(x, "item") else x for x in value]

    found = {each.name: listed(getattr(completions, each.name)) for each in fields(completions)}
    found = {n: [plain(listed(x)) for x in value] if isinstance(value, list) else value for n, value in found.items()}
    for name, value in found.items():
        deep = name in ("completion_ids", "prompt_ids", "trained", "logprobs")
        optional = value is None and name != "completion_ids"
        fits = optional or name == "staleness" or isinstance(value, list)
        require(fits, f"rollout_func: {name}", f"must be a list with an entry for each completion, got {value!r:.80}")
        for row, entry in enumerate(value if deep and value is not None else []):
            require(isinstance(entry, list), f"rollout_func: {name}[{row}]", f"must be a list, got {entry!r:.80}")
    return Completions(**found)


def check_completions(
    completions: Completions, prompts: list[list[int]], ends: set[int], vocab: int, positions: int | None = None
) -> Rollout:
    """Completions as sequences.

    Args:
        completions: what a rollout function returned.
        prompts: token ids of the prompts it was given.
        ends: EOS ids.
        vocab: the policy's number of tokens.
        positions: as in ``check_room``.

    Raises:
        ValueError: where numbers or lengths do not fit, or an id is none of the policy's.
    """
    completions, number = in_lists(completions), len(prompts)
    ids = completions.completion_ids
    prompt_ids = prompts if completions.prompt_ids is None else completions.prompt_ids
    trained = [[True] * len(c) for c in ids] if completions.trained is None else completions.trained
    truncated = completions.truncated
    if truncated is None:
        truncated = [not c or c[-1] not in ends for c in ids]
    columns: dict[str, list[Any]] = {
        "completion_ids": ids,
        "prompt_ids": prompt_ids,
        "trained": trained,
        "truncated": truncated,
    }
    if completions.logprobs is not None:
        columns["logprobs"] = completions.logprobs
    staleness = completions.staleness
    if staleness is not None:
        columns["staleness"] = staleness if isinstance(staleness, list) else [staleness] * number
    for name, column in columns.items():
        require(len(column) == number, f"rollout_func: {name}", f"must have {number} entries, got {len(column)}")
    for name in ("trained", "logprobs"):
        for row, (entry, completion) in enumerate(zip(columns.get(name, ids), ids, strict=True)):
            require(
                len(entry) == len(completion), f"rollout_func: {name}[{row}]", f"must have {len(completion)} entries"
            )
    for name in ("trained", "truncated"):
        for row, entry in enumerate(getattr(completions, name) or []):
            fits = all(x in (True, False) for x in (entry if isinstance(entry, list) else [entry]))
            require(fits, f"rollout_func: {name}[{row}]", f"must hold bools, got {entry!r:.80}")
    require(all(prompt_ids), "rollout_func: prompt_ids", "must not be empty: a completion needs a state to start from")
    given = [("completion_ids", ids)]
    if prompt_ids is not prompts:  # those were checked as they were tokenized
        given.append(("prompt_ids", prompt_ids))
    for name, column in given:
        for row, entry in enumerate(column):
            check_ids(f"rollout_func: {name}[{row}]", entry, vocab)
    for prompt, completion in zip(prompt_ids, ids, strict=True):
        check_room(len(prompt), len(completion), positions)
    sequences = [
        Sequence(torch.tensor(p), torch.tensor(c, dtype=torch.long), torch.tensor(t, dtype=torch.bool))
        for p, c, t in zip(prompt_ids, ids, trained, strict=True)
    ]
    sampled = None
    if completions.logprobs is not None:
        chosen = [
            [x for x, kept in zip(entry, s.trained.tolist(), strict=True) if kept]
            for entry, s in zip(completions.logprobs, sequences, strict=True)
        ]
        for row, entry in enumerate(chosen):
            numbers = all(issubclass(kind, Real) for kind in set(map(type, entry)))
            require(numbers, f"rollout_func: logprobs[{row}]", f"must hold numbers, got {entry!r:.80}")
            finite = torch.tensor(entry, dtype=torch.float32).isfinite().all()
            argument = f"rollout_func: logprobs[{row}]"
            require(bool(finite), argument, "must be finite at the trained tokens")
            most = max(entry, default=0.0)
            require(most <= ROUNDING, argument, f"must be logarithms of probabilities, at most 0; got {most}")
        sampled = torch.tensor([x for entry in chosen for x in entry], dtype=torch.float32)
    ages = None
    if staleness is not None:
        for age in columns["staleness"]:
            require_number("rollout_func: staleness", age, low=0.0)
        ages = torch.tensor(columns["staleness"], dtype=torch.float32)
    return Rollout(sequences, torch.tensor(truncated, dtype=torch.bool), sampled, ages)
