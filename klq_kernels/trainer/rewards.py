"""Scores of completions, as GRPO trainers ask for them.

A reward function is any callable ``f(prompts=…, completions=…, completion_ids=…, **columns)`` that returns one number
per completion, or None for one it has no opinion on. Two other things are turned into such a callable first: a
coroutine function, all of which run concurrently, and a sequence-classification model, which reads prompt and
completion as one text. What every function says is checked and weighted in one place, so that an error names the
function at fault and never turns into a number that looks plausible.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import numbers
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .data import columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .frozen import Placed

logger = logging.getLogger(__name__)

RewardFunction: TypeAlias = (
    "Callable[..., Sequence[float | None]] | Callable[..., Awaitable[Sequence[float | None]]] | str | PreTrainedModel"
)
OF_TRAINERS = {"weights": "reward_weights", "processing_classes": "reward_processing_classes"}  # what they name them
OURS = ("prompts", "completions", "completion_ids", "trainer_state")  # keywords that a column cannot have
LARGEST = torch.finfo(torch.float32).max


class Scores(NamedTuple):
    """The rewards of B completions by F functions, on the CPU."""

    total: Tensor  # fp32 [B], the weighted sum of what was scored
    each: Tensor  # fp32 [B, F], unweighted; NaN where a function skipped the sample

    @property
    def scored(self) -> Tensor:
        """bool [B]: whether any function scored the sample. One that none scored has a total of 0 and is not learnt."""
        return ~self.each.isnan().all(1)


class Rewards:
    """Several reward functions as one."""

    def __init__(
        self,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        place: Callable[[nn.Module], Placed] | None = None,
    ) -> None:
        """
        Args:
            reward_funcs: one or more of: a callable, a coroutine function, a sequence-classification model with one
                label, or the hub id or folder of such a model.
            weights: one number per function; 1 each by default.
            processing_classes: the tokenizers of the models: one for all, or one per function with None for callables
                and for models whose own is to be loaded.
            batch_size: how many texts a model reads at once.
            device: where models are moved to.
            place: puts a model where its weights are to be, in place of ``device``.

        Raises:
            ValueError: naming the argument or the function that is wrong.
        """
        functions = as_list(reward_funcs)
        if not functions:
            raise ValueError("reward_funcs: at least one is needed, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        self.names: list[str] = unique([name_of(function) for function in functions])
        self.weights = checked_weights(weights, len(functions))
        tokenizers = per_function(processing_classes, len(functions))
        self._functions = [
            as_callable(name, function, tokenizer, batch_size, place or torch.device(device))
            for name, function, tokenizer in zip(self.names, functions, tokenizers, strict=True)
        ]
        # whether all processes must ask together, because each has a part of a model
        self.sharded = any(isinstance(f, ModelReward) and f.sharded for f in self._functions)
        self._warned = False

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
        context: Any = None,
    ) -> Scores:
        """The scores of B completions.

        Args:
            prompts: B texts or lists of chat messages.
            completions: B texts or lists of chat messages.
            completion_ids: the B completions as tokens.
            columns: the other columns of the data set, B entries each, which functions get by name.
            context: what functions with a ``trainer_state`` keyword get there.

        Raises:
            ValueError: where lengths differ, a column has a name that is taken, or a function returned anything but a
                finite number or None per completion. What a function itself raises is passed on with its name added.
        """
        keywords = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        check_columns(keywords, columns)
        if not prompts:
            return Scores(torch.zeros(0), torch.zeros(0, len(self.names)))
        answers = self._answers({**keywords, **columns}, context)
        each = [read(name, answer, len(prompts)) for name, answer in zip(self.names, answers, strict=True)]
        scores = torch.tensor(each, dtype=torch.float64).T  # [B, F]
        total = (scores.nan_to_num(0.0) * self.weights).sum(1)
        self._warn_of_skipped(scores)
        return Scores(total.float(), scores.float().contiguous())

    def _answers(self, keywords: dict[str, Any], context: Any) -> list[Any]:
        """The return value of each function, unchecked; awaitables are awaited together."""
        answers: list[Any] = []
        with ExitStack() as cleanup:
            for name, function in zip(self.names, self._functions, strict=True):
                with blame(name):
                    answers.append(function(**accepted(name, function, keywords, context)))
                if inspect.iscoroutine(answers[-1]):
                    cleanup.callback(answers[-1].close)  # does nothing to one that has run
            waiting = {i: answer for i, answer in enumerate(answers) if inspect.isawaitable(answer)}
            if waiting:
                named = [(self.names[i], answer) for i, answer in waiting.items()]
                for i, answer in zip(waiting, run(partial(gather, named)), strict=True):
                    answers[i] = answer
        return answers

    def _warn_of_skipped(self, scores: Tensor) -> None:
        skipped = scores.isnan().all(1).nonzero().flatten().tolist()
        if skipped and not self._warned:
            self._warned = True
            warnings.warn(
                f"every reward function ({', '.join(self.names)}) returned None for sample {skipped[0]} of a batch of "
                f"{len(scores)}; nothing is learnt from it. This is said once.",
                RuntimeWarning,
                stacklevel=3,
            )


def scores_of(
    rewards: Rewards, tokenizer: Any, rows: list[dict[str, Any]], completion_ids: list[list[int]], context: Any = None
) -> Scores:
    """The scores of one completion for each row of a dataset: as text, or as a chat where the prompt is one."""
    prompts = [row["prompt"] for row in rows]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    completions = [
        [{"role": "assistant", "content": text}] if not isinstance(prompt, str) else text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return rewards(
        prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns_of(rows),
        context=context,
    )  # fmt: skip


# Reading the arguments


def as_list(reward_funcs: Any) -> list[Any]:
    single = isinstance(reward_funcs, (str, nn.Module)) or not isinstance(reward_funcs, Iterable)
    return [reward_funcs] if single else list(reward_funcs)


def name_of(function: Any) -> str:
    """A function's ``__name__``; of a model the last component of its id."""
    if isinstance(function, nn.Module):
        identity = getattr(getattr(function, "config", None), "_name_or_path", "")
        function = identity or type(function).__name__
    if isinstance(function, str):
        return function.rstrip("/\\").replace("\\", "/").split("/")[-1]
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def unique(names: list[str]) -> list[str]:
    """The same names, those seen before numbered: a, b, a_2."""
    taken: list[str] = []
    for name in names:
        candidates = [name, *(f"{name}_{i}" for i in range(2, len(names) + 2))]
        taken.append(next(c for c in candidates if c not in taken and (c == name or c not in names)))
    return taken


