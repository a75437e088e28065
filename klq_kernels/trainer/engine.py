"""A rollout function that samples with an engine which follows the policy's weights.

Before the first completions the engine is started and its model compared with the policy: entries of the configuration,
and then the log-probabilities that both give the same tokens. Whenever the policy has changed, the engine gets all of
its weights, adapters merged. An engine that has lost them (a server that was restarted) is given them once more, and
asked again for all completions of the cycle. The seeds of a rollout follow from the cycle, so a run that is resumed
asks for the same completions.

Of several processes all fail where one does, and all start again where the weights are lost; ``together`` keeps them in
step between the calls that wait for the others.
"""

from __future__ import annotations

import copy
import uuid
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..call.checks import require, require_number
from ..engines import Engine, EngineError, Facts, Model, Request, VLLMProcess, VLLMServer, WeightsLost
from ..engines.protocol import SHAPE
from .config import KLQConfig
from .processes import anywhere, together
from .rollout import Completions, RolloutContext, check_completions, eos_ids

TOLERANCE = 0.05  # nats per token; 16-bit engines are about 0.02 off
PROBES = 4  # completions that are compared


class EngineRollout:
    """Samples with an engine; pass it as ``rollout_func``, or name the engine in ``KLQConfig``.

    Args:
        engine: a ``klq_kernels.engines.Engine``. It is stopped with ``stop``, or at the end of the program.
        tolerance: largest mean difference, in nats per token, between the log-probabilities of the engine and those of
            the policy for the same tokens, under the same weights.
    """

    def __init__(self, engine: Engine, *, tolerance: float = TOLERANCE) -> None:
        require_number("tolerance", tolerance, positive=True)
        self.engine = engine
        self.tolerance = tolerance
        self._facts: Facts | None = None
        self._run = ""
        self._updates = 0
        self._policy: Any = None  # what tells the policy that the engine has from any other
        self._stop = weakref.finalize(self, engine.stop)

    def stop(self) -> None:
        """Stops the engine; the next rollout starts it again."""
        self.engine.stop()
        self._facts = None

    def __call__(self, prompts: list[Any], trainer: RolloutContext) -> Completions:
        """A completion for each prompt, with the engine's log-probabilities.

        Raises:
            ValueError: where the engine serves another model than the policy, or prompts are too long for it.
            EngineError: where it fails; of several processes in all, whichever of them it failed.
        """
        request = request_for(prompts, trainer)
        self._prepare(request, trainer)
        try:
            with together(trainer.accelerator):
                return self._sample(request, self._version)
        except WeightsLost:
            self._prepare(request, trainer)
            with together(trainer.accelerator):
                return self._sample(request, self._version)

    def begin(self, prompts: list[Any], trainer: RolloutContext) -> Callable[[], Completions]:
        """What samples, in another thread, a completion for each prompt under the policy's weights of now.

        Raises:
            ValueError, EngineError: as a call does. What it returns raises an EngineError where the engine fails.
        """
        request = request_for(prompts, trainer)
        self._prepare(request, trainer)
        return partial(self._sample, request, self._version)

    def _prepare(self, request: Request, trainer: RolloutContext) -> None:
        """Sees to it that the engine runs and has the policy's weights."""
        try:
            if anywhere(trainer.accelerator, self._facts is None):
                self._start(trainer, request)
            with together(trainer.accelerator):  # also: no process waits for completions any more
                assert self._facts is not None
                check_length(request, self._facts.max_length)
            self._follow(trainer)
        except EngineError:
            self._facts = None  # another attempt starts the engine anew
            raise

    def _sample(self, request: Request, version: str) -> Completions:
        try:
            generated = self.engine.generate(request, version)
        except EngineError:
            self._facts = None
            raise
        return Completions(generated.completion_ids, request.prompt_ids, logprobs=generated.logprobs)

    # ---- the weights --------------------------------------------------------------------------------------------

    def _follow(self, trainer: RolloutContext) -> None:
        """Gives the engine the policy's weights unless it has them."""
        policy = state_of(trainer)
        if not anywhere(trainer.accelerator, policy != self._policy):
            return
        self._updates += 1
        self._policy = None  # until the engine has them all
        with together(trainer.accelerator):
            self._give(trainer)
        self._policy = policy

    def _give(self, trainer: RolloutContext) -> None:
        weights = trainer.policy_weights()
        try:
            if trainer.accelerator.is_main_process or not self.engine.shared:
                self.engine.take_weights(weights, self._version)
        finally:
            for _ in weights:  # sharded weights are gathered by all processes together, also where one has failed
                pass

    @property
    def _version(self) -> str:
        return f"{self._run}-{self._updates}"

    # ---- whether it is the policy that is served ----------------------------------------------------------------

    def _start(self, trainer: RolloutContext, request: Request) -> None:
        """Starts the engine, gives it the policy's weights, and compares the two."""
        run = [uuid.uuid4().hex[:8]]
        broadcast_object_list(run)
        self._run, self._updates, self._policy = run[0], 0, None
        self._facts = None
        model = served_model(trainer)
        with together(trainer.accelerator):
            facts = self.engine.start(model)
            check_shape(model.config, facts)
        self._follow(trainer)
        self._compare(trainer, probe_of(request, facts.max_length))
        self._facts = facts

    def _compare(self, trainer: RolloutContext, probe: Request) -> None:
        ends = eos_ids(trainer.generation_config)
        vocab = trainer.policy.config.get_text_config().vocab_size
        with together(trainer.accelerator):
            rollout = check_completions(self._sample(probe, self._version), probe.prompt_ids, ends, vocab)
        theirs = rollout.sampler_logprobs
        assert theirs is not None
        ours = trainer.rescore(rollout.sequences).logprobs.cpu()
        distance = (ours - theirs).abs().mean().item() if len(ours) else 0.0
        with together(trainer.accelerator):
            require(
                distance <= self.tolerance,
                "engine",
                f"its log-probabilities are {distance:.3g} nats per token from the policy's, under the policy's "
                f"weights (tolerance {self.tolerance:g}): it serves another model, computes in another precision or at "
                "another temperature, or did not load all weights; serve the model that is trained, in the precision "
                "of training",
            )


