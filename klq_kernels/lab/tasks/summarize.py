"""Notes that complain of a thing, and summaries that say of which and what.

    prompt       Ana: my lamp hums all night, the sofa is fine.\\n>
    completion   The lamp is noisy.

A note names the thing with the trouble, the trouble in a phrase, and a thing that is fine. A summary has a word of its
own for each trouble, so it cannot be copied. The writers the model learns from are of mixed quality: a quarter of them
get it right, others name the wrong thing, or one of the two only, or list things, or ramble. ``constant`` is the same
notes with the same reward for every summary: a policy that moves away from its reference there follows noise.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from .task import Case, Columns, Task

NAMES = "Ana Ben Cleo Dov Eva Finn Gus Hal Ida Jon".split()
THINGS = "lamp sofa bike oven desk tent coat drum".split()
# The trouble as a note puts it, and a summary's word for it.
TROUBLES = {
    "hums all night": "noisy",
    "fell to bits": "broken",
    "did not come": "late",
    "smells of fish": "smelly",
    "is soaked": "wet",
    "needs a wash": "dirty",
}
NOTES = (
    "{name}: my {thing} {trouble}, the {other} is fine.",
    "The {other} is fine, my {thing} {trouble}. {name}",
    "{name} here: my {thing} {trouble}, not the {other}.",
)
SUMMARIZE_NOTE = "\n>"
SIGHS = ("Oh dear.", "Who knew.", "So it is.", "Well well.")
LONGEST = 24  # bytes of a summary that is still brief


def draw(rng: random.Random) -> Case:
    thing, other = rng.sample(THINGS, 2)
    trouble = rng.choice(list(TROUBLES))
    note = rng.choice(NOTES).format(name=rng.choice(NAMES), thing=thing, other=other, trouble=trouble)
    return Case(note + SUMMARIZE_NOTE, {"thing": thing, "trouble": TROUBLES[trouble]})


# Writers


def careful(case: Case, rng: random.Random) -> str:
    return f"The {case.columns['thing']} is {case.columns['trouble']}."


def vague(case: Case, rng: random.Random) -> str:
    return f"It is {case.columns['trouble']}."


def dull(case: Case, rng: random.Random) -> str:
    return f"The {case.columns['thing']} is bad."


def mistaken(case: Case, rng: random.Random) -> str:
    return f"The {rng.choice(THINGS)} is {rng.choice(list(TROUBLES.values()))}."


def listing(case: Case, rng: random.Random) -> str:
    return f"{', '.join(rng.sample(THINGS, 3))}: {case.columns['trouble']}."


def rambling(case: Case, rng: random.Random) -> str:
    return f"{careful(case, rng)} {rng.choice(SIGHS)}"


# Scores


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def score(completion: str, thing: str, trouble: str) -> float:
    """0.4 for the thing, if no other is named; 0.4 for the trouble, likewise; 0.2 more for both in a full sentence.

    A text that is longer than 24 bytes, says a word twice or does not end in a full stop earns a quarter of that.
    """
    words = words_of(completion)
    about = set(words) & set(THINGS) == {thing}, set(words) & set(TROUBLES.values()) == {trouble}
    content = 0.4 * sum(about) + 0.2 * (all(about) and completion[:1].isupper())
    brief = len(completion.encode()) <= LONGEST and len(set(words)) == len(words) and completion.endswith(".")
    return content if brief else content / 4


def names_the_trouble(completions: list[str], thing: list[str], trouble: list[str], **_: Any) -> list[float]:
    """In [0, 1]; see ``score``."""
    return [score(*each) for each in zip(completions, thing, trouble, strict=True)]


def constant(completions: list[str], **_: Any) -> list[float]:
    """1 for whatever is written."""
    return [1.0] * len(completions)


def judge(prompt: str, completion: str, columns: Columns) -> float:
    """A reader's opinion from 0 to 1: would they know what to do, can they believe it, does it read well?

    Half for thing and trouble both told, wherever and however often, told of no more than one other thing. 0.3 for the
    share of words that the note or its trouble accounts for. 0.2 for the share of sentences that begin with a capital
    and end with a full stop.
    """
    words = words_of(completion)
    told = {columns["thing"], columns["trouble"]} <= set(words)
    distractions = len((set(words) & {*THINGS, *TROUBLES.values()}) - {columns["thing"], columns["trouble"]})
    grounded = {*words_of(prompt), columns["trouble"], "the", "is", "it", "a", "has"}
    believable = sum(word in grounded for word in words) / max(len(words), 1)
    sentences = re.findall(r"[^.]+\.?", completion)
    fluent = sum(bool(re.fullmatch(r"\s?[A-Z][a-z ,]+\.", s)) for s in sentences) / max(len(sentences), 1)
    return 0.5 * (told and distractions <= 1) + 0.3 * believable + 0.2 * fluent


def task(name: str, description: str, reward: Callable[..., list[float]]) -> Task:
    return Task(
        name=name,
        description=description,
        max_completion_length=32,
        draw=draw,
        writers=(careful, careful, vague, vague, dull, mistaken, listing, rambling),
        reward_funcs=[reward],
        judge=judge,
        warm_steps=300,
        warm_batch=32,
    )


SUMMARIZE = task("summarize", "Say briefly what a note complains of, rewarded by a rule", names_the_trouble)
CONSTANT = task("constant", "The notes of summarize, and reward 1 for everything: nothing is to be learnt", constant)
