"""The benchmark of hosts: a tiny run of each contender, and a page that says what was measured."""

from __future__ import annotations

import json
from statistics import median

import pytest

from bench import hosts


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("way", hosts.WAYS)
def test_a_tiny_run_of_each_contender_learns_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="TRL is not installed (make test-hosts runs this with it)")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    for name, value in {"VOCAB": 300, "PROMPT": 5, "COMPLETION": 4, "MODEL": small, "ROUNDS": 2}.items():
        monkeypatch.setattr(hosts, name, value)
    runs = [hosts.alone(way, contender) for contender in hosts.CONTENDERS]
    assert all(norm > 0 for run in runs for norm in run["grad_norms"])
    hosts.require_same_logs(runs)
    seconds = hosts.in_turns(way)
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys(hosts.CONTENDERS, 2)
    json.dumps([runs, seconds])


def test_other_losses_are_refused() -> None:
    run = {"way": "given", "contender": "TRL", "losses": [0.5], "entropies": [3.0], "grad_norms": [2.0]}
    hosts.require_same_logs([run, run | {"grad_norms": [2.0 + 1e-6]}])
    for change in (
        {"losses": [0.5001]},
        {"entropies": [3.001]},
        {"grad_norms": [2.01]},
        {"grad_norms": [float("nan")]},
    ):
        with pytest.raises(SystemExit, match="differ from TRL's"):
            hosts.require_same_logs([run, run | change])


def test_ratios_are_those_of_a_round() -> None:
    assert hosts.ratios([4.0, 6.0, 3.0], [2.0, 2.0, 3.0]) == [2.0, 3.0, 1.0]


def test_the_page_is_made_of_the_committed_result() -> None:
    assert hosts.filled(hosts.PAGE.read_text()) == hosts.PAGE.read_text()
    content = json.loads(hosts.OUTPUT.read_text())
    hosts.require_same_logs(content["alone"])
    trl, *_, ours = content["seconds"]["given"].values()
    assert median(hosts.ratios(trl, ours)) >= 1.3
