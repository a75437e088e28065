"""The page: what was asked, what was measured, and what that says, all from ``results.json``.

No sentence here knows how an experiment went. A difference is called one only where its 95% interval leaves 0 out.
"""

# ruff: noqa: RUF001 (Greek letters and minus signs are meant)

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

from ..display import markdown_table
from ..tasks.star_graph import DEGREE, LENGTH, NODES
from .analysis import MEASURED, Results
from .plots import name_of
from .spec import label
from .statistics import Interval

HEAD = """# Experiments

<!-- Written by `klq experiment`; edit klq_kernels/lab/experiments instead. -->

    klq experiment all --out docs/experiments

measures what is on this page, and writes it. `klq experiment NAME --quick` tries an experiment out in seconds.
"""

COMMON = """All are small: tasks and a model that the package brings along, on CPU threads; {minutes:.0f} minutes of
one thread in all, beside other work. They show that the algorithms behave as they should, not how they rank on large
models. Every run (but those of the demonstration's loop, whose seeds have warm starts of their own) starts from the
same warm-started policy, with a second copy of it as the backbone of V, and is evaluated on the same held-out
prompts. A seed decides the training prompts, the samples and the mini-batches. Intervals are 95% confidence intervals
over the seeds, by Student's t. Two algorithms are compared by the interval of their differences, seed by seed. KL is
to the reference, in nats per completion; the objective is reward − τ·KL. Curves are means of the last five cycles."""


def page(results: dict[str, Results], *, pictures: str) -> str:
    """Markdown for all results there are; ``pictures`` is the folder of the images, seen from the page."""
    minutes = sum(found["seconds"] for found in results.values()) / 60
    sections = [section(name, found, pictures) for name, found in results.items()]
    return "\n".join([f"{HEAD}\n{prose(COMMON.format(minutes=minutes))}\n", *sections])


def section(name: str, found: Results, pictures: str) -> str:
    words = WORDS[name](found)
    image = f"![{found['title']}]({pictures}/{name}.png)"
    settings = stated(found["settings"])
    seeds = "" if found["kind"] in MEASURED else f" Seeds: {found['seeds']}."
    parts = (f"## {found['title']}", prose(found["question"]), words, image, prose(f"Settings: {settings}.{seeds}"))
    return "\n\n".join(parts) + "\n"


def stated(settings: dict[str, Any]) -> str:
    """Names and values; those of a part of the job in parentheses behind its name."""
    return ", ".join(
        f"{name} ({stated(value)})" if isinstance(value, dict) else f"{name} {value}"
        for name, value in settings.items()
    )


def of(numbers: list[Any]) -> Interval:
    return Interval(*numbers)


def finals(found: Results, *, first: str, before: bool = False) -> str:
    """A table of the variants' held-out results."""
    columns = (first, *(("reward before",) if before else ()), "reward", "KL", "objective", "tokens")
    rows = [
        [
            name_of(entry["variant"]),
            *([of(entry["before"]).text()] if before else []),
            of(entry["after"]["reward"]).text(),
            of(entry["after"]["kl"]).text(2),
            of(entry["after"]["objective"]).text(),
            of(entry["after"]["length"]).text(1),
        ]
        for entry in found["variants"]
    ]
    return markdown_table(columns, rows)


def prose(text: str) -> str:
    """A paragraph, its lines filled anew now that the numbers are in."""
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def constant(found: Results) -> str:
    still, learning = (
        next(entry for entry in found["variants"] if entry["variant"]["task"] == task)
        for task in ("constant", "summarize")
    )
    kl, other = of(still["after"]["kl"]), of(learning["after"]["kl"])
    largest = max(abs(number) for number in still["curves"]["kl"]["mean"])
    moved = "leaves 0 out, so the policy did move" if kl.sign else "includes 0"
    words = prose(
        f"""The same notes, model and settings twice: once every summary earns 1, once a rule scores it. With the
        constant reward the held-out KL ends at {kl.text()} nats, an interval that {moved}; the run that has something
        to learn ends at {other.text()}. During training its mean over the seeds and five cycles was nowhere further
        from 0 than {largest:.3f} (KL is estimated from samples, so it can be below 0). Where a policy moves under a
        constant reward, it follows the errors of V, which starts at 0 and has yet to learn that every state is worth
        1."""
    )
    return f"{words}\n\n{finals(found, first='task', before=True)}"


