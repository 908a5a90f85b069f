"""One process or many: gradients shared (DDP) or parameters sharded too (FSDP2), and sums over all.

    accelerate launch --num_processes 4 -m visavis train …                              # DDP
    accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 -m visavis train …  # FSDP2

Sharded, each process keeps a share of every parameter, gradient and moment; blocks of the decoder
are gathered one at a time, all else for a whole pass. The model given stays as it is, its numbers
on the CPU meanwhile, and gets what was trained in the end. Knows no objective, loop or file.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visavis.errors import TrainError
from visavis.train.trainee import Trainee

if TYPE_CHECKING:
    from accelerate import Accelerator

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
        trainee: Trainee,
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


def shard(trainee: Trainee, device: torch.device, world: int) -> Trainee:
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
    """Return what this process keeps of a whole tensor, laid out as `like`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
