"""How a model is trained, on how many GPUs, and which combinations of options are possible.

GPUs are ordered as PyTorch's meshes are: ``tp`` neighbours share every matrix product (tensor parallel), ``cp`` such
groups share the time of the same sequences (context parallel), and what remains has batches of its own. So ``tp``
ranks hold different parameters, and all others, R = gpus / tp, hold the same ones: over these R ranks the weights are
copied (``ddp``) or sharded (``fsdp2``, ``zero1`` to ``zero3``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...call.checks import require
from ...call.head import MOST_SAMPLES
from .shapes import Model

OPTIMIZER_BYTES = {  # state per trained parameter, besides an fp32 master copy where the weights are 16-bit
    "adamw": 8,
    "adamw-8bit": 2,
    "sgd-momentum": 4,
    "sgd": 0,
}
SHARDS = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
HEADS = ("gathered", "split")
PLACEMENTS = ("device", "cpu", "sharded")  # of frozen weights, as the trainer has them (it needs transformers)


class Run(NamedTuple):
    """``length`` counts prompt and response, ``response`` the trained tokens of each sequence; ``batch`` counts the
    sequences of one micro-batch, which tp x cp ranks share.
    """

    batch: int
    length: int
    response: int
    dtype: torch.dtype = torch.bfloat16
    lora: int = 0  # rank of the adapters; 0: every parameter is trained
    optimizer: str = "adamw"
    models: int | None = None  # held in memory: the policy, a reference, ...; by default 2, and with adapters 1
    checkpointing: bool = True
    device: torch.device = torch.device("cuda")
    workspace_bytes: int | None = None
    weights: torch.dtype | None = None  # what the weights are stored in; fp32 under autocast; None: as dtype
    fp32_logits: bool = False
    samples: int = 0  # of a sampled gradient through the head; 0: dense
    gpus: int = 1
    shard: str = "none"
    tp: int = 1
    cp: int = 1
    head: str = "gathered"  # under FSDP2: its weight comes to the tokens, or (split) the tokens come to it
    ref_dtype: torch.dtype | None = None  # None: as the weights are stored
    ref_placement: str | None = None  # None: sharded where the policy's weights are, else on the device
    offload_optimizer: bool = False

    @property
    def stored(self) -> torch.dtype:
        return self.weights or self.dtype

    @property
    def held(self) -> int:
        """With adapters, the model without them is the reference."""
        return self.models if self.models is not None else 1 if self.lora else 2

    @property
    def frozen(self) -> int:
        """Models held beside the policy."""
        return self.held - 1

    @property
    def placement(self) -> str:
        """Of the frozen models, as ``KLQConfig.ref_placement``."""
        return self.ref_placement or ("sharded" if self.shards_weights else "device")

    @property
    def copies(self) -> int:
        """R: the ranks that train the same parameters."""
        return self.gpus // self.tp

    @property
    def zero(self) -> int:
        """The stage of DeepSpeed's ZeRO, 0 where another engine runs."""
        return int(self.shard[-1]) if self.shard.startswith("zero") else 0

    @property
    def shards_weights(self) -> bool:
        return self.shard in ("fsdp2", "zero3")

    @property
    def shards_gradients(self) -> bool:
        return self.shards_weights or self.shard == "zero2"

    @property
    def weight_ranks(self) -> int:
        """Over how many ranks the weights of one are spread."""
        return self.copies if self.shards_weights else 1

    @property
    def gradient_ranks(self) -> int:
        return self.copies if self.shards_gradients else 1

    @property
    def optimizer_ranks(self) -> int:
        return self.copies if self.shards_gradients or self.zero else 1

    @property
    def splits_head(self) -> bool:
        """Whether the tokens of all ranks come to each rank's rows of the head."""
        return self.head == "split" and self.copies > 1

    @property
    def learning(self) -> torch.dtype:
        """What trained parameters and their gradients are in: peft keeps adapters in fp32, and DeepSpeed casts them."""
        return torch.float32 if self.lora and not self.zero else self.stored

    @property
    def positions(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.batch * self.length // self.cp

    @property
    def tokens(self) -> int:
        """Trained ones of them."""
        return math.ceil(self.batch * self.response / self.cp)


def trained_parameters(model: Model, run: Run) -> int:
    """All of them, or those of the adapters: each linear layer of a block gets rank x (in + out), those of experts,
    which are no linear layers in transformers, none.
    """
    if not run.lora:
        return model.size
    ends = 4 * model.hidden + 2 * model.width + 2 * model.kv_width
    mlp = 3 * (model.hidden + model.intermediate) if model.experts == 1 else 0
    return model.layers * run.lora * (ends + mlp)


def check(model: Model, run: Run) -> None:
    """Raises the ValueError that names the option which is out of range, or impossible beside the others."""
    _check_step(run)
    _check_layout(model, run)
    _check_frozen(run)


def _check_step(run: Run) -> None:
    for name, count in (("batch", run.batch), ("length", run.length), ("response", run.response), ("models", run.held)):
        require(count >= 1, name, f"must be at least 1, got {count}")
    stored = run.stored in (run.dtype, torch.float32)
    require(stored, "weights", "must be as dtype, or fp32, which autocast casts for each use")
    require(run.response <= run.length, "response", f"must not exceed length {run.length}, got {run.response}")
    samples = f"must be in [1, {MOST_SAMPLES}], or 0: dense; got {run.samples}"
    require(0 <= run.samples <= MOST_SAMPLES, "samples", samples)
    require(run.lora >= 0, "lora_rank", f"must be a rank, or 0 to train every parameter; got {run.lora}")
    known = f"must be one of {', '.join(OPTIMIZER_BYTES)}; got {run.optimizer!r}"
    require(run.optimizer in OPTIMIZER_BYTES, "optimizer", known)


def _check_layout(model: Model, run: Run) -> None:
    for name, count in (("gpus", run.gpus), ("tp", run.tp), ("cp", run.cp)):
        require(count >= 1, name, f"must be at least 1, got {count}")
    require(run.shard in SHARDS, "shard", f"must be one of {', '.join(SHARDS)}; got {run.shard!r}")
    require(run.head in HEADS, "head", f"must be one of {', '.join(HEADS)}; got {run.head!r}")
    require(run.gpus > 1 or run.shard == "none", "shard", "has nothing to share out on one GPU; give gpus as well")
    shared = run.tp * run.cp
    require(run.gpus % shared == 0, "gpus", f"must be a multiple of tp x cp = {shared}, got {run.gpus}")
    require(
        run.shard != "none" or run.copies == 1,
        "shard",
        f"none leaves {run.copies} ranks to train the same weights apart; give ddp, fsdp2, zero1, zero2 or zero3",
    )
    for name, size in (("attention heads", model.heads), ("the MLP", model.intermediate), ("attention", model.width)):
        require(not size or size % run.tp == 0, "tp", f"must divide the size of {name}, {size}; got {run.tp}")
    require(run.tp == 1 or run.zero != 3, "tp", "DeepSpeed has no tensor parallelism under ZeRO-3; give --shard fsdp2")
    require(run.cp == 1 or not run.zero, "cp", "context parallelism needs FSDP2 or DDP; give --shard fsdp2")
    require(run.length % run.cp == 0, "cp", f"must divide length {run.length}, got {run.cp}")
    unequal = f"DeepSpeed casts the weights to dtype and keeps fp32 masters; leave it out with --shard {run.shard}"
    require(not run.zero or run.stored == run.dtype, "weights", unequal)
    if run.head == "split":
        require(run.shard == "fsdp2", "head", f"only FSDP2 leaves its rows where they are, not {run.shard}")
        require(run.tp == 1, "head", "tensor parallelism splits it over tp already; leave --head out")
        require(run.cp == 1, "head", "the tokens of split sequences do not come to it; leave --head out with --cp")
        require(not model.tied, "head", "a tied one is gathered as the embeddings are; leave --head out")
    offload = f"DeepSpeed alone keeps the optimiser on the host; give zero1, zero2 or zero3, not {run.shard}"
    require(not run.offload_optimizer or run.zero > 0, "offload_optimizer", offload)


def _check_frozen(run: Run) -> None:
    own = "no reference is held: with adapters it is the model without them; leave it out, or give --models 2"
    for name, value in (("ref_dtype", run.ref_dtype), ("ref_placement", run.ref_placement)):
        require(value is None or run.frozen > 0, name, own)
    known = f"must be one of {', '.join(PLACEMENTS)}; got {run.ref_placement!r}"
    require(run.ref_placement in (None, *PLACEMENTS), "ref_placement", known)
    sharded = run.ref_placement != "sharded" or run.shards_weights
    require(sharded, "ref_placement", "'sharded' needs an engine that shards: --shard fsdp2 or zero3")
