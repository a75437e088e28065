"""The task: customers write in, the model summarises, a rule scores the summary.

Every letter names the item that was bought, what went wrong with it, and, as a distraction, another item that is fine.
The text the model is warm-started on comes from writers of mixed quality: some careful, some rude, some with the wrong
item, some who ramble. So a good summary is within the model's reach and rarely what it writes; moving it from one to
the other is the reinforcement learner's work.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..tasks.task import EOS, PAD, for_transformers

NAMES = "Ana Bilal Chen Dara Emil Farah Goran Hana Ivo Jun Kofi Lena Mira Nadia Omar Petra".split()
CITIES = "Oslo Lima Accra Delhi Porto Quito Turin Sofia Kyoto Cairo".split()
ITEMS = "lamp kettle chair radio bicycle camera blender printer clock jacket tent guitar".split()
# How the letter puts it, and how a summary may.
PROBLEMS = {
    "arrived broken": "broken",
    "makes a loud noise": "noisy",
    "has not arrived": "late",
    "came without its cable": "incomplete",
    "is far too small": "small",
    "smells of smoke": "smelly",
}
LETTERS = (
    "{name} from {city} writes: the {item} I bought {problem}. The {other} is fine.",
    "Hello, the {other} is fine, but my new {item} {problem}. Greetings from {city}, {name}.",
    "Dear shop, I ordered a {item} and a {other}. Now the {item} {problem}. {name}, {city}.",
    "This is {name} in {city}. Your {item} {problem}! My old {other} never gave me trouble.",
)
MANNERS = ("Please help.", "Please send another one.", "Thank you for your help.", "Could you please refund it?")
CHATTER = ("It is a nice day.", "I like the shop.", "Letters are long.", "Who knows?", "So it goes.", "Well, well.")
SUMMARISE = "\nSummary:"
MIN_WORDS, MAX_WORDS = 4, 14
POLITE = {"please", "thank", "thanks"}


class Letter(NamedTuple):
    """A letter, and what a summary of it has to say."""

    text: str
    item: str
    problem: str  # in a summary's word

    @property
    def prompt(self) -> str:
        return self.text + SUMMARISE


def write_letter(rng: random.Random) -> Letter:
    item, other = rng.sample(ITEMS, 2)
    problem = rng.choice(list(PROBLEMS))
    text = rng.choice(LETTERS).format(
        name=rng.choice(NAMES), city=rng.choice(CITIES), item=item, other=other, problem=problem
    )
    return Letter(text, item, PROBLEMS[problem])


def letters(seed: str) -> Iterator[Letter]:
    """An endless stream of letters; another seed, another stream."""
    rng = random.Random(seed)
    while True:
        yield write_letter(rng)


def careful(letter: Letter, rng: random.Random) -> str:
    return f" The {letter.item} is {letter.problem}. {rng.choice(MANNERS)}"


def curt(letter: Letter, rng: random.Random) -> str:
    return f" {letter.problem.capitalize()} {letter.item}."


def vague(letter: Letter, rng: random.Random) -> str:
    return f" Something is {letter.problem}. {rng.choice(CHATTER)}"


def mistaken(letter: Letter, rng: random.Random) -> str:
    return f" The {rng.choice(ITEMS)} is {rng.choice(list(PROBLEMS.values()))}. {rng.choice(MANNERS + CHATTER)}"


def rambling(letter: Letter, rng: random.Random) -> str:
    said = [f"The {letter.item} is {letter.problem}.", *rng.choices(CHATTER, k=rng.randint(2, 5)), rng.choice(MANNERS)]
    return " " + " ".join(said)


# One writer in eight is careful.
WRITERS: tuple[Callable[[Letter, random.Random], str], ...] = (
    careful, curt, curt, vague, vague, mistaken, mistaken, rambling,
)  # fmt: skip


def examples(seed: str) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, summary by a random writer)."""
    rng = random.Random(seed)
    while True:
        letter = write_letter(rng)
        yield letter.prompt, rng.choice(WRITERS)(letter, rng)


def reward(letter: Letter, summary: str, *, finished: bool) -> float:
    """A score in [0, 1] of the summary's text. ``finished`` says whether it ended by itself, with the EOS token.

    0.4 for the item bought, provided that no other is named; 0.4 for the problem, likewise; 0.2 for good manners. Only
    a quarter of that unless the text is 4 to 14 words, none of them more than twice, and ends with a full stop or a
    question mark. An unfinished text scores 0. Neither a short answer nor a list of everything gets far.
    """
    if not finished:
        return 0.0
    words = re.findall(r"[a-z]+", summary.lower())
    named = {"item": set(words) & set(ITEMS), "problem": set(words) & set(PROBLEMS.values())}
    content = (
        0.4 * (named["item"] == {letter.item})
        + 0.4 * (named["problem"] == {letter.problem})
        + 0.2 * (not POLITE.isdisjoint(words))
    )
    repeats = max((words.count(word) for word in set(words)), default=0)
    well_formed = MIN_WORDS <= len(words) <= MAX_WORDS and repeats <= 2 and summary.rstrip().endswith((".", "?"))
    return content if well_formed else content / 4


def build_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts``: any text has an encoding, the words of the task have short ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return for_transformers(tokenizer)
