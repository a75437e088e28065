"""The parts of a task: cases to draw, writers that answer them, rewards, a judge, a tokenizer and a model to match.

Every byte is a token, so any text has an encoding and nothing has to be fitted. Train and eval cases are told apart by
a hash of the prompt: whatever is drawn belongs to one side for good, with no list of cases kept anywhere.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|endoftext|>"
EVAL_SHARE = 8  # one prompt in so many
Split: TypeAlias = Literal["train", "eval"]
Columns: TypeAlias = dict[str, Any]


class Case(NamedTuple):
    """A prompt, and what the rewards have to know about it."""

    prompt: str
    columns: Columns


class Example(NamedTuple):
    """A case, and what a writer made of it."""

    prompt: str
    completion: str
    columns: Columns


Writer: TypeAlias = Callable[[Case, random.Random], str]


@dataclass(frozen=True)
class Task:
    """A problem for a language model of a few hundred kilobytes."""

    name: str
    description: str
    max_completion_length: int  # in tokens, which are bytes, the EOS included
    draw: Callable[[random.Random], Case]
    writers: tuple[Writer, ...]  # each as likely as its share of this tuple
    reward_funcs: list[Callable[..., list[float]]]  # f(prompts=…, completions=…, **columns), as in GRPO trainers
    judge: Callable[[str, str, Columns], float]  # of prompt, completion, columns; in [0, 1], independent of the reward
    warm_steps: int
    warm_batch: int  # examples of each warm-start step
    hidden_size: int = 64

    def cases(self, split: Split, seed: int = 0) -> Iterator[Case]:
        """An endless stream of cases of that split; another seed, another stream."""
        if split not in ("train", "eval"):
            raise ValueError(f"split: must be 'train' or 'eval', got {split!r}")
        rng = random.Random(f"{self.name} {split} {seed}")
        while True:
            case = self.draw(rng)
            if split_of(case.prompt) == split:
                yield case

    def examples(self, seed: int = 0) -> Iterator[Example]:
        """An endless stream of training cases, each answered by a random writer."""
        rng = random.Random(f"{self.name} writers {seed}")
        for case in self.cases("train", seed):
            yield Example(case.prompt, rng.choice(self.writers)(case, rng), case.columns)

    def dataset(self, split: Split, size: int, seed: int = 0) -> Dataset:
        """``size`` rows with the column ``prompt`` and those the reward functions ask for.

        No prompt is both in a train and in an eval set. A prompt may repeat where a task has few.
        """
        from datasets import Dataset

        if size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        return Dataset.from_list([{"prompt": c.prompt, **c.columns} for c in islice(self.cases(split, seed), size)])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return byte_tokenizer()

    def build_model(self, seed: int = 0) -> PreTrainedModel:
        """A small causal language model with random weights that depend on the seed alone; in eval mode."""
        return small_model(self.tokenizer(), seed=seed, hidden_size=self.hidden_size)


def split_of(prompt: str) -> Split:
    return "eval" if zlib.crc32(prompt.encode()) % EVAL_SHARE == 0 else "train"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: 256 tokens for the bytes after a padding and an end-of-text token. Pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return for_transformers(tokenizer)


def for_transformers(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows ``PAD`` and ``EOS``, as transformers takes it. Pads on the left."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def small_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, hidden_size: int) -> PreTrainedModel:
    """A two-layer Llama without dropout. Leaves the global random numbers as they were."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
