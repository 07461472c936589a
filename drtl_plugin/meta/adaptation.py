"""Few-shot adaptation of a trained network to the target's support set.

The paper (arXiv 2111.13078) names the step; optimiser, warm-up and moving average are ours.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from drtl_plugin.meta.learner import Batch, Criterion, Precision, Rates

# Accumulates the gradients of a step from the loss, and from anything else computed from an output and its GT.
Backward = Callable[[Tensor, Tensor, Tensor], None]

# Number of times that early stopping evaluates the held-out loss in a full course, and number of evaluations without
# improvement after which it stops.
_LOOKS, _PATIENCE = 40, 8


def adaptation(
    net: nn.Module,
    criterion: Criterion,
    batches: Iterable[Batch],
    lr: float,
    ema_decay: float = 0.0,
    rates: Rates | None = None,
    warmup: int = 0,
    decay_steps: int = 0,
    precision: Precision = nullcontext,
    backward: Backward = lambda loss, output, gt: loss.backward(),
) -> Iterator[nn.Module]:
    """The course of an adaptation: one step per batch, by Adam or with the inner loop's step sizes.

    Args:
        net (nn.Module): Trained network; not changed.
        criterion (Criterion): ``criterion(output, gt)``.
        batches (Iterable[Batch]): Support patches, one batch per step; auxiliary patches may be among them.
        lr (float): Learning rate of Adam.
        ema_decay (float): Decay of the moving average of the weights that is yielded, ramped up as
            ``min(decay, (1 + t) / (10 + t))`` with the step t; 0 yields the last weights.
        rates (Rates | None): Step sizes by parameter name for plain gradient descent, instead of Adam: the inner
            loop of meta-learning continued. Parameters that are not named do not change.
        warmup (int): Steps over which Adam's learning rate rises linearly to ``lr``. Adam's first steps depend on
            the gradient's sign only: they are as large as ``lr`` for every weight, however small the gradient.
        decay_steps (int): Steps over which Adam's learning rate falls linearly to 0; 0: it does not fall.
        precision (Precision): Makes the context in which each step is computed, e.g. autocast.
        backward (Backward): Called with the loss, a scalar, the output and its ground truth ``(B, C, H, W)``, for the
            gradients of the step; a GAN adds its own and trains its discriminator.

    A step whose gradient is not finite is skipped: the norms inside some networks have none where a patch is flat.

    Yields:
        nn.Module: The adapted copy in evaluation mode, before the first and after each step: always the same object,
        whose weights keep changing.
    """
    student = copy.deepcopy(net).train()
    averaged = copy.deepcopy(student).eval()
    learned = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if rates is None:
        optimizer = torch.optim.Adam(learned.values(), lr=lr)
    yield averaged
    for step, (lq, gt) in enumerate(batches):
        student.zero_grad()
        with precision():
            output = student(lq)
            loss = criterion(output, gt)
        backward(loss, output, gt)
        # With an infinite maximum, this only computes the norm.
        if not nn.utils.clip_grad_norm_(learned.values(), math.inf).isfinite():
            yield averaged
            continue
        if rates is None:
            share_left = 1 - step / decay_steps if decay_steps else 1
            optimizer.param_groups[0]['lr'] = lr * min(1, (step + 1) / max(warmup, 1)) * share_left
            optimizer.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, rate in (rates or {}).items():
                gradient = learned[name].grad
                if gradient is not None:
                    learned[name].sub_(rate * gradient)
            for average, current in zip(averaged.parameters(), student.parameters(), strict=True):
                average.lerp_(current, 1 - decay)
            for kept, new in zip(averaged.buffers(), student.buffers(), strict=True):
                kept.copy_(new)
        yield averaged


def blend(net: nn.Module, adapted: Sequence[nn.Module], share: float) -> nn.Module:
    """A step from a network towards the average of adapted ones: ``θ + share · (mean(θ_k) - θ)``.

    Averages of fine-tuned networks: "Model soups" (Wortsman et al., ICML 2022, arXiv 2203.05482). The step:
    "Robust fine-tuning of zero-shot models" (Wortsman et al., CVPR 2022, arXiv 2109.01903).

    Args:
        net (nn.Module): The network before adaptation; not changed.
        adapted (Sequence[nn.Module]): Adapted copies of it.
        share (float): 0 gives the network itself, 1 the average.

    Returns:
        nn.Module: A new network in evaluation mode. Buffers of whole numbers stay as they were.
    """
    result = copy.deepcopy(net).eval()
    if share == 0:  # whatever the adapted ones have come to
        return result
    states = [other.state_dict() for other in adapted]
    with torch.no_grad():
        for name, value in result.state_dict().items():
            if value.is_floating_point():
                mean = torch.stack([state[name] for state in states]).mean(0)
                value.copy_(torch.lerp(value, mean, share))
    return result


def last(course: Iterable[nn.Module]) -> nn.Module:
    """The network at the end of an adaptation's course.

    Args:
        course (Iterable[nn.Module]): From :func:`adaptation`.

    Returns:
        nn.Module: The adapted network, of the same architecture as the one that was adapted, in evaluation mode.
    """
    *_, adapted = course
    return adapted


def best_step(course: Iterator[nn.Module], held_out_loss: Callable[[nn.Module], float], steps: int) -> int:
    """The number of steps after which the loss on held-out pairs is lowest.

    Args:
        course (Iterator[nn.Module]): From :func:`adaptation`, on the other pairs; not followed further than needed.
        held_out_loss (Callable): Loss of a network on the held-out pairs.
        steps (int): The maximum number of steps.

    Returns:
        int: From 0 to ``steps``, found to within a fortieth of ``steps``.
    """
    interval = math.ceil(steps / _LOOKS) or 1
    best, best_loss = 0, math.inf
    for step, net in enumerate(itertools.islice(course, steps + 1)):
        if step % interval:
            continue
        with torch.no_grad():
            loss = held_out_loss(net)
        if loss < best_loss:
            best, best_loss = step, loss
        elif step - best >= _PATIENCE * interval:
            break
    return best
