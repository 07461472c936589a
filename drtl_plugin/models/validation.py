"""The passes of a validation or test, the crops they compare, and the metrics of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from basicsr.utils import get_root_logger, tensor2img
from torch import Tensor, nn
from torch.nn import functional as F

from drtl_plugin.report.pictures import ComparedCrop, compared_crop
from drtl_plugin.report.tables import (
    AFTER,
    BEFORE,
    BICUBIC,
    TEST_PASSES,
    results_table,
    write_image_metrics,
)
from drtl_plugin.runtime.progress import Pulse
from drtl_plugin.runtime.tiles import restore
from drtl_plugin.runtime.trained_network import input_multiple

# Images of each validation set that go into the comparison picture.
_NUM_COMPARED = 3

# BasicSR's validation of a loader, with or without saving images; and its running sums of the metrics, by name.
Validate = Callable[['PassLoader', bool], None]
Sums = Callable[[], dict[str, float]]


class PassLoader:
    """A validation loader under the name of a pass, which BasicSR logs.

    BasicSR only adds up the metrics; this loader keeps those of each image. It also shows progress, if BasicSR shows
    no bar.

    Attributes:
        dataset: With the pass's name, where BasicSR looks for it.
        image_name (str): File name, without extension, of the last LQ image.
        metrics (list[tuple[str, dict[str, float]]]): Name and metrics of each image.
    """

    def __init__(self, dataloader: Any, name: str, sums: Sums, shows_progress: bool) -> None:
        self.dataset = SimpleNamespace(opt={**dataloader.dataset.opt, 'name': name})
        self.image_name = ''
        self.metrics: list[tuple[str, dict[str, float]]] = []
        self._dataloader = dataloader
        self._sums = sums
        self._shows_progress = shows_progress

    def __iter__(self) -> Iterator[dict[str, Any]]:
        pulse, sums = Pulse(), self._sums()
        total = dict(sums)
        for count, data in enumerate(self._dataloader, 1):
            self.image_name = Path(data['lq_path'][0]).stem
            sums.update(dict.fromkeys(sums, 0))
            yield data
            self.metrics.append((self.image_name, dict(sums)))
            total = {name: value + sums[name] for name, value in total.items()}
            if self._shows_progress:
                pulse.beat(f'Validating {self.dataset.opt["name"]}: {count} of {len(self)} images')
        sums.update(total)

    def __len__(self) -> int:
        return len(self._dataloader)


class Validator:
    """Validates in passes: bicubic upsampling, the network, and the adapted network.

    Args:
        opt (dict): The parsed option file.

    Attributes:
        results (dict[str, dict[str, float]]): Last metrics, by dataset name with the pass's suffix.
        compared (dict[str, list[ComparedCrop]]): Crops of the first images, by the same names.
        suffix (str): The current pass: ``BICUBIC``, ``BEFORE`` or ``AFTER``.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.results: dict[str, dict[str, float]] = {}
        self.compared: dict[str, list[ComparedCrop]] = {}
        self.suffix = BEFORE
        self._opt = opt
        self._loader: PassLoader | None = None

    def validate(self, dataloader: Any, has_adapted: bool, validate: Validate, sums: Sums, save_img: bool) -> None:
        """Validate while training: bicubic upsampling (once per run), the network, and the adapted network.

        Args:
            dataloader: Of a validation set.
            has_adapted (bool): Whether there is an adapted network.
            validate (Validate): BasicSR's validation.
            sums (Sums): Its running sums of the metrics.
            save_img (bool): Whether to save restored images.
        """
        name = dataloader.dataset.opt['name']
        passes = [BICUBIC] if name + BICUBIC not in self.results else []
        passes += [BEFORE] + [AFTER] * has_adapted
        path = self._opt['path']
        visualization = path['visualization']
        try:
            for suffix in passes:
                self.compared[name + suffix] = []
                # BasicSR names a training run's images by image and iteration; each pass needs its own folder.
                path['visualization'] = visualization + suffix
                self._run_pass(suffix, dataloader, validate, sums, save_img)
        finally:
            path['visualization'] = visualization

    def test(self, dataloader: Any, validate: Validate, sums: Sums, save_img: bool) -> None:
        """Test the network, and bicubic upsampling if there is GT: a table in the log, and each image in a CSV file.

        Args:
            dataloader, validate, sums, save_img: As for :meth:`validate`.
        """
        options = dataloader.dataset.opt
        passes = [BICUBIC] * (bool(self._opt['val'].get('metrics')) and 'dataroot_gt' in options) + [BEFORE]
        images = {
            TEST_PASSES[suffix]: self._run_pass(suffix, dataloader, validate, sums, save_img) for suffix in passes
        }
        if BICUBIC in passes:
            path = Path(self._opt['path']['results_root'], f'metrics_{options["name"]}.csv')
            write_image_metrics(path, images)
            results = {options['name'] + suffix: self.results[options['name'] + suffix] for suffix in passes}
            table = results_table(results, TEST_PASSES)
            get_root_logger().info(f'Mean over {len(dataloader)} images; the metrics of each are in {path}.\n{table}')

    def _run_pass(
        self, suffix: str, dataloader: Any, validate: Validate, sums: Sums, save_img: bool
    ) -> list[tuple[str, dict[str, float]]]:
        """Run one pass; returns name and metrics of each image."""
        name = dataloader.dataset.opt['name'] + suffix
        loader = PassLoader(dataloader, name, sums, not self._opt['val'].get('pbar'))
        self.suffix, self._loader = suffix, loader
        try:
            validate(loader, save_img and suffix != BICUBIC)
        finally:
            self.suffix, self._loader = BEFORE, None
        self.results[name] = dict(sums())
        return loader.metrics

    def restore(self, lq: Tensor, net: nn.Module) -> Tensor:
        """Restore an image in the current pass.

        Args:
            lq (Tensor): ``(1, 3, h, w)``.
            net (nn.Module): The pass's network, in evaluation mode while it restores. Not used for bicubic upsampling.

        Returns:
            Tensor: ``(1, 3, s h, s w)``.
        """
        scale = self._opt.get('scale', 1)
        if self.suffix == BICUBIC:
            height, width = (extent * scale for extent in lq.shape[-2:])
            # torch takes MATLAB's a = -0.5 with antialias only; upsampling needs no antialiasing.
            return F.interpolate(lq, size=(height, width), mode='bicubic', antialias=True)
        window = input_multiple(self._opt['network_g'], scale)
        tiles = {key: value for key, value in (self._opt.get('val') or {}).items() if key in ('tile', 'overlap')}
        training = net.training
        output = restore(net.eval(), lq, scale, window, **tiles)
        net.train(training)
        return output

    def keep_crop(self, output: Tensor, gt: Tensor | None) -> None:
        """Keep a crop of a restored image and its GT, ``(1, 3, H, W)``, if it is one of a pass's first images."""
        if self._loader is None or gt is None:
            return
        crops = self.compared.get(self._loader.dataset.opt['name'])
        if crops is not None and len(crops) < _NUM_COMPARED:
            images = (tensor2img(image.detach().cpu()) for image in (output, gt))
            crops.append(compared_crop(self._loader.image_name, *images))
