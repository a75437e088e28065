"""``klq experiment``: the paper's first experiments on the built-in tasks, on a CPU, in minutes.

spec, configs/    an experiment as a YAML file, and the jobs that follow from it
job               one job, and its file
train             what most jobs do: train a policy and measure it
equivalence       ... compare the gradients of KLQ and of PPO
timing            ... take the times of their updates
noise             ... measure what a sampled gradient adds to the noise of a mini-batch
demo_loop         ... train the demonstration's policy in its own loop
stale             an engine that is some cycles behind
methods           ... train a guide or a policy, and measure it at several prices of a nat
optimizers        optimisers that treat the head in another way than the rest
pool              jobs side by side, each in a process of its own
statistics        means with confidence intervals
analysis          from the jobs' files to ``results.json``
plots, page       pictures and words, from ``results.json`` alone
walkthrough       all of it, from start to end; what is done is not done again
"""

from __future__ import annotations

from .spec import GROUPS, NAMES
from .walkthrough import run

__all__ = ["GROUPS", "NAMES", "run"]