def request_for(prompts: list[Any], trainer: RolloutContext) -> Request:
    """What an engine is asked; the seeds are drawn from the generator that the trainer seeds for each rollout."""
    prompt_ids = [trainer.tokenize(prompt) for prompt in prompts]
    return requested(trainer.generation_config, prompt_ids, torch.randint(2**31, (len(prompts),)).tolist())


def requested(generation: Any, prompt_ids: list[list[int]], seeds: list[int]) -> Request:
    """What an engine is asked, by the trainer's ``GenerationConfig``."""
    return Request(
        prompt_ids,
        seeds,
        max_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        stop_ids=tuple(sorted(eos_ids(generation))),
        top_k=generation.top_k or 0,
        top_p=1.0 if generation.top_p is None else generation.top_p,
        min_p=generation.min_p or 0.0,
        repetition_penalty=generation.repetition_penalty or 1.0,
    )


def probe_of(request: Request, max_length: int) -> Request:
    """A few short completions of the same prompts, from the whole distribution, of which the policy knows too."""
    prompts = [ids[: max_length // 2] for ids in request.prompt_ids[:PROBES]]
    return Request(
        prompts,
        list(range(len(prompts))),
        max_tokens=min(request.max_tokens, 16, max_length // 2),
        temperature=request.temperature,
        stop_ids=request.stop_ids,
    )


def check_length(request: Request, max_length: int) -> None:
    """Raises a ValueError where a completion could be longer than the engine takes, which would cut it off unsaid."""
    longest = max(map(len, request.prompt_ids))
    require(
        longest + request.max_tokens <= max_length,
        "engine",
        f"takes {max_length} tokens at most, and a prompt of {longest} with a completion of {request.max_tokens} is "
        "longer: set max_prompt_length or max_completion_length lower, or max_model_len (engine_kwargs) higher",
    )


def check_shape(config: Any, facts: Facts) -> None:
    """Raises a ValueError where an engine's model has another configuration than the policy."""
    own = config.get_text_config()
    served = facts.config
    for name in SHAPE:
        ours, theirs = getattr(own, name, None), served.get(name)
        require(
            ours is None or theirs is None or ours == theirs,
            "engine",
            f"serves a model with {name}={theirs}, and the policy has {name}={ours}: serve the model that is trained"
            + (" (save it after its vocabulary was changed, and serve that)" if name == "vocab_size" else ""),
        )


def served_model(trainer: RolloutContext) -> Model:
    """The policy, without adapters, in the precision of training."""
    args, policy = trainer.args, trainer.policy
    config = copy.deepcopy(policy.config)
    if config.architectures is None:  # a model that was never saved
        base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        config.architectures = [type(base).__name__.removeprefix("FSDP")]
    trained = next(policy.parameters()).dtype
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trained
    return Model(config, str(dtype).removeprefix("torch."), str(args.device))


def state_of(trainer: RolloutContext) -> tuple[Any, ...]:
    """Differs between any two states of the policy: the step, how often its weights were written to, and their sums.

    The sums are looked at because fused optimizers write without a trace in PyTorch's counters, and steps are counted
    anew in each run of a trainer. Of sharded weights they are those of this process's part.
    """
    parameters = list(trainer.policy.parameters())
    held = [getattr(p, "ds_tensor", p).detach() for p in parameters]  # ZeRO-3 keeps its part there
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in held]
    written = sum(p._version for p in parameters)
    return (
        trainer.state.global_step,
        written,
        sum(map(id, parameters)),
        tuple(float(p.sum(dtype=torch.float64)) for p in parts),
    )


def engine_of(args: KLQConfig) -> EngineRollout | None:
    """The rollout function that the arguments name; None for the trainer's own sampling."""
    if args.engine == "transformers":
        return None
    options: dict[str, Any] = dict(args.engine_kwargs or {})  # type: ignore[arg-type]  # parsed where it was JSON
    if args.engine_url is not None:
        return EngineRollout(VLLMServer(args.engine_url, timeout=args.engine_timeout, **options))
    log = Path(str(args.output_dir)) / f"vllm_{args.process_index}.log"
    return EngineRollout(VLLMProcess(timeout=args.engine_timeout, **{"log": log, **options}))
