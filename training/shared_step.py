"""A training step that several processes take together: each on its share of the batch, all with the same result.

The terms of the loss are parts that add up to those of the whole batch (`core.processes`), gradients are summed by
DistributedDataParallel, and BatchNorm layers normalise by the statistics of the whole batch. So the step is that of one
process with the whole batch, but for the order of additions.
"""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from core.errors import ResourceError
from core.processes import summing
from training.exchanges import Exchanges
from training.team import Team

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SharedStep:
    """What the processes of a team do together in training.

    Args:
        team: the processes.
        network: module that a step runs; its parameters are equal in all processes.
        model: module whose BatchNorm layers are shared; contains or is contained in `network`.

    Attributes:
        network: `network`, with gradients that are summed during `backward`.
        exchanges: the sums of the current attempt at a step.
        seconds_alone: of a step without exchanges, once it was measured.
    """

    def __init__(self, team: Team, network: nn.Module, model: nn.Module) -> None:
        self.team = team
        self.model = model
        self.device = next(model.parameters()).device
        self.group = team.training_group(self.device)
        self.exchanges = Exchanges(self.group)
        self._unshared = _WithUnused(network)
        self.network = self._shared_network(is_first=True)
        self.seconds_alone: float | None = None
        self._num_images = 0
        self._num_steps = 0
        self._seconds = 0.0

    def _shared_network(self, is_first: bool) -> DistributedDataParallel:
        """The network with summed gradients; the first time, the processes compare their parameters."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # of a name that torch 2.10 does not know otherwise
            # Buckets change where no parameter may be unused. With buckets that never do, a resumed training adds
            # gradients in the order of one that was not stopped.
            network = DistributedDataParallel(
                self._unshared,
                process_group=self.group,
                broadcast_buffers=False,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                init_sync=is_first,
            )
        network.register_comm_hook(None, lambda _, bucket: self.exchanges.sum_bucket(bucket))
        return network

    def repeat_attempt(self) -> None:
        """Prepare to complete the exchanges of an attempt in which this process ran out of memory.

        DistributedDataParallel does not survive an error in the middle of `backward`, so there is a new one.

        Raises:
            ResourceError: the old one is still referenced, and would take part in `backward`.
        """
        old = weakref.ref(self.network)
        del self.network
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if old() is not None:
            raise ResourceError(
                "The memory of this process does not suffice for a step, and what the step had taken is still in use: "
                "resume with a smaller micro_batch (train.micro_batch, qat.micro_batch)"
            )
        self.network = self._shared_network(is_first=False)
        self.exchanges.repeat()

    def time_alone(self, step: Callable[[], None]) -> None:
        """Measure a step's forward and backward pass without exchanges; the model stays as it is.

        Args:
            step: runs the two passes.
        """
        kept = {name: value.clone() for name, value in self.model.named_buffers()}
        try:
            with torch.random.fork_rng(), self.network.no_sync():
                for _ in range(2):  # the first one is slower: memory and kernels are set up
                    started = time.perf_counter()
                    step()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    self.seconds_alone = time.perf_counter() - started
                    self.model.zero_grad(set_to_none=True)
        finally:
            self.model.zero_grad(set_to_none=True)
            for name, value in self.model.named_buffers():
                value.data.copy_(kept[name])

    def count(self, num_images: int, seconds: float) -> None:
        """Note a step of this process."""
        self._num_images += num_images
        self._num_steps += 1
        self._seconds += seconds

    def figures(self) -> dict[str, float]:
        """Of the epoch: images per second of every process, and the scaling efficiency; starts the next epoch.

        The efficiency is the time of a step without exchanges, of the slowest process, over that of a step with them:
        1 where sharing the step costs nothing.
        """
        mine = (self._num_images, self._seconds, self.seconds_alone or 0.0)
        found = self.team.gather((*mine, self._num_steps))
        self._num_images, self._seconds, self._num_steps = 0, 0.0, 0
        speeds = {f"images_per_second_{rank}": n / s for rank, (n, s, *_) in enumerate(found) if s}
        step = max(seconds / steps for _, seconds, _, steps in found if steps) if found[0][3] else 0.0
        efficiency = {"scaling_efficiency": max(alone for _, _, alone, _ in found) / step} if step else {}
        return {**speeds, **efficiency}

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return self._reduce(number, distributed.ReduceOp.MAX)

    def total(self, number: int) -> int:
        """The sum of all processes' numbers."""
        return self._reduce(number, distributed.ReduceOp.SUM)

    def _reduce(self, number: int, operation: Any) -> int:
        found = torch.tensor([number], device=self.device)
        distributed.all_reduce(found, operation, group=self.group)
        return int(found)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let losses and BatchNorm layers in the block look at the whole batch."""
        norms = [module for module in self.model.modules() if isinstance(module, _NORMS)]
        with summing(self.exchanges.sum, self.team.size):
            for norm in norms:
                norm.forward = partial(_normalise, norm, self.exchanges)  # type: ignore[method-assign]
            try:
                yield
            finally:
                for norm in norms:
                    del norm.forward


class _WithUnused(nn.Module):
    """A network with a parameter that nothing uses: DistributedDataParallel warns where it looks for one in vain."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.unused = nn.Parameter(next(network.parameters()).new_zeros(1))

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class _SumWithGradient(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, exchanges: Exchanges) -> Tensor:
        ctx.exchanges = exchanges
        return exchanges.sum(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchanges.sum(gradients[0]), None


def _normalise(norm: Any, exchanges: Exchanges, x: Tensor) -> Tensor:
    """What a BatchNorm layer does, with mean and variance over the batches of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
    count = x.numel() / x.shape[1]
    mean, variance = mean.double(), variance.double()
    sums = count * torch.cat([mean, variance + mean.square(), mean.new_ones(1)])
    sums = _SumWithGradient.apply(sums, exchanges)
    total = sums[-1].detach()
    mean, squares = (part / total for part in sums[:-1].chunk(2))
    variance = squares - mean.square()
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean), share)
            norm.running_var.lerp_((variance * total / (total - 1)).to(norm.running_var), share)
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    shape = [1, -1] + [1] * (x.ndim - 2)
    result = (x - mean.to(x.dtype).view(shape)) * scale.to(x.dtype).view(shape)
    return result + norm.bias.view(shape) if norm.affine else result
