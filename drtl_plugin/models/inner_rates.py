"""The step sizes of the inner loop: one fixed number, or a learned one for each weight (Meta-SGD)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import matching_names, trainable_parameters
from drtl_plugin.options.sections import InnerOptions
from drtl_plugin.runtime import checkpoints


class InnerRates:
    """Step sizes by parameter name, for the parameters that ``drtl.inner.parameters`` selects.

    Args:
        net (nn.Module): The network.
        inner (InnerOptions): ``drtl.inner``.
        learns (bool): Whether the outer loop learns a step size for each weight.

    Attributes:
        rates (dict[str, float | Tensor]): The step sizes.
        learned (dict[str, Tensor]): The learned ones; either all or none are learned.

    Raises:
        OptionError: If a pattern matches no parameter.
    """

    def __init__(self, net: nn.Module, inner: InnerOptions, learns: bool) -> None:
        parameters = trainable_parameters(net)
        names = matching_names(parameters, inner.parameters, 'drtl.inner.parameters')
        self.learned = {
            name: torch.full_like(parameters[name], inner.lr, requires_grad=True) for name in names if learns
        }
        self.rates: dict[str, float | Tensor] = {**dict.fromkeys(names, inner.lr), **self.learned}
        self._device = next(iter(parameters.values())).device

    def state(self) -> dict[str, Tensor]:
        """The learned step sizes, detached; empty if they are not learned."""
        return {name: rate.detach() for name, rate in self.learned.items()}

    def load(self, rates: dict[str, Tensor]) -> None:
        """Set the step sizes to learned ones.

        Raises:
            OptionError: If these belong to other parameters.
        """
        if set(rates) != set(self.rates):
            raise OptionError('drtl.inner: the step sizes learned before belong to other parameters.')
        for name, rate in rates.items():
            if self.learned:
                self.learned[name].data.copy_(rate)
            else:
                self.rates[name] = rate.to(self._device)

    def load_file(self, path: str) -> None:
        """Set the step sizes to those in ``inner_rates_….pth``, the file of ``path.pretrain_inner_rates``."""
        key = 'path.pretrain_inner_rates'
        self.load(checkpoints.weights_in(checkpoints.read(path, key), path, key, ['params'])[1])

    def save(self, folder: str, current_iter: int) -> None:
        """Write ``inner_rates_ITERATION.pth``, if they are learned."""
        if self.learned:
            name = f'inner_rates_{"latest" if current_iter == -1 else current_iter}.pth'
            checkpoints.save({'params': self.state()}, Path(folder, name))
