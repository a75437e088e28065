"""Relatives on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pairs_process
import pytest
import torch
from processes import TWO_PROCESSES, start
from transformers import AutoModelForCausalLM


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_preferences_on_two_processes_are_those_on_one(tmp_path: Path) -> None:
    start([*TWO_PROCESSES, pairs_process.__file__, str(tmp_path)])
    alone = pairs_process.run(tmp_path / "alone", gradient_accumulation_steps=2)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for theirs, ours in zip(trained.parameters(), alone.policy.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=2e-5)
    history = json.loads((tmp_path / "final" / "state.json").read_text())["log_history"]
    for logs, expected in zip(history, alone.state.log_history, strict=True):
        names = {"rewards/margins", "kl/rejected", "eval_loss", "eval_kl/chosen"} & expected.keys()
        for name in names:
            assert logs[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