def decay(found: Results) -> str:
    def at_most(entry: Results) -> float:
        return entry["after"]["objective"][0] + (entry["after"]["objective"][1] or 0.0)

    entries = found["variants"]
    best = max(entries, key=lambda entry: entry["after"]["objective"][0])
    mean, half = best["after"]["objective"]
    rivals = [name_of(e["variant"]) for e in entries if e is not best and at_most(e) >= mean - (half or 0.0)]
    verdict = (
        f"its interval overlaps with that of {', '.join(rivals)}" if rivals else "no other interval reaches its own"
    )
    words = prose(
        f"""The score comes with the last token; λ says how much of it reaches earlier tokens directly, and how much
        only through V. The largest mean objective was that of {name_of(best["variant"])}; {verdict}."""
    )
    return f"{words}\n\n{finals(found, first='')}"


def versus(found: Results) -> str:
    chosen = " and ".join(
        f"{settings['learning_rate']:g} for {name_of({'algorithm': group.partition('=')[2]})}"
        for group, settings in found["chosen"].items()
    )
    sweep = [[entry["name"].replace(",", ", "), f"{entry['objective']:.3f}"] for entry in found["sweep"]]
    rows = [[name_of(setting_of(pair)), *differences(pair), of(pair["win_rate"]).text()] for pair in found["pairs"]]
    columns = ("KLQ less PPO", "reward", "KL", "objective", "judge prefers KLQ")
    about_the_table = prose(
        """The judge is the task's second opinion, with criteria of its own. It compares the two completions of the same
        held-out prompt; a tie counts half."""
    )
    about_the_rates = prose(
        f"""Both had the same number of rollouts and of updates on them. The learning rate of each was chosen before, by
        the held-out objective on a seed that is not among these: {chosen}."""
    )
    return "\n\n".join(
        [
            tally(found["pairs"]),
            "\n".join(map(verdict, found["pairs"])),
            markdown_table(columns, rows),
            about_the_table,
            finals(found, first="", before=True),
            about_the_rates,
            markdown_table(("sweep", "objective"), sweep),
            times(found["timing"]),
        ]
    )


def setting_of(pair: Results) -> dict[str, Any]:
    """The settings that KLQ and PPO share in a pair."""
    return {name: value for name, value in pair["variant"].items() if name != "algorithm"}


def tally(pairs: list[Results]) -> str:
    """How often either was better, by the objective."""
    signs = [of(pair["difference"]["objective"]).sign for pair in pairs]
    return prose(
        f"""By the objective that both maximise, KLQ was better than PPO at {signs.count(1)} of {len(signs)} values of
        τ and worse at {signs.count(-1)}; at {signs.count(0)} the difference is within their noise."""
    )


def differences(pair: Results) -> list[str]:
    """The paired differences of reward, KL and objective, as a table shows them."""
    return [of(pair["difference"][name]).text(d) for name, d in (("reward", 3), ("kl", 2), ("objective", 3))]


def signs_of(pair: Results) -> dict[str, int]:
    """The signs of those differences that are clear, and 0."""
    return {name: of(pair["difference"][name.lower()]).sign for name in ("objective", "reward", "KL")}


def verdict(pair: Results) -> str:
    """One line about objective, reward, KL and the judge's preference."""
    signs = signs_of(pair)
    wins = of(pair["win_rate"])
    preferred = wins._replace(mean=wins.mean - 0.5).sign
    said = [f"its {name} is {'higher' if sign > 0 else 'lower'}" for name, sign in signs.items() if sign]
    said += [f"the judge prefers {'KLQ' if preferred > 0 else 'PPO'}"] if preferred else []
    unclear = [name for name, sign in signs.items() if not sign] + ([] if preferred else ["the judge's preference"])
    said += [f"no clear difference in {' and '.join(unclear)}"] if unclear else []
    return f"- KLQ at {name_of(setting_of(pair))}: {'; '.join(said)}."


def times(timing: Results) -> str:
    """Times of an update, side by side."""
    ms = timing["update_ms"]
    return prose(
        f"""One optimizer step (forward, backward and AdamW on {timing["tokens"]} response tokens, both models) takes
        {ms["klq"]["wall"]:.0f} ms with KLQ and {ms["ppo"]["wall"]:.0f} ms with PPO, of which CPU time
        {ms["klq"]["cpu"]:.0f} and {ms["ppo"]["cpu"]:.0f} ms: medians of {timing["rounds"]} steps of each, taken in
        turns in one process on one thread, beside other work."""
    )


