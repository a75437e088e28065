"""The cost of a guided token: python -m bench.guided [--write]

The reference and a guide of a quarter of its width are Llamas built from configs. Contenders generate the same number
of tokens for a batch of prompts by ``generate``, each row by itself greedy: the reference alone; guided with k
candidates, in one pass over a cache of the guide's own (``guidance.candidates``); and guided where each candidate is
read in a row of its own, which is what a backbone gets that does not heed the mask.

Before they are timed the two ways of reading candidates have to choose the same tokens. Contenders take turns round by
round in one process; a ratio is that of two times of one round.

--write puts the table into docs/guidance.md; the figures lie in bench/results/guided.json.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from statistics import median
from typing import Any

import torch

from klq_kernels.guidance import GuidedLogits, ValueGuide
from klq_kernels.lab.display import markdown_table, with_text

from . import environment, report
from .environment import ROOT
from .harness import quartiles, take_turns

OUTPUT = ROOT / "bench" / "results" / "guided.json"
PAGE = ROOT / "docs" / "guidance.md"
VOCAB, PROMPT, TOKENS, ROWS, ROUNDS = 32_000, 64, 16, 2, 5
SIZES = {"reference": (768, 8), "guide": (192, 8)}  # width, layers
CANDIDATES = (5, 20)
ALONE = "reference alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/guidance.md")
    write = parser.parse_args().write
    samples = measure()
    described = environment.describe(torch.device("cpu"), "python -m bench.guided")
    described["transformers"] = environment.version_of("transformers")
    shape = {"vocab": VOCAB, "prompt": PROMPT, "tokens": TOKENS, "rows": ROWS, "sizes": SIZES}
    report.save_json(OUTPUT, {"environment": described, "shape": shape, "ms": samples})
    if write:
        PAGE.write_text(filled(PAGE.read_text()))
    print(table())


def measure() -> dict[str, list[float]]:
    """Milliseconds of each contender's generation, round by round."""
    reference, backbone = (model(*SIZES[name], seed) for seed, name in enumerate(SIZES))
    guide = ValueGuide(backbone)
    torch.nn.init.normal_(guide.head.weight)
    prompts = torch.randint(2, VOCAB, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    calls: dict[str, Any] = {ALONE: partial(generate, reference, prompts, None)}
    for k in CANDIDATES:
        for way, together in (("one pass", True), ("rows apart", False)):
            calls[f"guided, k = {k}, {way}"] = partial(generate, reference, prompts, guide, k, together)
        written = [calls[f"guided, k = {k}, {way}"]() for way in ("one pass", "rows apart")]
        if not torch.equal(*written):
            raise SystemExit(f"k = {k}: candidates in one pass choose other tokens than in rows of their own")
    return take_turns(calls, torch.device("cpu"), ROUNDS, seconds=float("inf"))


def model(width: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def generate(reference: Any, prompts: Any, guide: ValueGuide | None, k: int = 0, together: bool = True) -> Any:
    from transformers import LogitsProcessorList

    processors = LogitsProcessorList()
    if guide is not None:
        guided = GuidedLogits(guide, 0.1, top_k=k)
        guided._scorer._shares = True if together else False  # noqa: SIM210
        processors.append(guided)
    return reference.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS,
        logits_processor=processors,
    )  # fmt: skip


def table() -> str:
    """The committed figures, as docs/guidance.md shows them."""
    found = json.loads(OUTPUT.read_text())["ms"]
    body = []
    for name, taken in found.items():
        rounds = [a / b for a, b in zip(taken, found[ALONE], strict=True)]
        middle, (low, high) = quartiles(rounds)
        body.append([name, f"{median(taken) / (TOKENS * ROWS):.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    return markdown_table(("", "ms a token", "of the reference alone"), body)


def filled(page: str) -> str:
    """The page with the committed figures in their place."""
    content = json.loads(OUTPUT.read_text())
    shape, machine = content["shape"], content["environment"]
    width, layers = shape["sizes"]["reference"]
    small, depth = shape["sizes"]["guide"]
    words = (
        f"A reference of {layers} layers of width {width} and a guide of {depth} of width {small}, vocabulary "
        f"{shape['vocab']:,}, {shape['rows']} prompts of {shape['prompt']} tokens, {shape['tokens']} new ones, fp32, "
        f"{machine['device']}, {machine['threads']} threads; medians and quartiles of {ROUNDS} rounds:"
    )
    return with_text(page, "cost", f"{words}\n\n{table()}")


if __name__ == "__main__":
    main()
