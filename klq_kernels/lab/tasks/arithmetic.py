"""Sums and differences of three small numbers, worked in two steps and checked by their result.

    prompt       7+5-9=
    completion   12-9=3

The first step copies what is left to do, the second finishes it. The writers know how, but some slip in a step and
some guess, so that the policy that imitates them is right about half the time, and no more than it can improve on. The
reward sees the result alone; the judge looks at the work.
"""

from __future__ import annotations

import random
import re
from typing import Any

from .task import Case, Columns, Task

RIGHT, WORKED = 1.0, 0.2  # the reward of a right result, and of a wrong one after a right first step
STEP = re.compile(r"(\d+)([+-])(\d+)")


def draw(rng: random.Random) -> Case:
    """Three numbers from 1 to 9; neither the first step nor the result is negative."""
    while True:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        first, second = rng.choice("+-"), rng.choice("+-")
        between = step(a, first, b)
        answer = step(between, second, c)
        if between >= 0 and answer >= 0:
            return Case(f"{a}{first}{b}{second}{c}=", {"rest": f"{between}{second}{c}", "answer": answer})


def step(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right


def value(rest: str) -> int:
    left, sign, right = STEP.fullmatch(rest).groups()  # type: ignore[union-attr]
    return step(int(left), sign, int(right))


def slipped(number: int, rng: random.Random) -> int:
    """The number, a little off, and not negative."""
    return rng.choice([n for n in (number - 2, number - 1, number + 1, number + 2) if n >= 0])


# Writers


def careful(case: Case, rng: random.Random) -> str:
    return f"{case.columns['rest']}={case.columns['answer']}"


def slips_at_first(case: Case, rng: random.Random) -> str:
    """A wrong first step, rightly finished."""
    between, sign, last = STEP.fullmatch(case.columns["rest"]).groups()  # type: ignore[union-attr]
    rest = f"{slipped(int(between), rng)}{sign}{last}"
    return f"{rest}={max(value(rest), 0)}"


def slips_at_last(case: Case, rng: random.Random) -> str:
    return f"{case.columns['rest']}={slipped(case.columns['answer'], rng)}"


def guesses(case: Case, rng: random.Random) -> str:
    """A number near the result, without a step."""
    return str(max(case.columns["answer"] + rng.randint(-3, 3), 0))


# Scores


def numbers_after_last_equals(completion: str) -> int | None:
    """The result that a completion arrives at: all that follows its last equals sign."""
    result = completion.rsplit("=", 1)[-1]
    return int(result) if re.fullmatch(r"[0-9]{1,4}", result) else None


def right_result(completions: list[str], rest: list[str], answer: list[int], **_: Any) -> list[float]:
    """1 for the right result, 0.2 for a wrong one after a right first step, else 0."""
    return [
        RIGHT if numbers_after_last_equals(text) == a else WORKED if re.fullmatch(rf"{re.escape(r)}=\d+", text) else 0.0
        for text, r, a in zip(completions, rest, answer, strict=True)
    ]


def judge(prompt: str, completion: str, columns: Columns) -> float:
    """The quality of the work, from 0 to 1, from the prompt and the completion alone.

    Half for the share of equations in the completion that hold (so a bare result has none of it), 0.3 for a chain of
    which every line equals the prompt, 0.2 for being as short as a chain can be.
    """
    *lines, result = completion.split("=")
    held = [line for line in lines if STEP.fullmatch(line) and result.isdecimal() and value(line) == int(result)]
    target = total(prompt.rstrip("="))
    chain = bool(lines) and [total(part) for part in (*lines, result)] == [target] * (len(lines) + 1)
    return 0.5 * len(held) / max(len(lines), 1) + 0.3 * chain + 0.2 * (len(lines) == 1 and len(completion) <= 7)


def total(text: str) -> int | None:
    """The value of a sum written out, or None for any other text."""
    if not re.fullmatch(r"\d{1,4}([+-]\d{1,4})*", text, re.ASCII):
        return None
    return sum(int(term) for term in re.findall(r"[+-]?\d+", text))


ARITHMETIC = Task(
    name="arithmetic",
    description="Three numbers added and subtracted in two written steps, rewarded for the right result",
    max_completion_length=12,
    draw=draw,
    writers=(careful, careful, careful, careful, slips_at_first, slips_at_last, guesses),
    reward_funcs=[right_result],
    judge=judge,
    warm_steps=500,
    warm_batch=64,
)