def equivalence(found: Results) -> str:
    columns = ("α", "β", "rollout, fp64", "rollout, fused fp32", "away", "… without β", "expectation", "… without β")
    names = ("rollout", "rollout_fused", "away", "away_without_beta", "expectation", "expectation_without_beta")
    rows = [
        [f"{e['alpha']:g}", f"{e['beta']:.3g}", *(f"{e[name]['relative_error']:.1e}" for name in names)]
        for e in found["alphas"]
    ]
    exact, fused = (
        max(abs(entry[name]["cosine_gap"]) for entry in found["alphas"]) for name in ("rollout", "rollout_fused")
    )
    why = prose(
        """On the tokens of a rollout, where the policy is still the one that sampled them, the gradient of KLQ's
        squared loss is 2ατ times that of PPO with unwhitened advantages (GAE on rewards with −τ·log-ratio in them) and
        weight
        1/τ on its halved squared value error: α scales the first step and does no more. Once the policy has moved, KLQ
        also pulls it back to where it was. That is PPO's KL penalty at the price β = τ(1−α)/α: on samples, (τ + β)/2
        times the squared log-ratio; in expectation over actions, KLQ climbs the regularised objective less
        β·KL(π‖π_old). At α = 1 there is no penalty."""
    )
    what = prose(
        f"""The table has the norm of the difference of the two gradients relative to PPO's: over all parameters at the
        rollout, over the policy's away from it ({found["tokens"]} tokens, τ = {found["tau"]}). The columns without β
        leave the penalty out, to show that it is needed. One minus the cosine at the rollout was at most {exact:.0e} in
        float64 and {fused:.0e} through `fused_klq_loss`. Whitened advantages, which PPO usually takes, turn the
        policy's gradient: one minus its cosine with the unwhitened one is {found["whitened"]["cosine_gap"]:.1e}."""
    )
    return f"{why}\n\n{what}\n\n{markdown_table(columns, rows)}"


def noise(found: Results) -> str:
    rows = [
        [
            entry["batch"],
            str(entry["samples"]),
            f"{entry['entries']:.1f}",
            f"{entry['squared_error']:.2g}",
            f"{entry['bound']:.2g}",
            f"{entry['share']['head']:.2%}",
            f"{entry['share']['parameters']:.2%}" if "parameters" in entry["share"] else "",
        ]
        for entry in found["variance"]
    ]
    columns = ("rows", "K", "entries", "squared error", "bound 1/K", "of dW's variance", "of all parameters'")
    means = found["unbiased"]
    errors = [
        [str(n), *(f"{means['errors'][name][i]:.2g}" for name in means["errors"])] for i, n in enumerate(means["seeds"])
    ]
    falls = ", ".join(f"{name} {numbers[0] / numbers[-1]:.0f}" for name, numbers in means["errors"].items())
    inside = all(entry["squared_error"] <= entry["bound"] for entry in found["variance"])
    shares = [max(e["share"].values()) for e in found["variance"] if e["samples"] == 64]
    at_64 = f" At K = 64 the largest share was {max(shares):.2%}." if shares else ""
    mean = prose(
        f"""The gradient of a rollout's loss, sampled with K = {means["samples"]}, averaged over seeds: the relative
        distance of that mean from the dense gradient, of the head's weight, the hidden states and all of the policy's
        parameters. Over {means["seeds"][-1]} seeds the errors fell by factors of {falls}; independent errors of mean 0
        fall by {means["seeds"][-1] ** 0.5:.0f}."""
    )
    share = prose(
        f"""The squared error of the gradient by the logits, relative to its own square, was
        {"never" if inside else "not always"} above the bound. The last two columns set the variance that sampling adds
        to the gradient of the head, and of all parameters of the policy, against the variance that the mini-batch's
        gradient has anyway, because other sequences (of made-up rows: other tokens) would have given another.{at_64}"""
    )
    return "\n\n".join(
        [mean, markdown_table(("seeds", *means["errors"]), errors), share, markdown_table(columns, rows)]
    )


def against_base(found: Results, which: str = "sampled less dense") -> str:
    """The pairs' differences, and where each variant ended; ``which`` says what is less what."""
    bases = {label(pair["base"]) for pair in found["pairs"]}
    rows = [[compared(pair, bases), *differences(pair)] for pair in found["pairs"]]
    clear = [
        f"{compared(pair, bases)}: {' and '.join(said)}"
        for pair in found["pairs"]
        if (said := [f"{name} {'higher' if sign > 0 else 'lower'}" for name, sign in signs_of(pair).items() if sign])
    ]
    verdict = (
        f"Beyond the noise of these seeds: {'; '.join(clear)}."
        if clear
        else "No difference is beyond the noise of these seeds."
    )
    columns = (which, "reward", "KL", "objective")
    return "\n\n".join([prose(verdict), markdown_table(columns, rows), finals(found, first="")])


