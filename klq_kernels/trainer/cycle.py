"""One cycle: prompts, rollout, rewards, scoring. ``KLQTrainer`` inherits it and adds transformers' loop.

    rollout       a completion for each prompt, sampled from the policy (``rollout``), or a cycle ago (``ahead``)
    rewards       a score for each completion (``rewards``)
    scoring       one pass per sequence over policy and reference: old log-probs, reference log-probs, values
                  (``objectives.score``)
    targets       lambda-errors from them (``targets``)

The result is an ``Experience``, from which the updates of the cycle learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call.checks import require
from ..types import KLQTargets
from . import sharding
from .actor_critic import ActorCritic, Objective, States, held
from .ahead import Ahead, aged
from .base import BaseTrainer
from .batches import Inputs, Sequence, collate
from .completions_log import CompletionsLog
from .config import KLQConfig
from .demonstrations import Demonstrations, naming_them, without_completion
from .experience import Experience
from .frozen import Placed, reference_policy
from .means import Means
from .models import LanguageModel
from .objectives import Scored, logprobs, score
from .replay import Memory, Sampled
from .rewards import Rewards, Scores, scores_of
from .rollout import (
    Completions,
    Rollout,
    RolloutFunction,
    ask,
    ask_ahead,
    check_completions,
    eos_ids,
    generate,
    prompt_ids,
)
from .running import Running
from .seeds import Purpose, derived_seed, seeded
from .statistics import add_cycle, add_demonstrations, add_rewards, add_sampler
from .targets import lambda_errors


class Cycle(BaseTrainer):
    """The parts of a cycle, as methods of the trainer; its attributes are those that the parts read."""

    args: KLQConfig
    accelerator: Any
    state: Any  # of transformers' loop: ``global_step``, ``max_steps``
    tokenizer: Any
    reference: Placed | None  # a FrozenPolicy; None: the policy without its adapters
    rewards: Rewards
    rollout_func: RolloutFunction | None
    generation_config: Any
    padding_free: bool  # concatenates sequences instead of padding them
    positions: int | None  # that the models have learned
    means: Means
    memory: Memory  # of earlier cycles
    ahead: Ahead  # what is sampled for the next cycle
    demonstrations: Demonstrations | None
    episodes: int
    running: dict[str, Running]  # spreads of "scores" and of lambda-"errors"
    completions_log: CompletionsLog | None

    @property
    def actor_critic(self) -> ActorCritic:
        """The module that is trained, out of whatever wraps it."""
        raise NotImplementedError

    @property
    def language_model(self) -> LanguageModel:
        return self.actor_critic.language_model

    @property
    def policy(self) -> Any:
        """The language model that is trained (with its adapters, if it has any), a ``PreTrainedModel``."""
        return self.actor_critic.policy

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the policy for an engine: whole, adapters merged, by the base model's own names, one at a
        time (``export.whole_weights``). All processes must go through it together where weights are sharded.
        """
        return self.language_model.weights()

    @property
    def cycle(self) -> int:
        """Cycles finished so far."""
        return self.state.global_step // self.args.steps_per_cycle

    @property
    def lam(self) -> float:
        """The trace decay of this cycle, annealed where ``lam_final`` is given."""
        args = self.args
        if args.lam_final is None:
            return args.lam
        progress = min(self.state.global_step / max(self.state.max_steps - args.steps_per_cycle, 1), 1.0)
        return args.lam + (args.lam_final - args.lam) * progress

    @torch.no_grad()
    def collect(self, rows: list[dict[str, Any]]) -> Experience:
        """Samples, rewards and scores completions for rows of the dataset: the experience of a cycle."""
        with self._timed("time/rollout"):
            rollout = self._rollout_of_cycle(rows)
        rows = [row for row in rows for _ in range(self.args.num_generations)]
        with self._timed("time/reward"):
            scores = self.reward(rows, rollout)
        rollout = rollout.without(~scores.scored)
        with self._timed("time/score"):
            scored, ref_logprobs = self.score(rollout)
        sampler_logprobs = self._sampler_logprobs(rollout, scored)
        sampled = Sampled(rollout.sequences, rollout.truncated, scores.total, ref_logprobs, sampler_logprobs)
        if self.args.scale_rewards:
            earned = scores.scored & ~(rollout.truncated & self.args.bootstrap_truncated)
            self.running["scores"].update(scores.total[earned], self.accelerator)
        scored = self.with_values(scored, rollout, rows)
        experience = self._experience(sampled, scored)
        experience.step = self._step(experience.advantages)
        add_cycle(self.means, rollout, scores, scored, experience, self.args.tau * self._reward_scale)
        add_sampler(self.means, rollout, scored)
        add_rewards(self.means, scores, self.rewards.names)
        self.means.add({"lam": self.lam}, len(rollout.sequences))
        if self.completions_log is not None:
            self._log_completions(rows, rollout, scores)
        if self.args.replay_cycles:
            with self._timed("time/replay"):
                experience = self._with_replays(experience, sampled)
        experience.advantages = self._weighted(experience.advantages)
        return experience

    def _experience(self, sampled: Sampled, scored: Scored, *, grouped: bool = True) -> Experience:
        """What is learnt of completions that have been scored; the advantages are not weighted yet."""
        targets, errors = self._errors(sampled, scored, grouped=grouped)
        return Experience(
            sampled.sequences, targets, sampled.ref_logprobs, errors, sampler_logprobs=sampled.sampler_logprobs
        )

    def _with_replays(self, experience: Experience, sampled: Sampled) -> Experience:
        """A cycle's experience, followed by that of as many completions drawn from the memory for each pass over them.

        Where there are demonstrations they are a part of those. The cycle itself is remembered for the next ones; at
        first, where there are no others, it is drawn from.
        """
        args, fresh = self.args, experience
        seed = derived_seed(args.seed, Purpose.REPLAY, self.cycle, args.process_index)
        generator = torch.Generator().manual_seed(seed)
        prompts = len(sampled.sequences) // args.num_generations
        first = len(self.memory) < prompts
        if first:
            self.memory.add(sampled, fresh.advantages, self.cycle)
        shown = 0 if self.demonstrations is None else self.demonstrations.number // args.num_generations
        for turn in range(args.replay_passes):
            if shown < prompts:
                experience = experience.followed_by(self._replayed(prompts - shown, generator))
            if shown:
                experience = experience.followed_by(self._demonstrated(turn))
        if not first:
            self.memory.add(sampled, fresh.advantages, self.cycle)
        return experience

    def _replayed(self, prompts: int, generator: torch.Generator) -> Experience:
        """The completions of so many prompts of the memory, read anew."""
        places = self.memory.draw(prompts, generator, prioritised=self.args.replay_priority == "error")
        again, cycles = self.memory.take(places)
        again = again.to(self.args.device)
        scored = self.rescore(again.sequences)
        replayed = self._experience(again, scored)
        self.memory.refresh(places, replayed.advantages, again.rows)
        assert again.sampler_logprobs is not None
        self.means.add({"replay/age": (self.cycle - cycles).double().mean()}, len(cycles))
        self.means.add_effective("replay/ess", (scored.logprobs - again.sampler_logprobs).double().exp())
        return replayed

    def _demonstrated(self, turn: int) -> Experience:
        """What is learnt of demonstrations; each is the only completion of its prompt, so no group is a baseline."""
        assert self.demonstrations is not None
        rows = self.demonstrations.rows(self.cycle, turn)
        rollout = self.demonstrations.rollout(rows)
        with naming_them():
            scores = self.reward([without_completion(row) for row in rows], rollout)
        rollout = rollout.without(~scores.scored)
        scored, ref_logprobs = self.score(rollout)
        assert rollout.sampler_logprobs is not None
        sampler_logprobs = rollout.sampler_logprobs.to(self.args.device)
        add_demonstrations(self.means, scores, scored)
        shown = Sampled(rollout.sequences, rollout.truncated, scores.total, ref_logprobs, sampler_logprobs)
        return self._experience(shown, scored, grouped=False)

    def _rollout_of_cycle(self, rows: list[dict[str, Any]]) -> Rollout:
        """The completions of this cycle; with ``async_rollouts`` it begins on those of the next one as well."""
        number = self.args.num_generations
        if not self.args.async_rollouts:
            return self.roll_out(rows, self._rollout_seed(self.cycle), number)
        rollout = self.ahead.take(self._prompts(rows, number), self.cycle)
        if rollout is None:
            rollout = aged(self.roll_out(rows, self._rollout_seed(self.cycle), number), 0.0)
        self._sample_ahead(self.cycle + 1)
        return rollout

    def _sample_ahead(self, cycle: int) -> None:
        """Begins on the completions of a cycle, under the weights of now, if the run has such a cycle."""
        if cycle * self.args.steps_per_cycle >= self.state.max_steps:
            return
        number, rows = self.args.num_generations, self.rows_of(cycle)
        with seeded(self._rollout_seed(cycle), self.args.device), self._inference():
            sample = ask_ahead(self.rollout_func, rows, number, self)
        self.ahead.submit(sample, self._prompts(rows, number), cycle)

    def rows_of(self, cycle: int) -> list[dict[str, Any]]:
        """This process's rows of the dataset in a cycle of the run."""
        raise NotImplementedError

    def _rollout_seed(self, cycle: int) -> int:
        return derived_seed(self.args.seed, Purpose.ROLLOUT, cycle, self.args.process_index)

    def _prompts(self, rows: list[dict[str, Any]], number: int) -> list[list[int]]:
        return [ids for row in rows for ids in [self.tokenize(row["prompt"])] * number]

    def roll_out(self, rows: list[dict[str, Any]], seed: int, number: int = 1) -> Rollout:
        """``number`` completions for each row's prompt, one row after another, of the policy as it is."""
        if self.args.async_rollouts:
            self.ahead.wait()
        prompts = self._prompts(rows, number)
        with seeded(seed, self.args.device), self._inference() as model:
            if self.rollout_func is None:
                with sharding.whole(self.accelerator, model):
                    completions = generate(
                        model, prompts, self.generation_config,
                        batch_size=self.args.rollout_forward_batch_size, device=self.args.device,
                        positions=self.positions,
                    )  # fmt: skip
            else:
                completions = ask(self.rollout_func, rows, number, self)
        return self.check(completions, prompts)

    def check(self, completions: Completions, prompts: list[list[int]]) -> Rollout:
        """``check_completions`` for this policy."""
        ends, vocab = eos_ids(self.generation_config), self.language_model.vocab_size
        return check_completions(completions, prompts, ends, vocab, self.positions)

    @contextmanager
    def _inference(self) -> Iterator[ActorCritic]:
        """The module without dropout and gradients, computing (as does the reference) in the precision of training.

        Rollout and scoring share it, so that samples and old log-probabilities are those of one policy.
        """
        model = self.actor_critic
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield model
        finally:
            model.train(was_training)

    def tokenize(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, by the chat template where it is a chat, cut to ``max_prompt_length``."""
        args, vocab = self.args, self.language_model.vocab_size
        template, longest = args.chat_template_kwargs, args.max_prompt_length
        return prompt_ids(prompt, self.tokenizer, vocab, template=template, longest=longest)

    def reward(self, rows: list[dict[str, Any]], rollout: Rollout) -> Scores:
        """Scores by the reward functions, with the penalty for completions that did not end."""
        ids = [s.completion.tolist() for s in rollout.sequences]
        scores = scores_of(self.rewards, self.tokenizer, rows, ids, self.state)
        if self.args.missing_eos_penalty is not None:
            scores = scores._replace(total=scores.total - self.args.missing_eos_penalty * rollout.truncated)
        return scores

    def score(self, rollout: Rollout) -> tuple[Scored, Tensor]:
        """(what the policy and the value function say of a rollout, log-probs under the reference), packed."""
        passes, references = [], []
        with self._inference() as model, self._reference(model) as reference:
            for batch in self._batches(rollout.sequences):
                passes.append(model(batch, partial(score, inputs=batch, config=self.args)))
                references.append(reference(batch, partial(logprobs, inputs=batch, config=self.args)).logprobs)
        return Scored(*(torch.cat(column) for column in zip(*passes, strict=True))), torch.cat(references)

    def with_values(self, scored: Scored, rollout: Rollout, rows: list[dict[str, Any]]) -> Scored:
        """``scored`` with the values that targets are made of; here, those of the value function."""
        return scored

    def rescore(self, sequences: list[Sequence]) -> Scored:
        """What the policy and the value function say of completions now, packed."""
        with self._inference() as model:
            passes = [model(b, partial(score, inputs=b, config=self.args)) for b in self._batches(sequences)]
        return Scored(*(torch.cat(column) for column in zip(*passes, strict=True)))

    def _batches(self, sequences: list[Sequence]) -> Iterator[Inputs]:
        size = self.args.rollout_forward_batch_size
        for begin in range(0, len(sequences), size):
            yield self.collate(sequences[begin : begin + size])

    def reference_states(self, batch: Inputs) -> States:
        """The reference's states at the trained tokens, and its head: for divergences over the whole vocabulary.

        Its weights must be whole on this process.
        """
        with self._inference() as model, self._reference(model) as reference:
            return reference(batch, held)

    def _reference(self, model: ActorCritic) -> AbstractContextManager[Callable[[Inputs, Objective], Any]]:
        return reference_policy(self.reference, model, model.language_model)

    def collate(self, sequences: list[Any]) -> Inputs:
        pad: Any = self.tokenizer.pad_token_id
        return collate(sequences, pad_id=pad, padding_free=self.padding_free).to(self.args.device)

    def _sampler_logprobs(self, rollout: Rollout, scored: Scored) -> Tensor | None:
        """Those of the policy that sampled, fp32 [N], where they are to be corrected for."""
        if self.args.off_policy == "none":
            return None
        if self.rollout_func is None:
            return scored.logprobs
        require(
            rollout.sampler_logprobs is not None,
            "off_policy",
            "'retrace' needs the log-probabilities of the policy that sampled, and the Completions that rollout_func "
            "returned have no logprobs; give them, or set off_policy='none'",
        )
        assert rollout.sampler_logprobs is not None
        return rollout.sampler_logprobs.to(self.args.device)

    def _errors(self, sampled: Sampled, scored: Scored, *, grouped: bool) -> tuple[KLQTargets, Tensor]:
        """``targets.lambda_errors``. A completion that was cut off earns V of its last state in place of a score."""
        device = scored.logprobs.device
        cut = sampled.truncated.to(device) & self.args.bootstrap_truncated
        total = torch.where(cut, -(self.args.missing_eos_penalty or 0.0), sampled.scores.to(device))
        total = self._rescaled(total)
        return lambda_errors(
            scored, sampled.ref_logprobs, sampled.sampler_logprobs, total, cut, sampled.rows, self.args, self.lam,
            grouped=grouped,
        )  # fmt: skip

    def _rescaled(self, scores: Tensor) -> Tensor:
        """Scores [S] in units of their running deviation, and clipped, as far as the arguments say so."""
        args = self.args
        if args.scale_rewards:
            scores = scores / self._reward_scale
            self.means.add({"objective/reward_scale": self._reward_scale}, len(scores))
        return scores if args.reward_clip is None else scores.clamp(-args.reward_clip, args.reward_clip)

    @property
    def _reward_scale(self) -> float:
        """What scores are divided by, so that a nat costs tau times as much of them; 1 where they do not vary."""
        deviation = self.running["scores"].deviation if self.args.scale_rewards else 1.0
        return deviation if deviation > 1e-8 else 1.0

    def _step(self, errors: Tensor) -> float:
        """The share of alpha that is taken where the running spread of lambda-errors is too large."""
        largest = self.args.advantage_spread
        if self.args.is_ppo or largest is None:
            return 1.0
        self.running["errors"].update(errors, self.accelerator)
        step = min(1.0, largest / max(self.running["errors"].rms, 1e-30))
        self.means.add({"loss/step": step}, len(errors))
        return step

    def _weighted(self, advantages: Tensor) -> Tensor:
        """Advantages as the objective takes them: whitened over all processes for PPO, as they are for KLQ."""
        if not self.args.is_ppo or not self.args.whiten_advantages:
            return advantages
        moments = torch.stack([torch.ones_like(advantages), advantages, advantages.square()]).double().sum(1)
        count, total, squares = self.accelerator.reduce(moments, reduction="sum")
        mean = total / count.clamp(min=1)
        deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        return ((advantages - mean) / (deviation + 1e-8)).float()

    def _log_completions(self, rows: list[dict[str, Any]], rollout: Rollout, scores: Scores) -> None:
        assert self.completions_log is not None
        texts = self.tokenizer.batch_decode([s.completion.tolist() for s in rollout.sequences])
        self.completions_log.add(
            self.state.global_step, [row["prompt"] for row in rows], texts, scores, self.rewards.names
        )
