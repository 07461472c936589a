"""The step sizes of the inner loop: one fixed number, or a learned one for each tensor of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import accumulate, matching_names, trainable_parameters
from drtl_plugin.options.sections import InnerOptions
from drtl_plugin.runtime import checkpoints


class InnerRates:
    """Step sizes by parameter name, for the parameters that ``drtl.inner.parameters`` selects.

    Learning them is Meta-SGD's idea (Li et al., arXiv 1707.09835); there is one for each tensor of weights instead of
    one for each weight, similar to MAML++ (Antoniou et al., arXiv 1810.09502), which has one for each layer and step.
    Their logarithms are learned (ours), so that they stay positive and can change by orders of magnitude.

    Args:
        net (nn.Module): The network.
        inner (InnerOptions): ``drtl.inner``.
        learns (bool): Whether the outer loop learns them.

    Attributes:
        logarithms (dict[str, Tensor]): Logarithms of the learned step sizes, scalars; all are learned, or none.

    Raises:
        OptionError: If a pattern matches no parameter.
    """

    def __init__(self, net: nn.Module, inner: InnerOptions, learns: bool) -> None:
        parameters = trainable_parameters(net)
        names = matching_names(parameters, inner.parameters, 'drtl.inner.parameters')
        self._device = next(iter(parameters.values())).device
        self._fixed: dict[str, float | Tensor] = {} if learns else dict.fromkeys(names, inner.lr)
        self.logarithms = {
            name: torch.full((), math.log(inner.lr), device=self._device, requires_grad=True)
            for name in names
            if learns
        }

    def rates(self) -> dict[str, float | Tensor]:
        """The step sizes; learned ones are new leaves, whose gradients :meth:`accumulate` takes."""
        learned = {name: value.detach().exp().requires_grad_() for name, value in self.logarithms.items()}
        return {**self._fixed, **learned}

    def accumulate(self, gradients: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times the gradients for learned step sizes, to those of their logarithms."""
        of_logarithms = {name: self.logarithms[name].detach().exp() * value for name, value in gradients.items()}
        accumulate(self.logarithms, of_logarithms, weight)

    def state(self) -> dict[str, Tensor]:
        """The logarithms, for a training state, so that a resumed run continues with the same bits."""
        return {name: value.detach() for name, value in self.logarithms.items()}

    def load_state(self, logarithms: Mapping[str, Tensor]) -> None:
        """Set the logarithms to those of a training state.

        Raises:
            OptionError: See :meth:`load`.
        """
        self._check(logarithms)
        for name, value in logarithms.items():
            self.logarithms[name].data.copy_(value)

    def load(self, rates: Mapping[str, Tensor]) -> None:
        """Set the step sizes to learned ones, scalars.

        Raises:
            OptionError: If these belong to other parameters, or there is one for each weight, as in old versions.
        """
        self._check(rates)
        for name, rate in rates.items():
            if self.logarithms:
                self.logarithms[name].data.copy_(rate.log())
            else:
                self._fixed[name] = rate.to(self._device)

    def _check(self, learned: Mapping[str, Tensor]) -> None:
        if set(learned) != {*self._fixed, *self.logarithms}:
            raise OptionError('drtl.inner: the step sizes learned before belong to other parameters.')
        if any(value.ndim for value in learned.values()):
            raise OptionError('drtl.inner: the step sizes were learned by an old version; learn them again.')

    def load_file(self, path: str) -> None:
        """Set the step sizes to those in ``inner_rates_….pth``, the file of ``path.pretrain_inner_rates``."""
        key = 'path.pretrain_inner_rates'
        self.load(checkpoints.weights_in(checkpoints.read(path, key), path, key, ['params'])[1])

    def save(self, folder: str, current_iter: int) -> None:
        """Write ``inner_rates_ITERATION.pth``, if they are learned."""
        if self.logarithms:
            name = f'inner_rates_{"latest" if current_iter == -1 else current_iter}.pth'
            rates = {name: torch.as_tensor(rate).detach() for name, rate in self.rates().items()}
            checkpoints.save({'params': rates}, Path(folder, name))
