"""The benchmark of hosts: a tiny run of each contender, and a page that says what was measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench import hosts


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", hosts.WAYS)
def test_a_tiny_run_of_each_contender_learns_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed (make test-hosts runs this with it)")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    for name, value in {"VOCAB": 300, "PROMPT": 5, "COMPLETION": 4, "MODEL": small, "STEPS": 2}.items():
        monkeypatch.setattr(hosts, name, value)
    runs = [hosts.run(way, contender) for contender in hosts.CONTENDERS]
    assert all(len(run["seconds"]) == 1 for run in runs)
    assert all(norm > 0 for run in runs for norm in run["grad_norms"])
    hosts.require_same_losses(runs)
    json.dumps(runs)


def test_other_losses_are_refused() -> None:
    run = {"way": "given", "contender": "TRL", "losses": [0.5], "entropies": [3.0], "grad_norms": [2.0]}
    hosts.require_same_losses([run, run | {"grad_norms": [2.0 + 1e-6]}])
    for change in (
        {"losses": [0.5001]},
        {"entropies": [3.001]},
        {"grad_norms": [2.01]},
        {"grad_norms": [float("nan")]},
    ):
        with pytest.raises(SystemExit, match="differ from TRL's"):
            hosts.require_same_losses([run, run | change])


def test_ratios_are_those_of_a_round() -> None:
    def run(contender: str, seconds: float) -> dict[str, Any]:
        return {"way": "given", "contender": contender, "seconds": [seconds] * 3, "peak_bytes": 5}

    ours = hosts.CONTENDERS[2]
    runs = [run("TRL", 4.0), run(ours, 2.0), run("TRL", 6.0), run(ours, 2.0), run("TRL", 3.0), run(ours, 3.0)]
    found = hosts.summary(runs, "given", ours)
    assert (found["ratio"], found["spread"]) == (2.0, (1.0, 3.0))


def test_the_page_is_made_of_the_committed_result() -> None:
    assert hosts.filled(hosts.PAGE.read_text()) == hosts.PAGE.read_text()
    runs = json.loads(hosts.OUTPUT.read_text())["runs"]
    hosts.require_same_losses(runs)
    assert hosts.summary(runs, "given", hosts.CONTENDERS[2])["ratio"] >= 1.3
