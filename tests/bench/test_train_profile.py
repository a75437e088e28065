"""The profile of a training step: what is booked where, and a page that says what was measured."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench import train_profile
from bench.train_profile import PHASES, Recorder
from klq_kernels import KLQTargets
from klq_kernels.trainer import KLQConfig
from klq_kernels.trainer.actor_critic import States
from klq_kernels.trainer.models import Head


@pytest.mark.parametrize("place", ["of its own", "in the heap"])
def test_an_inner_phase_does_not_count_for_the_outer_one(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    hole = [torch.ones(2**14) for _ in range(1200)] if place == "in the heap" else []  # small enough for the heap
    above = torch.ones(2**14)
    hole.clear()
    monkeypatch.setattr(train_profile, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    recorder = Recorder(torch.device("cpu"))
    recorder.begin_cycle()
    recorder.settle()
    with recorder.phase("forward"), recorder.phase("loss"):
        held = torch.ones(2**24)  # 64 MiB
        del held
    del above
    (cycle,) = recorder.cycles
    assert [cycle[name]["seconds"] for name in ("forward", "loss", "reward")] == [2, 1, 0]
    assert cycle["loss"]["peak_bytes"] > cycle["forward"]["peak_bytes"] + 2**24


@pytest.mark.parametrize("loss", train_profile.LOSSES)
def test_every_phase_of_a_tiny_run_is_booked(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_profile, "VOCAB", 500)
    monkeypatch.setattr(train_profile, "BATCH", {"cpu": (2, 4, 4)})
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    monkeypatch.setattr(train_profile, "SMALL", small)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cycle, objectives = train_profile.cycle_module, train_profile.objectives
    monkeypatch.setattr(cycle, "score", cycle.score)  # put back what the naive run replaces
    monkeypatch.setitem(objectives.OBJECTIVES, "klq", objectives.klq)
    found = train_profile.profile(loss)
    assert found["cycles"] == train_profile.CYCLES - 1
    assert all(found["phases"][name]["seconds"] > 0 for name in PHASES)
    json.dumps(found)


def test_the_naive_loss_is_the_fused_one_and_keeps_its_logits_once() -> None:
    n, vocab = 20, 300
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, 16, generator=g, requires_grad=True) for k in (n, vocab))
    values, *targets = torch.randn(4, n, generator=g)
    states = States(hidden, Head(weight, None, None, 1.0), values, values[:1])
    inputs = SimpleNamespace(actions=torch.randint(vocab, (n,), generator=g), cu_seqlens=torch.tensor([0, n]).int())
    experience = SimpleNamespace(targets=KLQTargets(*targets), ref_logprobs=None, step=1.0)
    config, count = KLQConfig("unused", use_cpu=True), torch.tensor(float(n))
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (n, vocab):
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, _ = train_profile.naive_klq(states, inputs, experience, count, config)
    assert len(kept) == 1
    fused, _ = train_profile.objectives.klq(states, inputs, experience, count, config)
    torch.testing.assert_close(loss, fused)
    with torch.no_grad():
        scored, right = (f(states, inputs, config) for f in (train_profile.naive_score, train_profile.objectives.score))
    torch.testing.assert_close(scored, right)


def test_the_page_is_made_of_the_committed_result() -> None:
    content = json.loads(train_profile.RESULT.read_text())
    assert train_profile.PAGE.read_text() == train_profile.page(content)
    fused, naive = (run["phases"] for run in content["runs"])
    assert max(PHASES, key=lambda n: fused[n]["peak_bytes"]) != "loss"
    assert max(p["peak_bytes"] for p in fused.values()) < max(p["peak_bytes"] for p in naive.values())
