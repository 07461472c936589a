"""Everything that lets basicsr 1.4.2 live on today's torch and torchvision, and without a GPU.

Each repair names the upstream fault that it answers and leaves a healthy installation as it is. :func:`apply`
runs them all; ``import drtl_plugin`` calls it before anything of basicsr is imported. :func:`without_gpu` is the
one repair that reaches into torch; only the command line uses it, around BasicSR's pipelines.
:func:`restore_wandb_generate_id` is for runs that log to wandb.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import secrets
import sys
import tempfile
import types
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import torch
from packaging.version import Version
from scipy.ndimage import convolve
from torch.nn.parallel import DistributedDataParallel

# Operators for which torchvision registers fake kernels unconditionally while it is imported: nms (since 0.17 or so)
# and qnms (since 0.28).
_TORCHVISION_SCHEMAS = {
    'nms': 'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms': 'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
}
# Keeps the definitions alive: torch drops a library's operators when the object is collected.
_libraries: list[torch.library.Library] = []
_lmdb_environments: dict[str, object] = {}


def define_missing_torchvision_operators() -> bool:
    """Make ``import torchvision`` succeed where its compiled operators cannot be loaded.

    Fault: torchvision registers fake kernels for its operators at import, although the operators themselves are
    only defined when its shared library loads (it does not beside a CPU build of torch, for one). The import ends in
    "operator torchvision::nms does not exist". Nothing in basicsr calls these operators, so that defining their
    schemas is enough.

    Returns:
        bool: Whether something had to be repaired.

    Raises:
        RuntimeError: If torchvision still cannot be imported; names both versions.
    """
    try:
        importlib.import_module('torchvision')
        return False
    except RuntimeError as error:
        if 'operator torchvision::' not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition('.')[0] == 'torchvision']:
        del sys.modules[name]
    library = torch.library.Library('torchvision', 'FRAGMENT')
    _libraries.append(library)
    for name, schema in _TORCHVISION_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    try:
        importlib.import_module('torchvision')
    except RuntimeError as error:
        raise RuntimeError(
            f'torchvision cannot be imported beside torch {torch.__version__} ({error}): '
            'install the torchvision release that belongs to this torch.'
        ) from error
    return True


def restore_functional_tensor() -> bool:
    """Give basicsr the module ``torchvision.transforms.functional_tensor`` back.

    Fault: ``basicsr/data/degradations.py`` imports ``rgb_to_grayscale`` from it; torchvision removed it in 0.17.

    Returns:
        bool: Whether something had to be repaired.
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False
    functional = importlib.import_module('torchvision.transforms.functional')
    module = types.ModuleType(name)
    module.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules[name] = module
    return True


def restore_modules() -> list[str]:
    """Give basicsr the modules back that newer versions of Python and SciPy no longer have.

    Faults: ``basicsr/archs/arch_util.py`` compares versions by ``distutils.version.LooseVersion``, which Python 3.12
    removed (setuptools brings it back only where it is installed and allowed to); ``basicsr/metrics/niqe.py`` imports
    ``scipy.ndimage.filters``, which SciPy deprecated in 1.8 for removal in 2.0.

    Returns:
        list[str]: The modules that were missing.
    """
    restored = []
    for name, attribute, replacement in (
        ('distutils.version', 'LooseVersion', Version),
        ('scipy.ndimage.filters', 'convolve', convolve),
    ):
        if _exists(name):
            continue
        for parent in (name.rpartition('.')[0], name):
            if not _exists(parent):
                sys.modules[parent] = types.ModuleType(parent)
                sys.modules[parent].__path__ = []
        setattr(sys.modules[name], attribute, replacement)
        restored.append(name)
    return restored