def compared(pair: Results, bases: set[str]) -> str:
    """The variant of a pair, and what it is compared with where the pairs have several bases."""
    variant = name_of(pair["variant"])
    return variant if len(bases) == 1 else f"{variant}; less {name_of(pair['base'])}"


def learning(found: Results) -> str:
    words = prose(
        """The same runs with the gradient through the head dense, and sampled with 64 and 8 samples per token. Seeds
        are shared: the first rollout of a seed is the same in all of them."""
    )
    return f"{words}\n\n{against_base(found)}"


def demo_loop(found: Results) -> str:
    words = prose(
        """The loop of `klq demo`: a GPT-NeoX of 512 tokens, warm-started, then steps of two epochs of two mini-batches
        at a learning rate of 5e-4, V a head on the policy's own hidden states."""
    )
    return f"{words}\n\n{against_base(found)}"


def optimizers(found: Results) -> str:
    rates = ", ".join(
        f"{settings['sgd_learning_rate']:g} for {group.partition('=')[2]}"
        for group, settings in found["chosen"].items()
        if group.partition("=")[2].endswith("sgd")
    )
    words = prose(
        f"""Adam divides a step by the root of the mean square of earlier gradients, element by element. A sampled
        gradient has the same mean and a larger mean square, so an element that is tiny but always there moves more
        slowly. `adamw` is the trainer's optimiser. `head-rows` is AdamW with one mean square per row of the head,
        `head-sgd` AdamW with SGD for the head, `sgd` is SGD throughout; the rate of SGD was chosen before, on another
        seed, with the dense gradient: {rates}."""
    )
    return f"{words}\n\n{against_base(found)}"


def staleness(found: Results) -> str:
    """Old engines less fresh ones, corrected ones less uncorrected ones, and how far the engines were off."""
    by_variant = {name_of(entry["variant"]): entry for entry in found["variants"]}
    comparisons = {(name_of(pair["variant"]), next(iter(pair["base"]))): pair for pair in found["pairs"]}
    ages = sorted({entry["variant"]["staleness"] for entry in found["variants"]} - {0})
    rows, said = [], []
    for age in ages:
        plain, corrected = (name_of({"staleness": age, "off_policy": name}) for name in ("none", "retrace"))
        older, older_corrected = comparisons[plain, "staleness"], comparisons[corrected, "staleness"]
        helped = comparisons[corrected, "off_policy"]
        drift = by_variant[plain]["curves"]["sampler_kl"]["mean"]
        numbers = [of(pair["difference"]["objective"]) for pair in (older, older_corrected, helped)]
        rows.append([str(age), f"{max(drift):.2f}", *(number.text() for number in numbers)])
        meanings = ("uncorrected is {} than fresh", "Retrace is {} than fresh", "Retrace is {} than uncorrected")
        clear = [
            text.format("better" if number.sign > 0 else "worse")
            for text, number in zip(meanings, numbers, strict=True)
            if number.sign
        ]
        if clear:
            said.append(f"{age} cycle{'s' * (age > 1)} behind, {', '.join(clear)}")
    words = prose(
        f"""Completions come from a copy of the policy some cycles old, which gives its log-probabilities. A cycle is
        {found["settings"]["num_mini_batches"] * found["settings"]["num_update_epochs"]} optimizer steps. By the
        objective, beyond the noise of these seeds: {"; ".join(said) or "no difference"}. Drift is the largest KL of
        the engine to the policy that learns, in nats per token, of the means over the seeds and five cycles. A fresh
        engine's trace is 1, so that its two rows differ by rounding alone. The table is of the policy at the end; the
        curves are of what the engine sampled, so of an older policy, and their KL is the new policy's log-ratio on the
        old one's tokens, which can be below 0."""
    )
    columns = (
        "cycles behind", "drift", "uncorrected less fresh", "Retrace less fresh", "Retrace less uncorrected",
    )  # fmt: skip
    return "\n\n".join([words, markdown_table(columns, rows), finals(found, first="")])


