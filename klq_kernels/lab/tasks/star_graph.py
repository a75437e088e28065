"""Star graphs: find the way from a source to a goal, where every step but the first can be copied.

``degree`` paths of ``length`` nodes leave one source; the goal is the end of one of them. The prompt lists all edges in
random order and names source and goal, and the answer is the path from there:

    3 7 | 9 1 | 9 3 | 1 5 / 9 5 = 9      (degree 2, length 3: edges 3-7, 9-1, 9-3, 1-5, from 9 to 5)
    1 5

A model that learns by the next token soon knows that each node is followed by its neighbour, which it looks up. That
leaves little to learn from for the first step, where the neighbour that leads to the goal has to be told from the
others: it guesses, and is right once in ``degree`` times (Bachmann and Nagarajan, arXiv 2403.06963). Q-sharp's paper
(arXiv 2502.20548, section 5) trains a guide on paths that such a model samples, right and wrong ones.

The warm start also has graphs with paths one node shorter, which the model learns to solve; of the others it still
guesses the first step.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .task import EOS, PAD, Case, Columns, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DEGREE, LENGTH, NODES = 2, 4, 12
SIGNS = ("|", "/", "=")


def draw(rng: random.Random, length: int = LENGTH) -> Case:
    """A graph on nodes with random names, and its right path."""
    names = rng.sample(range(NODES), 1 + DEGREE * (length - 1))
    source, rest = names[0], names[1:]
    paths = [[source, *rest[i::DEGREE]] for i in range(DEGREE)]
    edges = [f"{a} {b}" for path in paths for a, b in itertools.pairwise(path)]
    rng.shuffle(edges)
    path = paths[0]
    prompt = f"{' | '.join(edges)} / {source} {path[-1]} = {source}"
    return Case(prompt, {"path": " ".join(map(str, path[1:]))})


def walks_it(case: Case, rng: random.Random) -> str:
    """The right path."""
    return case.columns["path"]


def right_path(completions: list[str], path: list[str], **_: Any) -> list[float]:
    """1 for the path, and 0 for all else."""
    return [float(said.split() == right.split()) for said, right in zip(completions, path, strict=True)]


def judge(prompt: str, completion: str, columns: Columns) -> float:
    """Half for the share of steps that are edges of the graph, half for ending at the goal; by the prompt alone."""
    graph, _, question = prompt.partition(" / ")
    edges = {tuple(edge.split()) for edge in graph.split(" | ")}
    source, goal = question.split()[:2]
    walk = [source, *completion.split()]
    steps = list(itertools.pairwise(walk))
    held = sum(step in edges for step in steps) / max(len(steps), 1)
    return 0.5 * held + 0.5 * (walk[-1] == goal)


@dataclass(frozen=True)
class StarGraph(Task):
    """The task, with words as tokens and a deeper model whose embeddings are its lm_head."""

    words: tuple[str, ...] = (*map(str, range(NODES)), *SIGNS)

    def examples(self, seed: int = 0) -> Iterator[Example]:
        """Every other graph has shorter paths."""
        rng = random.Random(f"{self.name} shorter {seed}")
        for example in super().examples(seed):
            yield example
            case = draw(rng, LENGTH - 1)
            yield Example(case.prompt, case.columns["path"], case.columns)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary: Mapping[str, int] = {word: i for i, word in enumerate([PAD, EOS, *self.words])}
        tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=PAD))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            eos_token=EOS,
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
        )

    def build_model(self, seed: int = 0) -> PreTrainedModel:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=2 + len(self.words),
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return LlamaForCausalLM(config).eval()


STAR_GRAPH = StarGraph(
    name="star-graph",
    description="The way through a star graph, whose first step a next-token model can only guess",
    max_completion_length=LENGTH,  # its last is EOS
    draw=draw,
    writers=(walks_it,),
    reward_funcs=[right_path],
    judge=judge,
    warm_steps=1400,
    warm_batch=64,
)
