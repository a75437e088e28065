"""Trains with vLLM on one machine, which follows the policy's weights: python examples/train_with_vllm.py [STEPS]"""

import sys
from dataclasses import replace

from klq_kernels.lab.tasks import load_task, warm_started
from klq_kernels.trainer import KLQConfig, KLQTrainer

task = replace(load_task("summarize"), hidden_size=128)  # vLLM's kernels take heads of 32 and more
args = KLQConfig(
    "klq_output",
    engine="vllm",  # in a process of its own; engine_url="http://…" samples with a running server instead
    engine_kwargs={"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20},
    max_steps=int(sys.argv[1]) if len(sys.argv) > 1 else 60,
    per_device_train_batch_size=64,
    learning_rate=2e-4,
    max_completion_length=24,
    bootstrap_truncated=False,
)
model = warm_started(task, steps=200)
dataset = task.dataset("train", 256)
trainer = KLQTrainer(model, task.reward_funcs, args, train_dataset=dataset, processing_class=task.tokenizer())
trainer.train()
for logs in trainer.state.log_history:
    if "rollout/sampler_kl" in logs:
        names = ("objective/scores", "rollout/sampler_kl", "time/rollout", "time/score", "time/update")
        print(f"step {logs['step']}: " + ", ".join(f"{name} {logs[name]:.2g}" for name in names))
