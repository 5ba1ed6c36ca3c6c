"""One step of the optimizer: losses, gradients, clipping, update. A step that lacks memory is taken again in parts."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from core.failures import lack_of_memory
from core.processes import BatchPart
from core.types import TaskLoss
from training.accumulation import BatchSums
from training.divergence import bad_layer, bad_parameter
from training.random_states import random_states, restore_random_states
from training.schedule import rate_factor
from training.state import StepRecord, TrainingState

Found = dict[str, float]
"""The terms of a batch's loss and `total`, over all processes."""
Part = tuple[Tensor, Any, BatchPart]
"""Images, their targets, and which of the batch they are."""


def train_step(state: TrainingState, images: Tensor, targets: Any, task_loss: TaskLoss, total: int) -> None:
    """One step of the optimizer."""
    options, shared = state.options, state.shared
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    num_images = len(images) if shared is None else shared.total(len(images))
    if shared is not None:
        _time_alone(state, images, targets, task_loss, num_images)
    started = time.perf_counter()
    factor = rate_factor(state.step, total, options.warmup_fraction, options.final_fraction)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * factor * state.rate_scale
    state.faults.remember_buffers()
    progress = min(state.step / total, 1.0)
    with nullcontext() if shared is None else shared.together():
        values = _losses_and_gradients(state, images, targets, task_loss, progress, num_images)
    state.samples += num_images
    if not math.isfinite(values["total"]):
        parts = state.accumulation.parts(images, targets)
        causes = (bad_layer(state.model, state.extension.network, some) for some, _ in parts)
        return _skip(state, "loss", values, next(filter(None, causes), ""))
    norms = _clip(state.optimizer, options.clip_norm)
    if not all(math.isfinite(norm) for norm in norms.values()):
        # a clipped activation hides an infinite weight, so a broken step need not show in the next loss
        return _skip(state, "gradient", values, bad_parameter(state.model, gradients=True))
    state.optimizer.step()
    state.faults.skipped = 0
    state.extension.after_step(progress)
    if state.average is not None:
        state.average.update(state.model)
    state.records.append(
        StepRecord(
            step=state.step,
            epoch=state.epoch,
            learning_rate=options.learning_rate * factor * state.rate_scale,
            losses=values,
            gradient_norm=norms.get("weights", 0.0),
            seconds=time.perf_counter() - started,
        )
    )
    if shared is not None:
        shared.count(len(images), state.records[-1].seconds)
    state.step += 1


def _parts(state: TrainingState, images: Tensor, targets: Any, num_images: int) -> list[Part]:
    """A process's share of a batch of `num_images`, in parts that fit into memory."""
    rank, size = (0, 1) if state.shared is None else (state.shared.team.rank, state.shared.team.size)
    parts, begin = [], 0
    for some, theirs in state.accumulation.parts(images, targets):
        end = begin + len(some)
        places = range(rank + begin * size, rank + end * size, size)
        parts.append((some, theirs, BatchPart(state.step, places, num_images)))
        begin = end
    return parts


def _losses_and_gradients(
    state: TrainingState, images: Tensor, targets: Any, task_loss: TaskLoss, progress: float, num_images: int
) -> Found:
    """Gradients of the batch's loss, and what `Found` says.

    The same batch is taken again in smaller parts, from the same random states, where memory does not suffice.
    """
    before = random_states()
    while True:
        parts = _parts(state, images, targets, num_images)
        found, reason = _attempt(state, parts, task_loss, progress)
        if found is not None:
            return found
        state.optimizer.zero_grad(set_to_none=True)
        state.accumulation.halve(len(images), state.step, reason)
        state.faults.restore_buffers()
        restore_random_states(before)


def _attempt(
    state: TrainingState, parts: list[Part], task_loss: TaskLoss, progress: float
) -> tuple[Found | None, str]:
    """What `_losses_and_gradients` returns, or None and why, if the memory of one of the processes does not suffice."""
    shared, reason, found = state.shared, None, None
    take = _in_one if len(parts) == 1 else _in_parts
    if shared is not None:
        shared.exchanges.begin()
    try:
        found = take(state, parts, task_loss, progress)
    except Exception as error:
        reason = lack_of_memory(error)
        if reason is None or not (shared is None or shared.exchanges.can_complete):
            raise
    if shared is not None:
        if reason is not None:  # the others wait for this process: it completes the step with one image
            state.optimizer.zero_grad(set_to_none=True)
            shared.repeat_attempt()
            images, targets, batch = parts[0]
            one = images[:1], state.accumulation.targets_of(targets, 0, 1), batch
            take(state, [one] * len(parts), task_loss, progress)
        if shared.largest(reason is not None):
            return None, reason or "in another process"
    return found, reason or ""


