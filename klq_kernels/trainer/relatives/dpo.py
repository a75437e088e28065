"""DPO and token-level DPO: a policy learns from pairs of completions, of which people preferred one.

The optimal policy of reward less beta KL says the reward itself, up to a constant of the prompt: r = beta sum_t lr_t
with lr_t = log pi(a_t|s_t) - log pi_ref(a_t|s_t). Preferences that follow exp(r) (Bradley and Terry) are then the
likelier, the larger u = beta (sum of chosen lr - sum of rejected lr) is, and DPO (arXiv 2305.18290, eq. 7) makes
-log sigmoid(u) small. Token by token beta lr_t is an advantage (arXiv 2404.12358): DPO is Q-learning on whole
sequences, without a critic.

TDPO (arXiv 2404.11999) starts from preferences that follow sums of advantages, where the prompt's constant becomes a
divergence along each completion, D = sum_t KL(pi_ref(.|s_t) || pi(.|s_t)), exact over the vocabulary (``linear_kl``):

    dpo     -log sigmoid(u)
    tdpo1   -log sigmoid(u - beta (D_rejected - D_chosen))
    tdpo2   -log sigmoid(u - alpha beta (D_rejected - sg D_chosen))

``reference.dpo_loss`` and ``reference.tdpo_loss`` state them. A micro-batch is one pass over chosen and rejected
completions together, and one of the reference without gradients; the logits of neither ever exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ...call.checks import require, require_number
from ...logprobs import linear_logprobs
from ...returns import reverse_scan
from .. import loading
from ..actor_critic import States, held
from ..base import BaseTrainer
from ..batches import Inputs, collate
from ..frozen import Placed, Policy, reference_policy
from ..means import Means
from ..options import DATA_LOADER, PolicyConfig, check_counts, option
from ..parts import prove_backbones, proven_policies
from ..processes import turns
from ..resuming import check_kind, check_loaded, fitting
from .divergence import check_whole, divergence
from .pairs import PairReader, check_pairs

LOSSES = ("dpo", "tdpo1", "tdpo2")
SIDES = ("chosen", "rejected")


@dataclass
class DPOConfig(PolicyConfig):
    """Arguments of ``DPOTrainer``; the defaults are the papers', where they name one.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    learning_rate: float = option(1e-6, "Initial learning rate.")
    logging_steps: float = option(10, "Log every so many optimizer steps.")

    loss: str = option("dpo", f"One of {', '.join(LOSSES)}.")
    beta: float = option(0.1, "Price of one nat of KL to the reference, in units of reward. > 0.")
    tdpo_alpha: float = option(0.5, "tdpo2: weight of the divergences. >= 0.")

    max_completion_length: int | None = option(None, "Longer completions are cut on the right.")
    ref_placement: str | None = option(
        None, "Where the reference's weights are: on the 'device', the default, or on the 'cpu' between uses."
    )

    used: ClassVar[tuple[str, ...]] = ("per_device_eval_batch_size", *DATA_LOADER)

    def __post_init__(self) -> None:
        self._check_choice("loss", LOSSES)
        self._check_choice("ref_placement", (None, "device", "cpu"))
        require_number("beta", self.beta, positive=True)
        require_number("tdpo_alpha", self.tdpo_alpha, low=0.0)
        check_counts(self, ("max_completion_length",))
        super().__post_init__()

    @property
    def alpha(self) -> float | None:
        """Of ``tdpo_loss``."""
        return self.tdpo_alpha if self.loss == "tdpo2" else None


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The loss of each pair, [P], from the sums of its log-ratios (``reference.dpo_loss``)."""
    return -F.logsigmoid(beta * (chosen - rejected))


def tdpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, beta: float, alpha: float | None
) -> Tensor:
    """The loss of each pair, [P], from those and the sums of its divergences (``reference.tdpo_loss``)."""
    excess = rejected_kl - chosen_kl if alpha is None else alpha * (rejected_kl - chosen_kl.detach())
    return -F.logsigmoid(beta * (chosen - rejected - excess))


def sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum over each sequence, [S], of packed numbers [N]; each sequence has one at least."""
    return reverse_scan(x, 1.0, cu_seqlens=cu_seqlens)[cu_seqlens[:-1].long()]