def replay(found: Results) -> str:
    words = prose(
        """Passes are those over a cycle's own completions. Runs with replay take one more, over as many completions of
        earlier cycles, drawn in proportion to their errors; so 2 passes with replay are as many optimizer steps as 3
        without. Each variant with replay is compared with the one that has as many passes and no replay."""
    )
    return f"{words}\n\n{against_base(found, 'replay less none')}"


def groups(found: Results) -> str:
    settings = found["settings"]
    cycle = settings["per_device_train_batch_size"] * settings["num_mini_batches"]
    words = prose(
        f"""A cycle has {cycle} completions: of as many prompts, or 4 or 8 for each of fewer prompts. Where there are
        several, the policy's errors have a baseline more, the mean of what the others earned beyond V of the prompt
        (docs/trainer.md). Each is compared with one completion for a prompt."""
    )
    return f"{words}\n\n{against_base(found, 'groups less single')}"


def normalisation(found: Results) -> str:
    words = prose(
        """`scaled` says whether scores are divided by their running standard deviation, which makes a nat cheaper
        where it is below 1: τ prices the result. `spread` is `advantage_spread`: where the root mean square of λ-errors
        is above it, α is made as much smaller. Rewards and objectives here are of scores as they are. Each variant is
        compared with that without scaling, and with that without a bound."""
    )
    return f"{words}\n\n{against_base(found, 'normalised less not')}"


def star_graph(found: Results) -> str:
    guess = 1 / DEGREE
    before = of(found["variants"][0]["before"])
    ends = [
        f"{name_of(e['variant'])} {of(e['after']['reward']).text()} at {of(e['after']['kl']).text(2)} nats"
        for e in found["variants"]
    ]
    words = prose(
        f"""Graphs with {DEGREE} paths of {LENGTH} nodes, {NODES} names of nodes. The reference has learnt from right
        paths by the next token. It is right on {before.mean:.3f} of {found["settings"]["eval_size"]} held-out graphs,
        where guessing the first step and copying the rest is right on {guess:.3f}. A guide learns from paths that it
        samples, at a rate that was chosen by trial on these seeds, and tilts it at η =
        {found["settings"]["etas"][-1]}; the policies start from it and learn from the
        rewards of their own paths, at τ = {found["settings"]["taus"][-1]}. Right on held-out graphs, at the end, and
        the divergence from the reference in nats per path (ln {DEGREE} = {math.log(DEGREE):.2f} is what it takes to be
        sure of the first step): {"; ".join(ends)}."""
    )
    return f"{words}\n\n{finals(found, first='method', before=True)}"


def pareto(found: Results) -> str:
    """Every method at every price, and which of these points no other has more reward for less KL than."""
    points = [
        (name_of(entry["variant"]), point["price"], of(point["reward"]), of(point["kl"]))
        for entry in found["variants"]
        for point in entry["front"]
    ]
    best = [
        f"{name} at {price:g}"
        for name, price, reward, kl in sorted(points, key=lambda point: point[3].mean)
        if not any(r.mean >= reward.mean and k.mean < kl.mean for _, _, r, k in points)
    ]
    before = of(found["variants"][0]["before"])
    words = prose(
        f"""A guide is trained once for each seed and measured at each η; a policy is trained anew for each τ, by
        {found["settings"]["policy"]["total_episodes"]:,} rollouts. All start from one warm-started policy, whose
        reward is {before.text()}. KL is in nats per completion: exact over the vocabulary at each step for guides,
        estimated from samples for policies. By their means, no other point has as much reward for less KL than:
        {"; ".join(best)}."""
    )
    rows = [[name, f"{price:g}", reward.text(), kl.text(2)] for name, price, reward, kl in points]
    return f"{words}\n\n{markdown_table(('method', 'price of a nat', 'reward', 'KL'), rows)}"


WORDS: dict[str, Callable[[Results], str]] = {
    "constant": constant, "lambda": decay, "klq-vs-ppo": versus, "equivalence": equivalence,
    "sampled-noise": noise, "sampled-learning": learning, "sampled-demo": demo_loop, "sampled-optimizers": optimizers,
    "staleness-summarize": staleness, "staleness-arithmetic": staleness,
    "replay-summarize": replay, "replay-arithmetic": replay, "groups-summarize": groups, "groups-arithmetic": groups,
    "normalisation-summarize": normalisation, "normalisation-arithmetic": normalisation, "star-graph": star_graph,
    "qsharp-arithmetic": pareto,
}  # fmt: skip
