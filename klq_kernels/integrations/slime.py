"""slime: an advantage function and a loss, named by path on its command line.

    --custom-advantage-function-path klq_slime.advantages
    --loss-type custom_loss --custom-loss-function-path klq_slime.loss

    # klq_slime.py
    from klq_kernels.integrations.slime import klq_functions
    advantages, loss = klq_functions(tau=0.05)

slime gives both functions lists with one tensor [R] a sample, R tokens of response. The advantage function has the
critic's values and the reference's log-probabilities, so it is ``klq_targets`` as it stands. slime's own KL coefficient
(``--kl-coef``) has to be above 0 for those to be computed, and plays no other part. ``objective`` says what the loss
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call.checks import require
from ..returns import klq_targets
from .objective import Objective, weights_of

Advantages = Callable[[Any, dict[str, Any]], None]
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def klq_functions(
    *,
    tau: float = 0.05,
    alpha: float = 1.0,
    loss_type: str = "l2",
    huber_delta: float = 1.0,
    value_clip: float = 0.2,
    log_ratio_clip: float = 0.2,
) -> tuple[Advantages, Loss]:
    """The two functions that slime loads, for the settings of ``klq_loss``; gamma and lambda are slime's.

    Both raise a ValueError where slime splits the vocabulary or the sequences over processes.
    """
    objective = Objective(tau, alpha, loss_type, huber_delta, value_clip, log_ratio_clip)

    def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
        """Sets rollout_data["advantages"] and ["returns"], lists of [R]."""
        _require_whole(args, "context_parallel_size")
        _require_off(args, "normalize_advantages", "slime whitens after this function, and KLQ's A has rewards' unit")
        _require_off(args, "use_opd", "slime takes another penalty off the advantages after this function")
        name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
        for needed in (name, "ref_log_probs", "values", "rewards", "loss_masks"):
            require(
                rollout_data.get(needed) is not None,
                needed,
                "KLQ needs it in slime's rollout data; run with a critic, and with --kl-coef above 0, without which "
                "slime computes no reference log-probabilities",
            )
        columns = [rollout_data[key] for key in (name, "ref_log_probs", "values", "loss_masks")]
        logprobs, ref_logprobs, values, mask = (torch.cat(list(column)) for column in columns)
        lengths = [len(sample) for sample in columns[0]]
        found = klq_targets(
            logprobs, ref_logprobs, values,
            torch.as_tensor(rollout_data["rewards"], dtype=torch.float32, device=logprobs.device),
            tau=tau, gamma=args.gamma, lam=args.lambd, mask=mask.bool(), cu_seqlens=_ends(lengths, logprobs.device),
        )  # fmt: skip
        rollout_data["advantages"] = list(found.advantages.split(lengths))
        rollout_data["returns"] = list((found.advantages + found.old_values).split(lengths))

    def loss(args: Any, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """slime's call: (args, [parallel_state,] batch, logits [1, T, V], reducer of per-token values)."""
        require(len(rest) in (3, 4), "loss", f"slime calls it with 4 or 5 arguments, got {1 + len(rest)}")
        batch, logits, reduce = rest[-3:]
        for name in ("tensor_model_parallel_size", "context_parallel_size"):
            _require_whole(args, name)
        layout = getattr(args, "qkv_format", "thd")
        require(layout == "thd", "qkv_format", f"must be thd: other layouts pad between samples; got {layout!r}")
        for name in ("use_tis", "use_opsm", "entropy_coef"):
            _require_off(args, name, "a custom loss takes its place in slime, and KLQ's has no such part")
        if getattr(args, "use_kl_loss", False):
            _require_off(args, "kl_loss_coef", "KLQ's penalty is in the advantages")
        logprobs = _logprobs(logits, batch, args.rollout_temperature)
        name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
        old, advantage, mask = (torch.cat(list(batch[key])) for key in (name, "advantages", "loss_masks"))
        found = objective.loss(
            logprobs[None], old[None], advantage[None], mask[None], weights=weights_of(reduce, logprobs)[None],
            denom=1.0,
        )  # fmt: skip
        return found.loss, {f"klq_{key}": value for key, value in found.metrics.items()} | {"loss": found.loss.detach()}

    return advantages, loss


def _logprobs(logits: Tensor, batch: dict[str, Any], temperature: float) -> Tensor:
    """Log-probabilities [sum of R] of the response tokens of samples that lie behind one another in [1, T, V]."""
    found, end = [], 0
    for tokens, total, response in zip(
        batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
    ):
        end += total
        rows = logits[0, end - response - 1 : end - 1].float() / temperature
        found.append(-F.cross_entropy(rows, tokens[-response:], reduction="none"))
    return torch.cat(found)


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)


def _require_whole(args: Any, name: str) -> None:
    size = getattr(args, name, 1)
    require(size == 1, name, f"must be 1 for KLQ, whose functions see one process's part alone; got {size}")


def _require_off(args: Any, name: str, reason: str) -> None:
    value = getattr(args, name, False)
    require(not value, name, f"must be off for KLQ ({reason}); got {value!r}")
