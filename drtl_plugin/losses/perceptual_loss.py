"""BasicSR's perceptual loss with VGG weights from a file."""

from __future__ import annotations

import os

import torch
from basicsr.archs.vgg_arch import NAMES, VGGFeatureExtractor
from basicsr.losses.basic_loss import PerceptualLoss
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn
from torchvision.models import vgg

from drtl_plugin.errors import DataError, unknown
from drtl_plugin.runtime import checkpoints

# As in Real-ESRGAN's option files.
LAYER_WEIGHTS = {'conv1_2': 0.1, 'conv2_2': 0.1, 'conv3_4': 1.0, 'conv4_4': 1.0, 'conv5_4': 1.0}


@LOSS_REGISTRY.register()
class VGGPerceptualLoss(PerceptualLoss):
    """``PerceptualLoss`` with VGG weights from a file; nothing is downloaded.

    Args:
        vgg_weights (str): torchvision's weights of ``vgg_type``, e.g. ``vgg19-dcbb9e9d.pth``.
        layer_weights (dict | None): Weight of each layer; by default Real-ESRGAN's (for VGG19 only).
        vgg_type (str): vgg11, vgg13, vgg16 or vgg19. Default: vgg19.
        perceptual_weight (float): Factor of the loss. Default: 1.0.
        style_weight (float): Factor of the style loss; 0 disables it. Default: 0.
        criterion (str): l1, or fro (Frobenius norm). Default: l1.

    Raises:
        DataError: If the file is missing or does not contain these weights.
        OptionError: If the network, layer or criterion is unknown.
    """

    def __init__(
        self,
        vgg_weights: str,
        layer_weights: dict | None = None,
        vgg_type: str = 'vgg19',
        perceptual_weight: float = 1.0,
        style_weight: float = 0.0,
        criterion: str = 'l1',
    ) -> None:
        nn.Module.__init__(self)  # BasicSR's would download weights
        if criterion not in ('l1', 'fro'):
            raise unknown('criterion', criterion, ('l1', 'fro'), 'train.perceptual_opt.criterion')
        self.perceptual_weight, self.style_weight = perceptual_weight, style_weight
        self.layer_weights = layer_weights or LAYER_WEIGHTS
        self.criterion_type, self.criterion = criterion, nn.L1Loss() if criterion == 'l1' else None
        self.vgg = _Features(os.path.expanduser(vgg_weights), list(self.layer_weights), vgg_type)


class _Features(VGGFeatureExtractor):
    """``VGGFeatureExtractor`` for images in [0, 1], with weights from a file."""

    def __init__(self, path: str, layers: list[str], vgg_type: str) -> None:
        nn.Module.__init__(self)  # BasicSR's would download weights
        where = 'train.perceptual_opt'
        if vgg_type not in NAMES:
            raise unknown('network', vgg_type, NAMES, f'{where}.vgg_type')
        names = NAMES[vgg_type]
        for layer in layers:
            if layer not in names:
                raise unknown(f'layer of {vgg_type}', layer, names, f'{where}.layer_weights')
        self.layer_name_list, self.use_input_norm, self.range_norm = layers, True, False
        with torch.device('meta'):
            features = getattr(vgg, vgg_type)().features[: 1 + max(map(names.index, layers))]
        weights = checkpoints.weights_in(checkpoints.read(path, f'{where}.vgg_weights'), path, where, [None])[1]
        wanted = features.state_dict()
        found = {name: weights.get(f'features.{name}') for name in wanted}
        if any(weight is None or weight.shape != wanted[name].shape for name, weight in found.items()):
            raise DataError(f"{where}.vgg_weights: {path} does not hold torchvision's weights of {vgg_type}.")
        features.load_state_dict(found, assign=True)
        self.vgg_net = nn.Sequential()
        for name, layer in zip(names, features, strict=False):
            self.vgg_net.add_module(name, layer)
        self.requires_grad_(False).eval()
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