def checked_weights(weights: Sequence[float] | None, count: int) -> Tensor:
    if weights is None:
        return torch.ones(count, dtype=torch.float64)
    if len(weights) != count:
        raise ValueError(f"weights: one per reward function, so {count}, got {len(weights)}")
    if not all(isinstance(w, numbers.Real) and math.isfinite(w) for w in weights):
        raise ValueError(f"weights: must be finite numbers, got {list(weights)}")
    return torch.tensor(list(weights), dtype=torch.float64)


def per_function(processing_classes: Any, count: int) -> list[Any]:
    if not isinstance(processing_classes, (list, tuple)):
        return [processing_classes] * count
    if len(processing_classes) != count:
        raise ValueError(
            f"processing_classes: one per reward function (None for a callable), so {count}, "
            f"got {len(processing_classes)}"
        )
    return list(processing_classes)


def as_callable(
    name: str, function: Any, tokenizer: Any, batch_size: int, place: Callable[[nn.Module], Placed] | torch.device
) -> Callable[..., Any]:
    if isinstance(function, (str, nn.Module)):
        return ModelReward(name, function, tokenizer, batch_size=batch_size, place=place)
    if not callable(function):
        raise ValueError(f"reward_funcs: {function!r} is neither a callable, nor a model, nor the id of one")
    return function


# Calling the functions


def check_columns(keywords: Mapping[str, list[Any]], columns: Mapping[str, list[Any]]) -> None:
    for name in columns:
        if name in OURS:
            raise ValueError(f"columns: {name!r} is what reward functions get from the trainer; rename that column")
    size = len(keywords["prompts"])
    for name, entries in {**keywords, **columns}.items():
        if len(entries) != size:
            raise ValueError(f"{name}: {len(entries)} entries for {size} prompts")


def accepted(name: str, function: Callable[..., Any], keywords: dict[str, Any], context: Any) -> dict[str, Any]:
    """The keywords of the call, the trainer's state among them if the function has a place for it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have none
        return keywords
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if "trainer_state" in signature.parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        keywords = {**keywords, "trainer_state": context}
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise ValueError(
            f"reward function {name}: {error}; it is called with the keywords {', '.join(keywords)}, "
            "so name those it needs and end its signature with **kwargs"
        ) from None
    return keywords


@contextmanager
def blame(name: str) -> Iterator[None]:
    """Adds the function's name to whatever is raised inside."""
    try:
        yield
    except Exception as error:
        note = f"raised by the reward function {name}"
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:  # Python 3.10
            logger.error("%s: %s", note, error)
        raise


async def gather(named: list[tuple[str, Awaitable[Any]]]) -> list[Any]:
    async def one(name: str, answer: Awaitable[Any]) -> Any:
        with blame(name):
            return await answer

    return await asyncio.gather(*(one(name, answer) for name, answer in named))