def _in_one(state: TrainingState, parts: list[Part], task_loss: TaskLoss, progress: float) -> Found:
    terms = _loss_terms(state, parts[0], task_loss, progress)
    loss = _loss(terms)
    found = _summed(state, {name: term.detach() for name, term in terms.items()})
    state.optimizer.zero_grad(set_to_none=True)
    if math.isfinite(found["total"]):
        loss.backward()
    return found


def _in_parts(state: TrainingState, parts: list[Part], task_loss: TaskLoss, progress: float) -> Found:
    shared, before = state.shared, random_states()
    state.optimizer.zero_grad(set_to_none=True)
    sums = BatchSums(len(parts), shared)
    for part in parts:
        with sums.finding():
            _loss_terms(state, part, task_loss, progress)
        if not sums.values:  # the loss depends on each image alone
            break
    sums.share()
    state.faults.restore_buffers()
    restore_random_states(before)
    totals: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        is_last = shared is None or number == len(parts)  # with its gradients go those of the parts before
        with sums.giving(), nullcontext() if is_last else shared.network.no_sync():  # type: ignore[union-attr]
            terms = _loss_terms(state, part, task_loss, progress)
            _loss(terms).backward()
        for name, term in terms.items():
            totals[name] = totals.get(name, 0) + term.detach()  # type: ignore[operator]
    return _summed(state, totals)


def _time_alone(
    state: TrainingState, images: Tensor, targets: Any, task_loss: TaskLoss, num_images: int
) -> None:
    """Measure the step without exchanges, once, in parts that fit into the memory of every process."""
    shared = state.shared
    while shared is not None and shared.seconds_alone is None:
        parts = _parts(state, images, targets, num_images)

        def step(parts: list[Part] = parts) -> None:
            for part in parts:
                _loss(_loss_terms(state, part, task_loss, 0.0)).backward()

        reason = None
        try:
            shared.time_alone(step)
        except Exception as error:
            reason = lack_of_memory(error)
            if reason is None:
                raise
        if shared.largest(reason is not None):
            shared.seconds_alone = None
            state.accumulation.halve(len(images), state.step, reason or "in another process")


def _loss(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def _summed(state: TrainingState, terms: dict[str, Tensor]) -> Found:
    """The terms' values and `total`; those of the whole batch where processes share it."""
    values = {name: float(term) for name, term in terms.items()}
    if state.shared is None:
        return {**values, "total": float(_loss(terms))}
    found = torch.tensor(list(values.values()), dtype=torch.float64, device=state.device)
    numbers = state.shared.exchanges.sum(found).tolist()
    return {**dict(zip(values, numbers, strict=True)), "total": sum(numbers)}


def _loss_terms(state: TrainingState, part: Part, task_loss: TaskLoss, progress: float) -> dict[str, Tensor]:
    images, targets, batch = part
    terms: dict[str, Tensor] = {}
    with torch.autocast(images.device.type, torch.bfloat16, enabled=state.options.autocast):
        raw, added = state.extension.losses(state.network(images), images, progress, batch)
        if state.options.task_weight > 0:
            height, width = int(images.shape[-2]), int(images.shape[-1])
            for name, term in task_loss(raw, targets, (height, width)).items():
                terms[name] = state.options.task_weight * term
    terms |= added
    if not terms:
        raise ValueError("the weights of all loss terms are 0: give the task loss or distillation a weight")
    return terms


def _clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> dict[str, float]:
    """Clip each parameter group by itself (their gradients differ in size) unless a norm is not finite.

    Returns:
        The norms before, by group.
    """
    limit = clip_norm if clip_norm > 0 else math.inf
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    norms = {
        name: nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for name, parameters in groups.items()
    }
    values = {name: float(norm) for name, norm in norms.items()}
    if all(map(math.isfinite, values.values())):
        for name, parameters in groups.items():
            nn.utils.clip_grads_with_norm_(parameters, limit, norms[name])
    return values


def _skip(state: TrainingState, what: str, values: dict[str, float], cause: str) -> None:
    """Take a step back whose loss or gradient is not finite, and continue with the next."""
    rates = [
        f"that of {group['name']} (now {group['peak']:g})"
        for group in state.optimizer.param_groups
        if group["name"] not in {"weights", "biases"}
    ]
    remedy = " or ".join([f"the learning rate (now {state.options.learning_rate:g})", *rates])
    state.faults.skip(what, state.step, values, cause, f"lower {remedy}")
    state.step += 1
