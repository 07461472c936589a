"""Everything that lets basicsr 1.4.2 live on today's torch and torchvision, and without a GPU.

Each repair names the upstream fault that it answers and leaves a healthy installation as it is. :func:`apply`
runs them all; ``import drtl_plugin`` calls it before anything of basicsr is imported. :func:`without_gpu` is the
one repair that reaches into torch; only the command line uses it, around BasicSR's pipelines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
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
    unpickles whatever the file holds.

    Args:
        opt (dict): Parsed options. ``opt['path']['resume_state']`` is set to the state that was found.

    Returns:
        dict | None: The state, on the CPU (BasicSR's optimizers move it to their parameters' device), or None.
    """
    from basicsr.utils import check_resume

    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        folder = Path(opt['path']['training_states'])
        states = sorted(folder.glob('*.state'), key=lambda state: float(state.stem)) if folder.is_dir() else []
        path = opt['path']['resume_state'] = str(states[-1]) if states else None
    if path is None:
        return None
    state = torch.load(path, map_location='cpu', weights_only=True)
    check_resume(opt, state['iter'])
    return state


def resume_on_any_device() -> bool:
    """Put :func:`load_resume_state` in the place of BasicSR's own, where there is no GPU.

    Returns:
        bool: Whether something had to be repaired.
    """
    train = importlib.import_module('basicsr.train')
    if torch.cuda.is_available() or train.load_resume_state is load_resume_state:
        return False
    train.load_resume_state = load_resume_state
    return True


@contextlib.contextmanager
def resuming_within_epoch():
    """Let a resumed run go on with the samples that it has not seen yet.

    Fault: a resumed run starts the interrupted epoch anew, with the same order of samples: it trains on its first
    part again, and never on the rest. A run that is not resumed sees no difference.
    """
    train = importlib.import_module('basicsr.train')
    load, sampler_class = train.load_resume_state, train.EnlargedSampler
    resumed = {}

    def remember(opt):
        state = load(opt)
        if state is not None:
            resumed.update(epoch=state['epoch'], iter=state['iter'], batch=_loader_batch_size(opt))
        return state

    class ResumingSampler(sampler_class):
        """``EnlargedSampler`` that leaves out, in the epoch that was interrupted, what was seen before."""

        def __iter__(self):
            indices = list(super().__iter__())
            if not resumed or self.epoch != resumed['epoch']:
                return iter(indices)
            steps_an_epoch = len(indices) // resumed['batch']
            return iter(indices[(resumed['iter'] - self.epoch * steps_an_epoch) * resumed['batch'] :])

    train.load_resume_state, train.EnlargedSampler = remember, ResumingSampler
    try:
        yield
    finally:
        train.load_resume_state, train.EnlargedSampler = load, sampler_class


def _loader_batch_size(opt: dict) -> int:
    """Samples a step that a process loads, as ``build_dataloader`` has it."""
    devices = 1 if opt['dist'] else max(opt['num_gpu'], 1)
    return opt['datasets']['train']['batch_size_per_gpu'] * devices


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


def apply() -> None:
    """Apply every repair, in the order in which importing basicsr needs them. May be called again."""
    define_missing_torchvision_operators()
    restore_functional_tensor()
    share_lmdb_environments()
    let_filter2d_take_any_layout()
    resume_on_any_device()