def run(main: Callable[[], Any]) -> Any:
    """``asyncio.run``, in a thread of its own where a loop already runs in this one, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, lambda: asyncio.run(main())).result()


def read(name: str, answer: Any, count: int) -> list[float]:
    """A function's answer as ``count`` numbers, NaN for None."""
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Iterable):
        raise ValueError(f"reward function {name}: must return one score per completion, got {type(answer).__name__}")
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    entries = list(answer) if isinstance(answer, Iterable) else [answer]  # a 0-d tensor is a number now
    if len(entries) != count:
        raise ValueError(f"reward function {name}: returned {len(entries)} scores for {count} completions")
    return [read_score(name, sample, entry) for sample, entry in enumerate(entries)]


def read_score(name: str, sample: int, entry: Any) -> float:
    if entry is None:
        return math.nan
    number: Any = entry.item() if getattr(entry, "shape", None) == () else entry  # scalars of torch and numpy
    is_number = isinstance(number, numbers.Real)
    if not is_number:
        raise ValueError(
            f"reward function {name}: the score of sample {sample} must be a number or None, got {entry!r}"
        )
    if not -LARGEST <= number <= LARGEST:  # nor NaN
        raise ValueError(
            f"reward function {name}: the score of sample {sample} must be finite, got {entry!r}; "
            "return None to skip a sample"
        )
    return float(number)


# Models


class ModelReward:
    """A sequence-classification model with one label as a reward function."""

    def __init__(
        self,
        name: str,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        batch_size: int,
        place: Callable[[nn.Module], Placed] | torch.device,
    ) -> None:
        self.__name__ = name
        self.batch_size = batch_size
        try:
            self.tokenizer = tokenizer or load_tokenizer(name, model)
            self.model: Any = load_model(name, model) if isinstance(model, str) else model
        except OSError as error:
            raise ValueError(f"reward function {name}: cannot load {model!r:.80}: {error}") from error
        labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        if labels != 1:
            raise ValueError(f"reward function {name}: a reward model has num_labels=1, got {labels}")
        set_padding(name, self.model, self.tokenizer)
        # Models that were spread over devices or quantised as they were loaded stay where they are.
        stays = getattr(self.model, "hf_device_map", None) or getattr(self.model, "is_quantized", False)
        self._placed = None
        if not stays:
            if isinstance(place, torch.device):
                self.model.to(place)
            else:
                self._placed = place(self.model)
        self.sharded = self._placed is not None and self._placed.placement == "sharded"

    def __call__(self, *, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """One score per pair, read where the model reads it.

        transformers' decoders read the last token that is no padding token. Where the padding token is EOS, an EOS at
        the end counts as padding, and the score is that of the token before: so it was as transformers trained them.
        """
        encoded = [self._encode(*pair) for pair in zip(prompts, completions, strict=True)]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        with nullcontext(self.model) if self._placed is None else self._placed.present() as model:
            for start in range(0, len(encoded), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                for row, score in zip(rows, self._score(model, [encoded[i] for i in rows]), strict=True):
                    scores[row] = score
        return scores

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt + completion)["input_ids"]
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"reward function {self.__name__}: prompts are chats and its tokenizer has no chat template"
            )
        text = self.tokenizer.apply_chat_template([*prompt, *reply], tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them

    @torch.no_grad()
    def _score(self, model: Any, encoded: list[list[int]]) -> list[float]:
        model.eval()
        inputs = self.tokenizer.pad({"input_ids": encoded}, padding_side="right", return_tensors="pt")
        device = next(model.parameters()).device
        ids, attention = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
        return model(input_ids=ids, attention_mask=attention).logits[:, 0].float().tolist()


def load_model(name: str, path: str) -> Any:
    """The model at ``path``; a ValueError where it has no trained score head, for that would score at random."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(path)
    architectures = getattr(config, "architectures", None) or []
    if any("SequenceClassification" in kind for kind in architectures) and config.num_labels != 1:
        raise ValueError(f"reward function {name}: a reward model has num_labels=1, got {config.num_labels}")
    model, loaded = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, output_loading_info=True)
    if loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"]))
        raise ValueError(f"reward function {name}: {path} is no trained reward model, it lacks {missing}")
    return model


def load_tokenizer(name: str, model: str | nn.Module) -> Any:
    from transformers import AutoTokenizer

    path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not path:
        raise ValueError(f"processing_classes: the model {name} does not say where its tokenizer is; pass one")
    return AutoTokenizer.from_pretrained(path)


def set_padding(name: str, model: Any, tokenizer: Any) -> None:
    """Tokenizer and model agree on the padding token, by which a decoder finds the last token of each text."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"processing_classes: the tokenizer of {name} has no pad_token and no eos_token to stand in"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
