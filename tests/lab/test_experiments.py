"""``klq experiment``: its statistics, its jobs, that it goes on where it stopped, and that its page says what is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from klq_kernels.lab.experiments import NAMES, analysis, page, plots, pool, spec, walkthrough
from klq_kernels.lab.experiments.equivalence import compare_gradients
from klq_kernels.lab.experiments.job import result
from klq_kernels.lab.experiments.methods import train_method
from klq_kernels.lab.experiments.stale import StaleEngine
from klq_kernels.lab.experiments.statistics import Interval, interval, paired, t_975, win_share
from klq_kernels.trainer import Completions, KLQTrainer

ROOT = str(Path(__file__).parents[2])
DOCS = Path(ROOT) / "docs"


# Statistics


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042), (40, 2.021), (120, 1.980)]
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float):
    assert t_975(degrees) == pytest.approx(quantile, abs=6e-4)


def test_intervals():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert interval([5.0]) == (5.0, None)
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (1.0, 0.0)
    assert win_share([1.0, 1.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0]) == 0.625


def test_an_interval_has_a_sign_only_where_it_leaves_0_out():
    assert [Interval(*i).sign for i in [(1.0, 0.5), (-1.0, 0.5), (1.0, 1.0), (1.0, None)]] == [1, -1, 0, 0]
    assert Interval(1.0, 0.25).text(2) == "1.00 ± 0.25"
    assert Interval(1.0, None).text(2) == "1.00"


# Jobs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_has_its_jobs(name: str, quick: bool):
    experiment = spec.load(name, quick=quick)
    jobs = experiment.jobs({}) + experiment.sweep_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    seeds = {job.settings["seed"] for job in experiment.jobs({})}
    assert seeds == set(range(experiment.seeds))
    assert not seeds & {job.settings["seed"] for job in experiment.sweep_jobs()}


def test_a_sweep_decides_for_its_group():
    experiment = spec.load("klq-vs-ppo", seeds=1)
    better = {"klq": 1e-4, "ppo": 1e-3}
    jobs = [
        {
            "job": {"settings": job.settings},
            "after": {"reward": float(job.settings["learning_rate"] == better[job.settings["algorithm"]]), "kl": 0.0},
        }
        for job in experiment.sweep_jobs()
    ]
    chosen = analysis.choose(experiment, jobs)
    assert chosen == {f"algorithm={name}": {"learning_rate": rate} for name, rate in better.items()}
    for job in experiment.jobs(chosen):
        assert job.settings["learning_rate"] == better[job.settings["algorithm"]]


def test_bad_arguments_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="name: must be one of constant"):
        spec.load("nonsense")
    with pytest.raises(ValueError, match="seeds"):
        spec.load("constant", seeds=0)
    with pytest.raises(ValueError, match="workers"):
        walkthrough.run(["constant"], tmp_path, workers=0)


def test_a_result_counts_only_for_the_very_job(tmp_path: Path):
    job = spec.load("constant").jobs({})[0]
    path = tmp_path / "r.json"
    assert result(job, path) is None
    path.write_text(json.dumps({"job": {"name": job.name, "kind": job.kind, "settings": job.settings}}))
    assert result(job, path) is not None
    assert result(replace(job, settings={**job.settings, "tau": 1.0}), path) is None
    path.write_text('{"job": ')
    assert result(job, path) is None


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = spec.load("lambda", quick=True)
    small = replace(real, grid={"lam": [0.5, 1.0]}, settings={**real.settings, "total_episodes": 16})
    monkeypatch.setattr(walkthrough, "load", lambda name, **_: small)
    out = tmp_path / "results"
    walkthrough.run(["lambda"], out)
    first, second = (out / "jobs" / "lambda" / f"{job.name}.json" for job in small.jobs({}))
    kept, again = first.stat().st_mtime_ns, second.read_text()
    second.unlink()
    walkthrough.run(["lambda"], out)
    assert first.stat().st_mtime_ns == kept
    assert json.loads(second.read_text())["curves"] == json.loads(again)["curves"]  # the same seed, the same run
    assert (out / "lambda.png").stat().st_size > 10_000
    assert "λ = 0.5" in (tmp_path / "results.md").read_text()
    assert not [*out.glob("jobs/lambda/*.log"), *out.glob("jobs/lambda/*.part")]


def test_a_job_that_fails_says_why(tmp_path: Path):
    job = spec.Job("bad", "train", {"task": "chess", "eval_size": 1})
    with pytest.raises(RuntimeError, match=r"job bad failed: ValueError: task: must be one of"):
        pool.run_all([job], tmp_path, tmp_path, 1, lambda: None)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_job_ends_with_a_program_that_is_killed(tmp_path: Path):
    """SIGKILL leaves no job behind: nothing has the job's log open any more."""
    program = f"""
from pathlib import Path
from klq_kernels.lab.experiments import pool, spec
if __name__ == "__main__":
    settings = {{**spec.load("lambda", quick=True).settings, "total_episodes": 10**6, "seed": 0}}
    pool.run_all([spec.Job("long", "train", settings)], Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), 1, print)
"""
    (tmp_path / "program.py").write_text(program)
    log = tmp_path / "long.log"

    def holders() -> list[str]:
        return [link.parts[2] for link in Path("/proc").glob("[0-9]*/fd/*") if leads_to(link) == str(log)]

    started = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env={**os.environ, "PYTHONPATH": ROOT})
    wait_for(lambda: bool(holders()))
    started.kill()
    started.wait()
    wait_for(lambda: not holders())
    assert not (tmp_path / "long.json").exists()


