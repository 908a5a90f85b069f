"""Distributed training: embeddings of all processes in one loss, and sharded parameters.

Every process computes the whole loss on all rows, its own with gradients; this is exact for any
number of rows per process. Parameter gradients are then a share of the whole on each process; where
they are averaged instead of summed, multiply by the number of processes
(`cached_backward(…, factor=world_size())`).
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visavis.errors import TrainError
from visavis.model.batch import PackedBatch
from visavis.model.pooling import pooled
from visavis.model.vlm import VLM
from visavis.train.losses import next_token_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows [n, ...] of all processes, in the order of processes; n may differ.

    Only this process' own rows keep their gradient.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = rows.detach().new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    parts = [part[: int(count)] for part, count in zip(everyone, counts, strict=True)]
    parts[rank()] = rows
    return torch.cat(parts)


LOSS_BLOCK = 2048  # positions whose scores over the vocabulary are in memory at a time


class TrainModule(nn.Module):
    """A model that is trained.

    Attributes:
        autocast: entered around each pass and left after it, so that losses over vectors are
            computed in float32.
        sharded: whether processes gather parameters together, so that all must use the same.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.sharded = False

    def forward(
        self, batch: PackedBatch, want: Literal["loss", "vectors"], pooling: str = "last"
    ) -> Tensor:
        """Return the summed next-token loss of labelled positions, or unit vectors [B, D].

        Raises:
            TrainError: it is sharded and pools by the embedding head, whose passes differ.
        """
        if self.sharded and want == "vectors" and pooling == "head":
            raise TrainError(
                "a model with an embedding head cannot be trained sharded: its pictures skip the "
                "decoder. Launch without --use_fsdp."
            )
        with self.autocast():
            found = pooled(self.vlm, batch, pooling) if want == "vectors" else self._loss(batch)
        if torch.is_grad_enabled() and (self.sharded or not found.requires_grad):
            found = found + self._nothing()
        return found

    def _loss(self, batch: PackedBatch) -> Tensor:
        assert batch.labels is not None
        hidden = self.vlm(batch)[-1]  # [T, D]
        learned = (batch.labels != -100).nonzero()[:, 0]
        total: Tensor = hidden.sum() * 0.0  # stays connected when nothing here is learned
        for rows in learned.split(LOSS_BLOCK):
            logits = self.vlm.decoder.logits(hidden[rows])
            total = total + next_token_loss(logits, batch.labels[rows])
        return total

    def _nothing(self) -> Tensor:
        """Return 0 with a gradient of zeros for what a batch may leave out, such as the connector
        where it has no images."""
        firsts = [
            parameter.flatten()[0].float() * 0.0
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("vlm.decoder.blocks.")
        ]
        return torch.stack(firsts).sum() if firsts else torch.zeros(())


Named = dict[str, nn.Parameter]


class Processes:
    """The processes that train together, as loop and tasks see them (`tasks.Devices`).

    Args:
        groups: trained parameters by group; those outside of the model get a whole gradient on
            each process and are never shared.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trainee: TrainModule,
        groups: Mapping[str, Sequence[nn.Parameter]],
    ) -> None:
        self.accelerator, self.trainee = accelerator, trainee
        self.world, self.rank = int(accelerator.num_processes), int(accelerator.process_index)
        self.sharded = self.world > 1 and wants_shards()
        self.groups = named_groups(trainee, groups)
        self.wrapped: nn.Module = trainee
        if self.sharded:
            if accelerator.scaler is not None:
                raise TrainError(
                    "float16 does not go with sharded parameters; set precision to bf16 in the "
                    "recipe, or launch without --use_fsdp."
                )
            shell = shard(trainee, accelerator.device, self.world)
            shards = dict(shell.named_parameters())
            self.groups = {
                group: {name: shards.get(name, parameter) for name, parameter in own.items()}
                for group, own in self.groups.items()
            }
            shell.autocast = accelerator.autocast
            self.wrapped = shell
        else:
            trainee.autocast = accelerator.autocast
            if self.world > 1:
                self.wrapped = nn.parallel.DistributedDataParallel(
                    trainee,
                    find_unused_parameters=True,  # the last pass of a step may lack pictures
                    broadcast_buffers=False,  # frozen integers, the same everywhere
                    gradient_as_bucket_view=True,  # no second copy of the gradients
                )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def parameters(self) -> Named:
        """Everything that is trained, by name."""
        return {name: p for own in self.groups.values() for name, p in own.items()}

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Go back from a loss, or from vectors with the gradient that a loss gave them."""
        scaler = self.accelerator.scaler
        if gradient is None and scaler is not None:  # float16: gradients would vanish
            loss = scaler.scale(loss)
        loss.backward(gradient)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Entered around passes after which gradients are not shared yet. Sharded ones always
        are: they would fill the memory that sharding saves."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def passes(self, number: int) -> int:
        """Return how many passes through the model each process takes that has `number` to make:
        sharded parameters are gathered by all together, so all take as many."""
        return self.largest(number) if self.sharded else number

    def sum(self, value: float) -> float:
        """Return the sum over all processes."""
        return float(self._reduced(float(value), torch.float64, dist.ReduceOp.SUM))

    def largest(self, value: int) -> int:
        """Return the largest over all processes."""
        return int(self._reduced(value, torch.int64, dist.ReduceOp.MAX))

    def _reduced(self, value: float, dtype: torch.dtype, how: Any) -> Tensor:
        total = torch.tensor(value, dtype=dtype)
        if self.world > 1:
            total = total.to(self.accelerator.device)
            dist.all_reduce(total, how)
        return total

    def gathered(self, value: Any) -> list[Any]:
        """Return a picklable value of each process, in their order."""
        everyone: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def clip(self, limit: float) -> dict[str, float]:
        """Cut each group's gradient to a length; return the lengths they had. 0: any length."""
        norms = {}
        for group, own in self.groups.items():
            norm = nn.utils.clip_grad_norm_(own.values(), limit or math.inf)
            norms[group] = float(whole(norm))
        return norms

    def finish(self) -> None:
        """Give the model what was trained."""
        self.trainee.autocast = nullcontext
        if self.sharded:
            device = self.accelerator.device
            trained = self.parameters
            for name, parameter in self.trainee.named_parameters():
                if name in trained:
                    parameter.data = whole(trained[name].detach()).clone()
                parameter.data = parameter.data.to(device)


def wants_shards() -> bool:
    """Return whether `accelerate launch --use_fsdp` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def named_groups(
    trainee: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, Named]:
    """Return groups with each parameter's name; empty groups are left out."""
    names = {id(parameter): name for name, parameter in trainee.named_parameters()}
    return {
        group: {names.get(id(p), f"{group}.{number}"): p for number, p in enumerate(own)}
        for group, own in groups.items()
        if own
    }


def shard(trainee: TrainModule, device: torch.device, world: int) -> TrainModule:
    """Return the same modules with sharded parameters; the given one's go to the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in trainee.parameters():
        parameter.data = parameter.data.contiguous()  # of convolutions, some are channels-last
    shared = {id(tensor): tensor for tensor in (*trainee.parameters(), *trainee.buffers())}
    shell = copy.deepcopy(trainee, shared)  # modules of its own, the same tensors
    shell.sharded = True
    mesh = init_device_mesh(device.type, (world,))
    for block in shell.vlm.decoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(shell, mesh=mesh)
    for parameter in trainee.parameters():
        parameter.data = parameter.data.cpu()
    return shell


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one piece; every process that holds a share must ask for it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, laid out as `like`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