def _exists(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent exists
        return False


def share_lmdb_environments() -> bool:
    """Let several datasets of one process read the same LMDB.

    Fault: ``basicsr.utils.file_client.LmdbBackend`` opens its databases anew for each dataset, and lmdb refuses to
    open a database twice in a process (a forked loader worker included). Read-only environments are opened once and
    shared instead; they are opened without locks, so that a forked process may read through them as well.

    Returns:
        bool: Whether something had to be repaired.
    """
    file_client = importlib.import_module('basicsr.utils.file_client')
    lmdb = importlib.import_module('lmdb')
    client = file_client.FileClient
    with tempfile.TemporaryDirectory() as path:
        lmdb.open(path).close()
        try:
            backends = [client('lmdb', db_paths=path, client_keys='probe') for _ in range(2)]
            for backend in backends:
                backend.client._client['probe'].close()
            _lmdb_environments.pop(os.path.realpath(path), None)
            return False
        except lmdb.Error:
            pass

    class SharedLmdbBackend(file_client.LmdbBackend):
        """``LmdbBackend`` whose read-only environments are shared within the process."""

        def __init__(self, db_paths, client_keys='default', readonly=True, lock=False, readahead=False, **kwargs):
            if not readonly or lock:
                super().__init__(db_paths, client_keys, readonly, lock, readahead, **kwargs)
                return
            self.db_paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
            keys = [client_keys] if isinstance(client_keys, str) else client_keys
            if len(keys) != len(self.db_paths):
                raise ValueError(f'client_keys and db_paths differ in length: {keys} and {self.db_paths}.')
            self._client = {}
            for key, path in zip(keys, self.db_paths):
                real = os.path.realpath(path)
                if real not in _lmdb_environments:
                    _lmdb_environments[real] = lmdb.open(real, readonly=True, lock=False, readahead=readahead, **kwargs)
                self._client[key] = _lmdb_environments[real]

    file_client.FileClient._backends['lmdb'] = SharedLmdbBackend
    return True


def let_filter2d_take_any_layout() -> bool:
    """Let ``filter2D`` blur images of any memory layout.

    Fault: it reshapes by ``view``, which fails on images whose channels lie last, as current torch resizes them
    (``RealESRNetModel`` on the CPU ends in "view size is not compatible").

    Returns:
        bool: Whether something had to be repaired.
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
        module.filter2D = filter2d_of_any_layout
    return True


def load_resume_state(opt: dict) -> dict | None:
    """Find and load the training state to resume from, on any device.

    Answers ``basicsr.train.load_resume_state``, which asks CUDA for its current device even where there is none, and
    gives up where the newest state is damaged.

    Args:
        opt (dict): Parsed options. ``opt['path']['resume_state']`` is set to the state that was found.

    Returns:
        dict | None: The state, on the CPU (BasicSR's optimizers move it to their parameters' device), or None.

    Raises:
        DataError: If the state cannot be read.
    """
    from basicsr.utils import check_resume

    from drtl_plugin import checkpoints
    from drtl_plugin.errors import DataError

    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        # A DRN is there with the relation ``embedding`` only.
        ignored = ['network_r', *(opt['path'].get('ignore_resume_networks') or ())]
        if opt.get('network_d') is None:
            ignored.append('network_d')
        labels = [key.replace('network', 'net') for key in opt if key.startswith('network_') and key not in ignored]
        folders = [Path(opt['path'][key]) for key in ('training_states', 'models')]
        found = checkpoints.newest_valid_state(*folders, labels)
        path, state = found or (None, None)
        opt['path']['resume_state'] = path and str(path)
    elif path is not None:
        state = checkpoints.read(path, 'path.resume_state')
    if path is None:
        return None
    if not isinstance(state, dict) or not {'iter', 'epoch', 'optimizers', 'schedulers'} <= set(state):
        raise DataError(f'path.resume_state: {path} is no training state.')
    written = {key: value for key, value in opt['path'].items() if key.startswith('param_key_')}
    check_resume(opt, state['iter'])
    ignored = opt['path'].get('ignore_resume_networks') or ()
    for key, value in written.items():  # the networks of a training state are under params
        opt['path'][key] = value if key.replace('param_key', 'network') in ignored else 'params'
    for key, network in opt['path'].items():
        if key.startswith('pretrain_network_') and network and Path(network).exists():
            checkpoints.read(network, f'path.{key}')
    return state


def make_swinir_masks_on_its_device() -> bool:
    """Let SwinIR make the attention masks of an image on the device that it is on.

    Fault: for images of another size than ``img_size``, every other block of ``SwinIR`` makes its mask on the CPU and
    copies it, each time. On a GPU that takes many times longer than the network: 81 MiB a block for a tile of 576².

    Returns:
        bool: Whether something had to be repaired.
    """
    from basicsr.archs.swinir_arch import SwinTransformerBlock

    if hasattr(SwinTransformerBlock.calculate_mask, '__wrapped__'):
        return False
    original = SwinTransformerBlock.calculate_mask

    @functools.wraps(original)
    def calculate_mask(self, x_size):
        with self.norm1.weight.device:
            return original(self, x_size)

    SwinTransformerBlock.calculate_mask = calculate_mask
    return True


def resume_on_any_device() -> bool:
    """Put :func:`load_resume_state` in the place of BasicSR's own.

    Returns:
        bool: Whether something had to be repaired.
    """
    train = importlib.import_module('basicsr.train')
    if train.load_resume_state is load_resume_state:
        return False
    train.load_resume_state = load_resume_state
    return True


def make_no_folders_of_files() -> bool:
    """Let ``make_exp_dirs`` leave alone the files that ``path.pretrain_…`` names.

    Fault: it makes a folder of every key of ``path`` except ``pretrain_network…`` and a few others, after it has
    archived the previous run. With ``pretrain_camera_fit`` it ended in "File exists", or for None in a TypeError.

    Returns:
        bool: Whether something had to be repaired.
    """
    pipelines = [importlib.import_module(f'basicsr.{name}') for name in ('train', 'test')]
    make_exp_dirs = pipelines[0].make_exp_dirs
    if make_exp_dirs.__module__ == __name__:
        return False

    def make_exp_dirs_only(opt):
        folders = {key: path for key, path in opt['path'].items() if not key.startswith('pretrain_')}
        make_exp_dirs({**opt, 'path': folders})

    for pipeline in pipelines:
        pipeline.make_exp_dirs = make_exp_dirs_only
    return True


def save_whole_checkpoints() -> bool:
    """Let BasicSR's models write checkpoints whole, or say that they could not.

    Faults: ``BaseModel.save_network`` and ``save_training_state`` write over the file in place, and go on training
    where that fails; they don't say which network the weights are of; ``load_network`` takes weights without a key for
    none; a resumed run has forgotten the best metrics. ``logger.keep_checkpoints`` is ours.

    Returns:
        bool: Whether something had to be repaired.
    """
    from basicsr.models.base_model import BaseModel
    from basicsr.utils import get_root_logger
    from basicsr.utils.dist_util import master_only

    from drtl_plugin import checkpoints

    if BaseModel.save_network.__module__ == __name__:
        return False
    resume = BaseModel.resume_training

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        """Save networks, each under its key, as ``models/NET_LABEL_ITERATION.pth``."""
        options = self.opt.get(f'network_{net_label.partition("_")[2].split("_")[0]}')
        content = {} if options is None else {'network': checkpoints.plain(options), 'scale': self.opt.get('scale', 1)}
        if self.opt.get('train') and net_label.startswith('net_g'):
            losses = checkpoints.losses_learned(self.opt['train'], getattr(self, 'losses_before', ()))
            if losses is not None:
                content['losses'] = losses
        for one, key in zip(*(value if isinstance(value, list) else [value] for value in (net, param_key))):
            state = self.get_bare_model(one).state_dict()
            content[key] = OrderedDict((name[7 * name.startswith('module.') :], w.cpu()) for name, w in state.items())
        name = f'{net_label}_{"latest" if current_iter == -1 else current_iter}.pth'
        checkpoints.save(content, Path(self.opt['path']['models'], name))

    @master_only
    def save_training_state(self, epoch, current_iter, **more):
        """Save what a run needs to go on, and ``more``, as ``training_states/ITERATION.state``."""
        if current_iter == -1:
            return
        best = getattr(self, 'best_metric_results', {})
        # As plain numbers: metrics are NumPy's.
        best = {
            dataset: {name: {**record, 'val': float(record['val'])} for name, record in records.items()}
            for dataset, records in best.items()
        }
        state = {
            **more,
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            'best_metric_results': best,
            'random': checkpoints.random_state(),
        }
        checkpoints.save(state, Path(self.opt['path']['training_states'], f'{current_iter}.state'))
        best_iterations = {record['iter'] for records in best.values() for record in records.values()}
        checkpoints.thin_out(self.opt, current_iter, best_iterations)

    @functools.wraps(resume)
    def resume_training(self, resume_state):
        resume(self, resume_state)
        if resume_state.get('best_metric_results'):
            self.best_metric_results = resume_state['best_metric_results']

    def load_network(self, net, load_path, strict=True, param_key='params'):
        """Load weights. A ``param_key_…`` of the option file must be in the file; a default need not."""
        options = self.opt['path']
        prefix = 'pretrain_network_'
        names = [key for key, path in options.items() if key.startswith(prefix) and path == load_path]
        label = names[0][len(prefix) :] if names else '*'
        network, where, written = f'network_{label}', f'path.{prefix}{label}', f'param_key_{label}'
        keys = [param_key, options.get(written, param_key), 'params_ema', 'params', None]
        content = checkpoints.read(load_path, where)
        if label == 'g':
            self.losses_before = content.get('losses') if isinstance(content, dict) else None
        if written in options and options[written] == param_key:
            key, weights = checkpoints.weights_in(content, load_path, f'path.{written}', [param_key])
        else:
            key, weights = checkpoints.weights_in(content, load_path, where, keys)
        taken = 'without a key' if key is None else f'key {key}'
        get_root_logger().info(f'Loading {type(self.get_bare_model(net)).__name__} from {load_path}, {taken}.')
        self._print_different_keys_loading(net, weights, strict)
        fault = f'{where}: {load_path} does not fit {network}'
        checkpoints.load_weights(self.get_bare_model(net), weights, content, self.opt.get(network), fault, strict)

    for method in (load_network, save_network, save_training_state, resume_training):
        setattr(BaseModel, method.__name__, method)
    return True


def name_unreadable_images() -> bool:
    """Let ``PairedImageDataset`` and ``SingleImageDataset`` name the image that they cannot decode.

    Fault: they end in "'NoneType' object has no attribute 'astype'".

    Returns:
        bool: Whether something had to be repaired.
    """
    from basicsr.data.paired_image_dataset import PairedImageDataset
    from basicsr.data.single_image_dataset import SingleImageDataset
    from basicsr.utils import imfrombytes

    from drtl_plugin.errors import DataError

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
        bool: Whether something had to be repaired.
    """
    from basicsr.data.prefetch_dataloader import PrefetchGenerator

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


def close_basicsr_logs() -> None:
    """Let the next run of this process write a log file of its own.

    Fault: ``get_root_logger`` gives the first run's logger, and its file, to every later run.
    """
    initialized = importlib.import_module('basicsr.utils.logger').initialized_logger
    for name in initialized:
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            handler.close()
            logger.removeHandler(handler)
    initialized.clear()


@contextlib.contextmanager
def quiet_basicsr_log(level: int):
    """Drop the lines of BasicSR's logger up to a level; other loggers go on."""

    def is_above(record: logging.LogRecord) -> bool:
        return record.levelno > level

    logger = logging.getLogger('basicsr')
    logger.addFilter(is_above)
    try:
        yield
    finally:
        logger.removeFilter(is_above)


@contextlib.contextmanager
def without_gpu():
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
    torch.Tensor.cuda = torch.nn.Module.cuda = stay
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.nn.Module.cuda = tensor_cuda, module_cuda


@contextlib.contextmanager
def processes_without_gpu():
    """Let BasicSR's own models run in several processes without GPUs.

    Fault: ``BaseModel.model_to_device`` asks CUDA for its current device even where there is none. A single process,
    and processes with GPUs, see no difference.
    """
    if not torch.distributed.is_initialized() or torch.cuda.is_available():
        yield
        return
    from basicsr.models.base_model import BaseModel

    def wrap(self, net):
        find_unused = self.opt.get('find_unused_parameters', False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=find_unused)

    with mock.patch.object(BaseModel, 'model_to_device', wrap):
        yield


def restore_wandb_generate_id() -> bool:
    """Give ``wandb.util`` the ``generate_id`` that ``init_wandb_logger`` calls.

    Fault: current wandb has it elsewhere; with ``logger.wandb`` a run ended in an AttributeError. Called where wandb is
    wanted, since importing it takes seconds.

    Returns:
        bool: Whether something had to be repaired.
    """
    import wandb

    if hasattr(wandb.util, 'generate_id'):
        return False
    wandb.util.generate_id = lambda length=8: secrets.token_hex(length)[:length]
    return True


def apply() -> None:
    """Apply every repair, in the order in which importing basicsr needs them. May be called again."""
    define_missing_torchvision_operators()
    restore_functional_tensor()
    restore_modules()
    share_lmdb_environments()
    let_filter2d_take_any_layout()
    make_swinir_masks_on_its_device()
    resume_on_any_device()
    make_no_folders_of_files()
    save_whole_checkpoints()
    name_unreadable_images()
    raise_errors_of_prefetching()