def leads_to(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


# Stale samples


def test_a_stale_engine_samples_from_the_policy_of_some_cycles_ago(tmp_path: Path):
    """Its log-probabilities are those of the weights at the beginning of an earlier cycle."""
    engine = StaleEngine(tiny.model(), 2)
    seen: list[tuple[list[str], Completions, dict[str, torch.Tensor]]] = []

    def record(prompts: list[str], trainer: KLQTrainer) -> Completions:
        weights = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
        seen.append((prompts, engine(prompts, trainer), weights))
        return seen[-1][1]

    run = tiny.trainer(
        tmp_path, {"rollout_func": record}, max_steps=4, num_update_epochs=1, learning_rate=1e-2, off_policy="retrace"
    )
    run.train()
    assert [completions.staleness for _, completions, _ in seen] == [0, 1, 2, 2]
    sampler = tiny.model()
    for cycle, (prompts, completions, _) in enumerate(seen):
        sampler.load_state_dict(seen[max(cycle - 2, 0)][2])
        prompt, said = run.tokenizer(prompts[0])["input_ids"], completions.completion_ids[0]
        with torch.no_grad():
            logits = sampler(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).squeeze(1)
        assert completions.logprobs is not None
        torch.testing.assert_close(torch.tensor(completions.logprobs[0]), expected, rtol=1e-4, atol=1e-5)
    run.rollout_func = engine
    held_out = run.roll_out([{"prompt": "abc"}], 0)
    assert held_out.staleness is None  # answered by the policy as it is


def test_the_page_says_of_stale_samples_what_is_clear():
    def entry(age: int, policy: str) -> dict[str, Any]:
        after = {name: [0.5, 0.1] for name in ("reward", "kl", "objective", "length")}
        curves = {"sampler_kl": {"mean": [0.0, 0.25, 0.2], "half": [0.0] * 3}}
        return {"variant": {"staleness": age, "off_policy": policy}, "after": after, "curves": curves}

    def pair(policy: str, base: dict[str, Any], mean: float) -> dict[str, Any]:
        return {
            "variant": {"staleness": 8, "off_policy": policy},
            "base": base,
            "difference": {"objective": [mean, 0.1]},
        }

    found = {
        "settings": {"num_mini_batches": 2, "num_update_epochs": 2},
        "variants": [entry(age, policy) for age in (0, 8) for policy in ("none", "retrace")],
        "pairs": [
            pair("none", {"staleness": 0}, -0.3),
            pair("retrace", {"staleness": 0}, -0.05),
            pair("retrace", {"off_policy": "none"}, 0.25),
        ],
    }
    words = page.staleness(found).replace("\n", " ")
    assert "8 cycles behind, uncorrected is worse than fresh, Retrace is better than uncorrected." in words
    assert "| 8 | 0.25 | -0.300 ± 0.100 | -0.050 ± 0.100 | 0.250 ± 0.100 |" in words


# Gradients


@pytest.mark.parametrize("method", ["categorical", "reinforce"])
def test_a_method_is_measured_at_each_price(method: str, tmp_path: Path):
    settings = spec.load("star-graph", quick=True).job({"method": method, "seed": 0}).settings
    found = train_method({**settings, "etas": [1.0, 0.1], "taus": [0.1, 0.05]}, tmp_path)
    assert [point["price"] for point in found["front"]] == ([1.0, 0.1] if method == "categorical" else [0.1, 0.05])
    assert found["after"] == found["front"][-1]
    assert set(found["curves"]) == {"step", "reward", "kl"}
    assert len({len(curve) for curve in found["curves"].values()}) == 1
    assert {"reward", "kl", "length"} <= found["after"].keys()


def test_klq_is_ppo_with_a_penalty(tmp_path: Path):
    trainer = tiny.trainer(tmp_path, {"value_model": tiny.model(seed=1)}, tau=0.1)
    rows = list(tiny.prompts(8))
    found = compare_gradients(trainer, rows, alphas=[0.3, 1.0])
    for entry in found["alphas"]:
        for name in ("rollout", "away", "expectation"):
            assert entry[name]["relative_error"] < 1e-12
        assert entry["rollout_fused"]["relative_error"] < 1e-4
    partial, whole = found["alphas"]
    assert partial["beta"] == pytest.approx(0.1 * 0.7 / 0.3)
    for name in ("away_without_beta", "expectation_without_beta"):
        assert partial[name]["relative_error"] > 1e-2
        assert whole[name]["relative_error"] < 1e-12  # at alpha = 1 there is no penalty


# The page


def test_the_committed_page_is_that_of_the_committed_results():
    results = json.loads((DOCS / "experiments" / "results.json").read_text())
    assert (DOCS / "experiments.md").read_text() == page.page(results, pictures="experiments")
    for name, found in results.items():
        assert (DOCS / "experiments" / f"{name}.png").exists()
        full = spec.load(name)
        assert (found["seeds"], found["settings"]) == (full.seeds, full.settings)


def compared(objective: list[Any], wins: list[Any]) -> dict[str, Any]:
    difference = {"objective": objective, "reward": [0.0, 0.1], "kl": [-1.0, 0.5]}
    return {"variant": {"tau": 0.1}, "difference": difference, "win_rate": wins}


@pytest.mark.parametrize(
    ("objective", "wins", "tally", "line"),
    [
        (
            [0.2, 0.1],
            [0.6, 0.05],
            "better than PPO at 1 of 1 values",
            "its objective is higher; its KL is lower; the judge prefers KLQ; no clear difference in reward.",
        ),
        (
            [-0.2, 0.1],
            [0.4, 0.05],
            "worse at 1; at 0",
            "its objective is lower; its KL is lower; the judge prefers PPO",
        ),
        (
            [-0.2, 0.3],
            [0.5, 0.05],
            "at 1 the difference is within their noise",
            "no clear difference in objective and reward and the judge's preference.",
        ),
    ],
)
def test_verdicts_follow_from_the_numbers(objective: list[Any], wins: list[Any], tally: str, line: str):
    pair = compared(objective, wins)
    assert tally in page.tally([pair]).replace("\n", " ")
    assert line in page.verdict(pair)


def test_names_of_variants():
    assert plots.name_of({"algorithm": "klq", "tau": 0.1}) == "KLQ, τ = 0.1"
    assert plots.name_of({"lam": 1.0}) == "λ = 1.0"