def pair_losses(
    states: States, inputs: Inputs, reference: States, config: DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss of each pair, [P]; for the log, what each pair says, [P] each) of 2P sequences, the chosen ones first.

    ``reference`` are the reference's states and head at the same tokens.
    """

    def of_taken(policy: States) -> Tensor:
        taken = linear_logprobs(
            policy.hidden, **policy.head._asdict(), actions=inputs.actions, cu_seqlens=inputs.cu_seqlens,
            logits_dtype=config.logits_dtype, workspace_bytes=config.workspace_bytes,
        ).logprobs  # fmt: skip
        return sums(taken, inputs.cu_seqlens)

    logps = of_taken(states)
    ratios = logps - of_taken(reference)
    chosen, rejected = ratios.chunk(2)
    seen = {"logps": logps.detach(), "rewards": config.beta * ratios.detach()}
    if config.loss == "dpo":
        losses = dpo_loss(chosen, rejected, config.beta)
    else:
        kl = sums(divergence(states, reference, inputs, config, "reverse"), inputs.cu_seqlens)
        chosen_kl, rejected_kl = kl.chunk(2)
        losses = tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, config.beta, config.alpha)
        seen["kl"] = kl.detach()
    said = {f"{n}/{side}": x for n, both in seen.items() for side, x in zip(SIDES, both.chunk(2), strict=True)}
    margins = said["rewards/chosen"] - said["rewards/rejected"]
    return losses, {**said, "rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}


class TrainedPolicy(Policy):
    """The module that is trained."""

    accepts_loss_kwargs = False
    main_input_name = "input_ids"

    @property
    def config(self) -> Any:
        return self.model.config

    # transformers renames this in version 5; each name goes on to the same one of the model inside

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self._checkpoint("activation_checkpointing_enable", **kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self._checkpoint("gradient_checkpointing_enable", **kwargs)

    def _checkpoint(self, method: str, **kwargs: Any) -> None:
        model: Any = self.model
        getattr(model, method)(**kwargs)
        if self.language_model.is_peft:  # frozen embeddings: without it no gradient would enter the checkpoints
            model.enable_input_require_grads()


class DPOTrainer(BaseTrainer):
    """Trains a causal language model on preferences, by DPO or TDPO.

    Args:
        model: the policy: a causal LM, a PEFT model, a path or a hub id.
        args: ``DPOConfig``.
        train_dataset: columns ``prompt``, ``chosen`` and ``rejected`` (``pairs``).
        eval_dataset: likewise, for ``evaluate``.
        processing_class: the tokenizer; by default the one saved with the model.
        ref_model: the frozen reference; by default the policy as it is now (its base model where adapters are trained).
        peft_config: makes the policy a PEFT model.
        callbacks, optimizers: as in ``transformers.Trainer``.

    Raises:
        ValueError: naming the argument that does not fit, and what would.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | nn.Module | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = DPOConfig("dpo_output") if args is None else args
        require(isinstance(args, DPOConfig), "args", f"must be a DPOConfig, got {type(args).__name__}")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None or name == "train_dataset":
                loading.check_dataset(name, dataset)
                check_pairs(name, dataset)
        policy = loading.causal_lm(model, args)
        tokenizer = loading.tokenizer(processing_class, policy)
        require(tokenizer.eos_token_id is not None, "processing_class", "needs an EOS token, which ends completions")
        policies = proven_policies(
            policy, None if ref_model is None else loading.causal_lm(ref_model, args), tokenizer=tokenizer,
            peft_config=peft_config, temperature=1.0,
            ref_dtype=args.torch_ref_dtype,
        )  # fmt: skip
        trained = TrainedPolicy(policies.language_model.model)
        reading = prove_backbones(
            trained, {"model": policies.language_model.backbone}, policies, disable_dropout=args.disable_dropout,
            padding_free=args.padding_free,
        )  # fmt: skip
        super().__init__(
            model=trained,
            args=args,
            data_collator=list,  # a batch of pairs is the list of their rows
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.args: DPOConfig
        check_whole(self.accelerator, "args", "KLQTrainer")
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the pairs of a micro-batch
        self.tokenizer, self.padding_free = tokenizer, reading.padding_free
        self.reference = None
        if policies.reference is not None:
            self.reference = Placed(policies.reference, args.ref_placement, self.accelerator, "ref_placement")
        self.reader = PairReader(
            tokenizer, policies.language_model.vocab_size, max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length, template=args.chat_template_kwargs,  # type: ignore[arg-type]
            positions=reading.positions,
        )  # fmt: skip
        self.reader.sequences([train_dataset[0]])  # complains now of what it cannot read

    @property
    def trained_policy(self) -> TrainedPolicy:
        """The module that is trained, out of whatever wraps it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def policy(self) -> Any:
        """The language model that is trained (with its adapters, if it has any), a ``PreTrainedModel``."""
        return self.trained_policy.model

    # ---- updates ------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the pairs of a micro-batch, of its rows."""
        losses, said = self._losses(model, inputs)
        self.means.add({name: x.mean() for name, x in said.items()}, len(losses))
        return (losses.mean(), said) if return_outputs else losses.mean()

    def _losses(self, model: nn.Module, rows: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
        pad: Any = self.tokenizer.pad_token_id
        batch = collate(self.reader.sequences(rows), pad_id=pad, padding_free=self.padding_free).to(self.args.device)
        with self._reference_states(batch) as reference:
            objective = partial(pair_losses, inputs=batch, reference=reference, config=self.args)
            return model(batch, objective)

    @contextmanager
    def _reference_states(self, batch: Inputs) -> Iterator[States]:
        policy = self.trained_policy
        was_training = policy.training
        with reference_policy(self.reference, policy, policy.language_model) as reference:
            policy.eval()
            try:
                with torch.no_grad(), self.accelerator.autocast():
                    states = reference(batch, held)
            finally:
                policy.train(was_training)
            yield states

    # ---- held-out pairs -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """``eval_loss`` and the means that training logs, over held-out pairs; the same on any number of processes."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            return self._evaluate_each(data, ignore_keys, metric_key_prefix)
        loading.check_dataset("eval_dataset", data)
        check_pairs("eval_dataset", data)
        means, accelerator, policy = Means(), self.accelerator, self.trained_policy
        size, processes = self.args.per_device_eval_batch_size, accelerator.num_processes
        was_training = policy.training
        policy.eval()
        for turn in turns(len(data), size, process=accelerator.process_index, processes=processes):
            with accelerator.autocast():
                losses, said = self._losses(policy, [data[i] for i in turn.rows])
            count = len(losses) if turn.kept else 0
            means.add({"loss": losses.mean(), **{name: x.mean() for name, x in said.items()}}, count)
        policy.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.drain(accelerator).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy as ``from_pretrained`` reads it, and its tokenizer."""
        folder = Path(str(output_dir or self.args.output_dir))
        self.policy.save_pretrained(folder)
        self._save_beside(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_kind(resume_from_checkpoint, adapters=self.trained_policy.language_model.is_peft)
        with fitting():
            super()._load_from_checkpoint(resume_from_checkpoint, self.policy)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_loaded(self.policy, load_result)
