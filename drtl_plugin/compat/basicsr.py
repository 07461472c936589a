"""Fixes for BasicSR's own code."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import secrets
from collections.abc import Iterator

import basicsr.test
import basicsr.train
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.data.prefetch_dataloader import PrefetchGenerator
from basicsr.data.single_image_dataset import SingleImageDataset
from basicsr.models.base_model import BaseModel
from basicsr.utils import imfrombytes
from basicsr.utils.logger import initialized_logger
from basicsr.utils.misc import make_exp_dirs as make_all_dirs
from torch.nn.parallel import DistributedDataParallel

from drtl_plugin.errors import DataError
from drtl_plugin.runtime.device import current


def let_filter2d_take_any_layout() -> bool:
    """Let ``filter2D`` blur images of any memory layout.

    Fault: it reshapes with ``view``, which fails on channels-last images, as current torch returns them from resizing
    (``RealESRNetModel`` on the CPU ends in "view size is not compatible").

    Returns:
        bool: Whether a repair was needed.
    """
    names = ('utils.img_process_util', 'models.realesrnet_model', 'models.realesrgan_model')
    modules = [importlib.import_module(f'basicsr.{name}') for name in names]
    filter2d = modules[0].filter2D
    with contextlib.suppress(RuntimeError):
        image = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        filter2d(image, torch.ones(2, 3, 3))
        return False

    @functools.wraps(filter2d)
    def filter2d_of_any_layout(img, kernel):
        return filter2d(img.contiguous(), kernel)

    for module in modules:
        setattr(module, 'filter2D', filter2d_of_any_layout)  # noqa: B010
    return True


def make_exp_dirs(opt: dict) -> None:
    """``basicsr.utils.make_exp_dirs`` that leaves the files of ``path.pretrain_…`` alone.

    Fault: it makes a folder of every key of ``path`` except ``pretrain_network…`` and a few others, after it has
    archived the previous run. With ``pretrain_camera_fit``, it failed with "File exists", or with a TypeError for None.
    """
    folders = {key: path for key, path in opt['path'].items() if not key.startswith('pretrain_')}
    make_all_dirs({**opt, 'path': folders})


def make_no_folders_of_files() -> bool:
    """Replace BasicSR's function with :func:`make_exp_dirs`.

    Returns:
        bool: Whether a repair was needed.
    """
    if basicsr.train.make_exp_dirs is make_exp_dirs:
        return False
    basicsr.train.make_exp_dirs = basicsr.test.make_exp_dirs = make_exp_dirs
    return True


def name_unreadable_images() -> bool:
    """Let ``PairedImageDataset`` and ``SingleImageDataset`` name the image that they cannot decode.

    Fault: they fail with "'NoneType' object has no attribute 'astype'".

    Returns:
        bool: Whether a repair was needed.
    """
    if PairedImageDataset.__getitem__.__module__ == __name__:
        return False

    def naming(get):
        def get_or_name(self, index):
            try:
                return get(self, index)
            except Exception:
                paths = self.paths[index]
                is_pair = isinstance(paths, dict)
                files = {'lq': paths['lq_path'], 'gt': paths['gt_path']} if is_pair else {'lq': paths}
                for key, path in files.items():
                    try:
                        imfrombytes(self.file_client.get(path, key), float32=True)
                    except Exception:
                        folder = self.gt_folder if key == 'gt' else self.lq_folder
                        raise DataError(f'{path} of {folder}: cannot be read as an image.') from None
                raise

        return get_or_name

    for dataset in (PairedImageDataset, SingleImageDataset):
        dataset.__getitem__ = naming(dataset.__getitem__)
    return True


def raise_errors_of_prefetching() -> bool:
    """Let errors of loader processes end a run that prefetches.

    Fault: they end the thread of ``PrefetchGenerator``, and the run waits for its next batch forever.

    Returns:
        bool: Whether a repair was needed.
    """
    if PrefetchGenerator.run.__module__ == __name__:
        return False
    get = PrefetchGenerator.__next__

    def run(self) -> None:
        try:
            for item in self.generator:
                self.queue.put(item)
            self.queue.put(None)
        except Exception as error:
            self.queue.put(error)

    def get_or_raise(self):
        item = get(self)
        if isinstance(item, Exception):
            raise item
        return item

    PrefetchGenerator.run, PrefetchGenerator.__next__ = run, get_or_raise
    return True


def make_swinir_masks_on_its_device() -> bool:
    """Let SwinIR make its attention masks on its own device.

    Fault: for images of another size than ``img_size``, every other block of ``SwinIR`` makes its mask on the CPU and
    copies it, in each forward pass. On a GPU that takes many times longer than the network itself (81 MiB per block for
    a tile of 576²).

    Returns:
        bool: Whether a repair was needed.
    """
    from basicsr.archs.swinir_arch import SwinTransformerBlock

    original = SwinTransformerBlock.calculate_mask
    if hasattr(original, '__wrapped__'):
        return False

    @functools.wraps(original)
    def calculate_mask(self, x_size):
        with self.norm1.weight.device:
            return original(self, x_size)

    SwinTransformerBlock.calculate_mask = calculate_mask
    return True


def let_models_use_other_devices() -> bool:
    """Let ``BaseModel`` compute on the device that ``--device`` names.

    Fault: it knows CUDA and the CPU only.

    Returns:
        bool: Whether it was not replaced before.
    """
    init = BaseModel.__init__
    if init.__module__ == __name__:
        return False

    def init_on_device(self, opt):
        init(self, opt)
        if opt['num_gpu'] == 0 and current().type != 'cuda':
            self.device = current()

    init_on_device.__module__ = __name__
    BaseModel.__init__ = init_on_device
    return True


def distribute_without_gpu() -> bool:
    """Let BasicSR's models run in several processes without GPUs.

    Fault: ``BaseModel.model_to_device`` asks CUDA for its current device even where there is none.

    Returns:
        bool: Whether a repair was needed.
    """
    if BaseModel.model_to_device.__module__ == __name__:
        return False
    to_device = BaseModel.model_to_device

    @functools.wraps(to_device, assigned=('__doc__',))
    def model_to_device(self, net):
        if not self.opt['dist'] or torch.cuda.is_available():
            return to_device(self, net)
        find_unused = self.opt.get('find_unused_parameters', False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=find_unused)

    BaseModel.model_to_device = model_to_device
    return True


def close_basicsr_logs() -> None:
    """Let the next run of this process write a log file of its own.

    Fault: ``get_root_logger`` gives the first run's logger, and its file, to every later run.
    """
    for name in initialized_logger:
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            handler.close()
            logger.removeHandler(handler)
    initialized_logger.clear()


@contextlib.contextmanager
def quiet_basicsr_log(level: int) -> Iterator[None]:
    """Drop the lines of BasicSR's logger up to a level; other loggers are unaffected."""

    def is_above(record: logging.LogRecord) -> bool:
        return record.levelno > level

    logger = logging.getLogger('basicsr')
    logger.addFilter(is_above)
    try:
        yield
    finally:
        logger.removeFilter(is_above)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Make ``.cuda()`` of tensors and modules the identity while there is no GPU.

    Fault: ``RealESRNetModel`` and ``RealESRGANModel`` call it without looking at ``num_gpu``. Where CUDA is
    available, nothing is changed.
    """
    if torch.cuda.is_available():
        yield
        return

    def stay(self, *args, **kwargs):
        return self

    tensor_cuda, module_cuda = torch.Tensor.cuda, torch.nn.Module.cuda
    torch.Tensor.cuda = torch.nn.Module.cuda = stay  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.nn.Module.cuda = tensor_cuda, module_cuda  # type: ignore[method-assign]


def restore_wandb_generate_id() -> bool:
    """Restore ``wandb.util.generate_id``, which ``init_wandb_logger`` calls.

    Fault: current wandb has it elsewhere; with ``logger.wandb`` a run ended in an AttributeError. Called only where
    wandb is wanted, since importing it takes seconds.

    Returns:
        bool: Whether a repair was needed.
    """
    import wandb

    if hasattr(wandb.util, 'generate_id'):
        return False
    wandb.util.generate_id = lambda length=8: secrets.token_hex(length)[:length]
    return True


def repair() -> None:
    """Apply the permanent fixes. May be called again."""
    let_filter2d_take_any_layout()
    make_swinir_masks_on_its_device()
    make_no_folders_of_files()
    name_unreadable_images()
    raise_errors_of_prefetching()
    distribute_without_gpu()
    let_models_use_other_devices()
