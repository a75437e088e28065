"""Guided decoding: the exact policy of an enumerable toy, a zero guide, batches, beams, models of many families."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModel, LogitsProcessorList, OPTConfig

from klq_kernels.guidance import ActionGuide, CandidateScorer, GuidedLogits, Law, ValueGuide

EOS = tiny.EOS


def guide_of(law: Law | None = None, family: str = "llama", seed: int = 5, **changes: Any) -> ValueGuide:
    """A guide whose head says something."""
    torch.manual_seed(seed)
    guide = ValueGuide(AutoModel.from_config(tiny.config(family, **changes)).float(), law)
    torch.nn.init.normal_(guide.head.weight, std=0.5)
    return guide


def generate(model: Any, ids: Tensor, processor: GuidedLogits | None, mask: Tensor | None = None, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": EOS} | kwargs
    processors = LogitsProcessorList([] if processor is None else [processor])
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, logits_processor=processors, **settings)


# ---- the policy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_the_guided_policy_is_the_tilted_reference(eta: float, kind: str) -> None:
    """Three tokens, two steps, a reward with three values: with the true law after each token as the guide, the guided
    probability of every completion is that of pi_ref exp(R / eta), enumerated.
    """
    vocab, steps = 3, 2
    generator = torch.Generator().manual_seed(0)
    ref = {p: (2 * torch.randn(vocab, generator=generator)).log_softmax(-1) for p in [(), (0,), (1,), (2,)]}
    paths = list(itertools.product(range(vocab), repeat=steps))
    values = [0.0, 1.0] if kind == "bernoulli" else [0.0, 0.5, 1.0]
    reward = {p: values[(2 * p[0] + p[1]) % len(values)] for p in paths}
    law = Law(kind, atoms=len(values))

    def outputs_after(prefix: tuple[int, ...]) -> Tensor:
        """The true law of the reward from here under the reference, as outputs."""
        mass = torch.zeros(len(values), dtype=torch.float64)
        for path in paths:
            if path[: len(prefix)] == prefix:
                rest = sum(float(ref[path[:i]][path[i]]) for i in range(len(prefix), steps))
                mass[values.index(reward[path])] += torch.tensor(rest, dtype=torch.float64).exp()
        logp = (mass / mass.sum()).clamp(min=1e-300).log().float().clamp(min=-200)
        return logp if kind == "categorical" else (logp[1] - logp[0]).reshape(1)

    class TrueGuide(CandidateScorer):
        def __call__(self, input_ids: Tensor, candidates: Tensor, vocab: int | None = None) -> Tensor:
            self._continue(input_ids)
            self._ids = input_ids.clone()
            rows = zip(input_ids[:, 1:].tolist(), candidates.tolist(), strict=True)  # behind one token of a prompt
            return torch.stack([torch.stack([outputs_after((*prefix, c)) for c in cs]) for prefix, cs in rows])

    processor = GuidedLogits(guide_of(law), eta, top_k=vocab)
    processor._scorer = TrueGuide(processor.guide)
    first = processor(torch.tensor([[0]]), ref[()][None]).log_softmax(-1)[0]
    prefixes = torch.tensor([[0, 0], [0, 1], [0, 2]])
    second = processor(prefixes, torch.stack([ref[(i,)] for i in range(3)])).log_softmax(-1)
    guided = torch.tensor([float(first[p[0]] + second[p[0], p[1]]) for p in paths]).exp()
    tilted = torch.tensor([float(ref[()][p[0]] + ref[p[:1]][p[1]]) + reward[p] / eta for p in paths]).double()
    wanted = tilted.softmax(-1)
    assert (guided.double() - wanted).abs().sum() / 2 < 1e-5
    # and the divergence of the trajectories: that of the first step, and after each token that of the second
    log_ratio = guided.clamp(min=1e-38).log() - (tilted - torch.tensor([reward[p] for p in paths]).double() / eta)
    whole = (guided * log_ratio).sum().item()
    steps_kl = float(processor.kl @ first.exp()) if len(processor.kl) == 3 else None
    assert steps_kl == pytest.approx(whole, abs=1e-4)


def test_guided_samples_have_the_tilted_frequencies() -> None:
    """Sampling through generate: total variation from the exact guided policy below the error of sampling."""
    model, guide = tiny.model(), guide_of()
    prompt = torch.tensor([[7, 9, 11]])
    processor = GuidedLogits(guide, 0.2, top_k=4, others="exclude")
    with torch.no_grad():
        logits = model(prompt).logits[:, -1]
        exact = processor(prompt, logits).softmax(-1)[0]
    torch.manual_seed(0)
    number = 4000
    out = generate(
        model, prompt, GuidedLogits(guide, 0.2, top_k=4, others="exclude"), do_sample=True, top_k=0, max_new_tokens=1,
        num_return_sequences=number,
    )  # fmt: skip
    counted = torch.bincount(out[:, -1], minlength=len(exact)) / number
    assert (exact > 0).sum() == 4
    assert (counted - exact).abs().sum() / 2 < 3 * (exact * (1 - exact) / number).sqrt().sum() / 2 + 1e-3


@pytest.mark.parametrize("kind", ["bernoulli", "categorical", "mse"])
def test_a_zero_guide_changes_nothing_bit_for_bit(kind: str) -> None:
    guide = ValueGuide(AutoModel.from_config(tiny.config()).float(), Law(kind, low=-3.0, high=2.0))
    assert guide.is_zero
    scores = 4 * torch.randn(3, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(2, tiny.VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))
    for eta in (0.01, 1.0, 10.0):
        processor = GuidedLogits(guide, eta, temperature=0.7)
        assert torch.equal(processor(ids, scores), scores)
        assert torch.equal(processor.kl, torch.zeros(3))
    model = tiny.model()
    for how in ({}, {"do_sample": True}, {"num_beams": 3}):
        torch.manual_seed(3)
        plain = generate(model, ids, None, **how)
        torch.manual_seed(3)
        assert torch.equal(generate(model, ids, GuidedLogits(guide, 0.01), **how), plain)


def test_others_keep_their_probabilities_or_lose_them() -> None:
    guide, k = guide_of(), 5
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    scores = torch.randn(2, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    before = scores.softmax(-1)
    kept = GuidedLogits(guide, 0.1, top_k=k)(ids, scores).softmax(-1)
    chosen = torch.zeros_like(before).scatter(1, before.topk(k).indices, 1.0).bool()
    torch.testing.assert_close(kept[~chosen], before[~chosen], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close((kept * chosen).sum(1), (before * chosen).sum(1))
    assert (kept[chosen] - before[chosen]).abs().max() > 1e-3
    excluded = GuidedLogits(guide, 0.1, top_k=k, others="exclude")(ids, scores).softmax(-1)
    assert not excluded[~chosen].any()
    torch.testing.assert_close(
        excluded[chosen].view(2, k), (kept * chosen / (kept * chosen).sum(1, True))[chosen].view(2, k)
    )


@pytest.mark.parametrize("others", ["keep", "exclude"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_divergence_is_the_whole_vocabularys(others: str, temperature: float) -> None:
    processor = GuidedLogits(guide_of(), 0.05, top_k=6, others=others, temperature=temperature)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    scores = torch.randn(2, tiny.VOCAB, generator=torch.Generator().manual_seed(0))
    scores[:, 20:40] = -torch.inf  # forbidden by another processor
    p = (processor(ids, scores).double() / temperature).softmax(-1)
    q = (scores.double() / temperature).softmax(-1)
    exact = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    torch.testing.assert_close(processor.kl.double(), exact, rtol=1e-4, atol=1e-6)


def test_what_comes_after_the_end_counts_for_no_divergence() -> None:
    guide, model = guide_of(), tiny.model()
    ids = torch.randint(2, tiny.VOCAB, (4, 3), generator=torch.Generator().manual_seed(2))
    ends = torch.arange(2, tiny.VOCAB, 2).tolist()  # half of all tokens end a row
    processor = GuidedLogits(guide, 0.1, eos_token_id=ends)
    torch.manual_seed(1)
    out = generate(model, ids, processor, do_sample=True, eos_token_id=ends)
    alone = []
    for row in out:
        generated = row[3:].tolist()
        length = next(i + 1 for i, t in enumerate([*generated, ends[0]]) if t in ends)
        single = GuidedLogits(guide, 0.1)
        for t in range(min(length, len(generated))):
            with torch.no_grad():
                single(row[None, : 3 + t], model(row[None, : 3 + t]).logits[:, -1])
        alone.append(single.kl)
    assert len({(row[3:] != 0).sum().item() for row in out}) > 1  # of several lengths
    torch.testing.assert_close(processor.kl, torch.cat(alone), rtol=1e-3, atol=1e-5)


# ---- candidates in one pass ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_pass_over_a_cache_is_a_row_for_each_candidate(family: str) -> None:
    guide = guide_of(family=family)
    scorer = CandidateScorer(guide, tiny.PAD)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, tiny.VOCAB, (3, 7), generator=generator)
    ids[0, :3] = tiny.PAD
    ids[2, :1] = tiny.PAD
    for step in range(4):
        candidates = torch.randint(2, tiny.VOCAB, (3, 5), generator=generator)
        found = scorer(ids, candidates)
        for row, column in itertools.product(range(3), range(5)):
            alone = torch.cat([ids[row][ids[row] != tiny.PAD], candidates[row, column : column + 1]])
            with torch.no_grad():
                wanted = guide.eval()(alone[None])[0, -1]
            torch.testing.assert_close(found[row, column], wanted, rtol=1e-3, atol=1e-4)
        ids = torch.cat([ids, candidates[:, step : step + 1]], 1)
        if step == 1:  # rows in another order, one of them twice, as beams are
            ids = ids[[2, 0, 2]]
    assert scorer._shares


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_q_type_guide_says_of_candidates_what_it_says_of_tokens(family: str) -> None:
    """In one token on a cache, what its forward says of them in whole sequences: the rows of a full head."""
    torch.manual_seed(4)
    guide = ActionGuide(AutoModel.from_config(tiny.config(family)).float(), Law("categorical", atoms=3))
    assert guide.is_zero
    torch.nn.init.normal_(guide.head.weight, std=0.5)
    torch.nn.init.normal_(guide.head.bias)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, tiny.VOCAB, (3, 7), generator=generator)
    ids[0, :3] = tiny.PAD
    scorer = CandidateScorer(guide, tiny.PAD)
    for step in range(3):
        candidates = torch.randint(2, tiny.VOCAB, (3, 5), generator=generator)
        found = scorer(ids, candidates)
        for row, column in itertools.product(range(3), range(5)):
            alone = torch.cat([ids[row][ids[row] != tiny.PAD], candidates[row, column : column + 1]])[None]
            with guide.evaluating():
                wanted = guide(alone)[0, -1]
                states = guide.backbone(alone[:, :-1]).last_hidden_state[0, -1]
                full = guide.head(states).view(-1, 3)[alone[0, -1]]
            torch.testing.assert_close(wanted, full, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[row, column], wanted, rtol=1e-3, atol=1e-4)
        ids = torch.cat([ids, candidates[:, step : step + 1]], 1)
        if step == 0:
            ids = ids[[2, 0, 2]]
    assert scorer._shares


def test_a_backbone_that_ignores_the_mask_reads_rows_apart() -> None:
    guide = guide_of()
    inner = guide.backbone.forward
    guide.backbone.forward = lambda **kw: inner(**{**kw, "attention_mask": None})  # type: ignore[method-assign]
    scorer = CandidateScorer(guide)
    ids, candidates = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7, 8]])
    with pytest.warns(UserWarning, match="cannot score candidates in one pass"):
        found = scorer(ids, candidates)
    with torch.no_grad():
        alone = torch.stack([guide(torch.tensor([[3, 4, 5, c]]))[0, -1] for c in (6, 7, 8)])
    torch.testing.assert_close(found[0], alone)


def test_a_prompt_that_begins_with_the_padding_token() -> None:
    """A model whose padding, beginning and end are one token: the attention mask tells them apart."""
    guide, ids = guide_of(), torch.tensor([[0, 0, 0, 5], [0, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    candidates = torch.tensor([[3, 4], [3, 4]])
    found = CandidateScorer(guide, tiny.PAD, mask)(ids, candidates)
    with torch.no_grad():
        wanted = [guide(torch.tensor([[*row, c] for c in (3, 4)]))[:, -1] for row in ([0, 5], [0, 6, 7, 8])]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_padded_batch_generates_what_its_rows_do_alone(how: dict[str, Any]) -> None:
    model, guide = tiny.model(), guide_of()
    rows = [[5, 6, 7, 8], [9, 10]]
    batch = torch.tensor([rows[0], [tiny.PAD] * 2 + rows[1]])
    mask = (batch != tiny.PAD).long()
    sampled = "do_sample" in how
    together = GuidedLogits(
        guide, 0.05, top_k=1 if sampled else 8, others="exclude" if sampled else "keep", pad_token_id=tiny.PAD
    )
    out = generate(model, batch, together, mask, **how)
    number = how.get("num_return_sequences", 1)
    for i, row in enumerate(rows):
        alone = GuidedLogits(guide, 0.05, top_k=together.top_k, others=together.others)
        single = generate(model, torch.tensor([row]), alone, **how)
        assert out[i * number, 4:].tolist()[: single.shape[1] - len(row)] == single[0, len(row) :].tolist()


def test_one_guide_serves_every_eta_and_moves_towards_reward() -> None:
    model, guide = tiny.model(), guide_of()
    ids = torch.randint(2, tiny.VOCAB, (16, 4), generator=torch.Generator().manual_seed(0))
    divergences, means = [], []
    for eta in (10.0, 1.0, 0.1, 0.01):
        processor = GuidedLogits(guide, eta)
        torch.manual_seed(0)
        out = generate(model, ids, processor, do_sample=True, max_new_tokens=1)
        with torch.no_grad():
            means.append(guide.law.mean(guide(out)[:, -1]).mean().item())
        divergences.append(processor.kl.mean().item())
    assert divergences == sorted(divergences)
    assert means[-1] > means[0]


# ---- saving, wrong input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ValueGuide, ActionGuide])
def test_a_guide_is_what_was_saved(tmp_path: Any, kind: type[ValueGuide]) -> None:
    guide = kind(tiny.model(), Law("categorical", atoms=4, low=-1, high=3))
    torch.nn.init.normal_(guide.head.weight)
    guide.save_pretrained(tmp_path)
    again = ValueGuide.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    with guide.evaluating(), again.evaluating():
        assert torch.equal(guide(ids), again(ids))
    assert again.law == guide.law
    assert type(again) is kind
    with pytest.raises(ValueError, match=r"^folder: .* lacks guide\.json"):
        ValueGuide.from_pretrained(tmp_path / "elsewhere")


def test_a_guide_takes_the_backbone_of_a_model_with_a_head() -> None:
    model = tiny.model()
    guide = ValueGuide(model)
    assert guide.backbone is model.base_model
    assert guide(torch.tensor([[3, 4]])).shape == (1, 2, 1)


def test_wrong_arguments_are_named() -> None:
    guide = guide_of()
    for name, kwargs in (
        ("eta", {"eta": 0.0}),
        ("top_k", {"top_k": 0}),
        ("others", {"others": "drop"}),
        ("offset", {"offset": "max"}),
        ("temperature", {"temperature": -1.0}),
        ("eos_token_id", {"eos_token_id": "x"}),
        ("eos_token_id", {"eos_token_id": [[2]]}),
        ("pad_token_id", {"pad_token_id": 1.5}),
        ("pad_token_id", {"pad_token_id": [1, 2]}),
        ("attention_mask", {"attention_mask": [[1]]}),
        ("attention_mask", {"attention_mask": torch.ones(5)}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            GuidedLogits(guide, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^guide: "):
        GuidedLogits(tiny.model())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^guide: reads ids below"):
        GuidedLogits(guide)(torch.tensor([[tiny.VOCAB + 5]]), torch.zeros(1, tiny.VOCAB + 10))
    with pytest.raises(ValueError, match=r"^attention_mask: "):
        GuidedLogits(guide, attention_mask=torch.ones(1, 9))(torch.tensor([[3, 4]]), torch.zeros(1, tiny.VOCAB))
    with pytest.raises(ValueError, match=r"^kl: "):
        GuidedLogits(guide).kl  # noqa: B018
    with pytest.raises(ValueError, match=r"^scores: "):
        GuidedLogits(guide)(torch.tensor([[3], [4]]), torch.zeros(3, tiny.VOCAB))
    with pytest.raises(ValueError, match=r"^input_ids: "):
        GuidedLogits(guide)(torch.tensor([[3.0]]), torch.zeros(1, tiny.VOCAB))
    with pytest.raises(ValueError, match=r"^law: must be a Law"):
        ValueGuide(tiny.model(), "bernoulli")  # type: ignore[arg-type]
    assert GuidedLogits(guide, eos_token_id=torch.tensor(2))._ends == [2]


def test_padding_that_nothing_speaks_of_is_refused() -> None:
    guide, scores = guide_of(), torch.zeros(2, tiny.VOCAB)
    padded, ids = torch.tensor([[tiny.PAD, tiny.PAD, 5], [6, 7, 8]]), torch.tensor([[4, 4, 5], [6, 7, 8]])
    with pytest.raises(ValueError, match=r"^pad_token_id: is needed: some prompts begin with .* padding token, 0"):
        GuidedLogits(guide)(padded, scores)
    for processor in (
        GuidedLogits(guide, pad_token_id=tiny.PAD),
        GuidedLogits(guide, attention_mask=(padded != tiny.PAD).long()),
    ):
        processor(padded, scores)
    GuidedLogits(guide)(ids, scores)


def test_a_guide_reads_states_of_another_width_than_the_layers() -> None:
    config = OPTConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=1, num_attention_heads=2,
        ffn_dim=32, dropout=0.5,
    )  # fmt: skip
    backbone = AutoModel.from_config(config).train()
    guide = ValueGuide(backbone)
    assert guide.head.in_features == 16
    assert backbone.training
    assert guide(torch.tensor([[3, 4]])).shape == (1, 2, 1)


def test_a_later_prompt_that_begins_with_the_last_output_begins_anew() -> None:
    model, guide = tiny.model("llama", seed=4).eval(), guide_of()
    reused = GuidedLogits(guide, 0.1)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    first = generate(model, prompt, reused)
    longer = torch.cat([first, torch.tensor([[11, 12], [13, 14]])], 1)
    fresh = GuidedLogits(guide, 0.1)
    assert torch.equal(generate(model, longer, reused), generate(model, longer, fresh))
    torch.testing.assert_close(reused.kl, fresh.kl)


def test_reset_begins_anew_whatever_comes() -> None:
    model, guide = tiny.model("llama", seed=4).eval(), guide_of()
    reused, ids = GuidedLogits(guide, 0.1), torch.tensor([[5, 6, 7, 8]])
    scores = model(ids).logits[:, -1]
    reused(ids[:, :-1], scores)
    with torch.no_grad():
        guide.backbone.layers[0].mlp.up_proj.weight.mul_(2.0)
    reused.reset()
    with pytest.raises(ValueError, match="no generation yet"):
        reused.kl  # noqa: B018
    fresh = GuidedLogits(guide, 0.1)
    torch.testing.assert_close(reused(ids, scores), fresh(ids, scores))
    torch.testing.assert_close(reused.kl, fresh.kl)
