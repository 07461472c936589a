import os
import subprocess
import sys
import types

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.utils.file_client import FileClient, LmdbBackend

from drtl_plugin.compat import basicsr as repairs
from drtl_plugin.compat import lmdb as shared_lmdb
from drtl_plugin.compat import torchvision as torchvision_repairs
from drtl_plugin.data.lmdb_files import write_lmdb
from drtl_plugin.errors import DataError

FAKE_TORCHVISION = """
import torch
for op in {operators}:
    @torch.library.register_fake('torchvision::' + op)
    def fake(dets, scores, iou_threshold):
        return dets
imported = True
"""
DRIVER = """
import importlib.util, sys
sys.path.insert(0, {folder!r})
spec = importlib.util.spec_from_file_location('compat', {compat!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
print(compat.define_missing_operators())
import torchvision
print(torchvision.imported)
"""


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [({}, '5000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'ACTIVE'}, 'None')],
)
def test_threads_spin_little_unless_the_user_says_otherwise(environment, expected):
    clean = {key: value for key, value in os.environ.items() if key not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    # What the environment is by the time torch, and OpenMP with it, is loaded.
    script = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch':
            sys.exit(os.environ.get('GOMP_SPINCOUNT'))

sys.meta_path.insert(0, Watch())
import drtl_plugin
import torch
"""
    result = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, env={**clean, **environment}
    )
    assert (result.stderr.strip() or 'None') == expected


def run_with_torchvision(tmp_path, source: str) -> subprocess.CompletedProcess:
    (tmp_path / 'torchvision').mkdir()
    (tmp_path / 'torchvision' / '__init__.py').write_text(source)
    driver = DRIVER.format(folder=str(tmp_path), compat=torchvision_repairs.__file__)
    return subprocess.run([sys.executable, '-c', driver], capture_output=True, text=True)


def test_missing_operators_are_defined(tmp_path):
    result = run_with_torchvision(tmp_path, FAKE_TORCHVISION.format(operators=['nms', 'qnms']))
    assert result.stdout.split() == ['True', 'True'], result.stderr


def test_healthy_torchvision_is_left_alone(tmp_path):
    assert run_with_torchvision(tmp_path, 'imported = True').stdout.split() == ['False', 'True']


def test_unknown_missing_operator_names_the_versions(tmp_path):
    result = run_with_torchvision(tmp_path, FAKE_TORCHVISION.format(operators=['brand_new']))
    assert result.returncode != 0
    assert f'torchvision cannot be imported with torch {torch.__version__}' in result.stderr


def test_other_import_errors_of_torchvision_pass_through(tmp_path):
    result = run_with_torchvision(tmp_path, "raise RuntimeError('disk on fire')")
    assert 'disk on fire' in result.stderr
    assert 'cannot be imported with' not in result.stderr


def test_functional_tensor_gives_torchvisions_function():
    from torchvision.transforms.functional import rgb_to_grayscale
    from torchvision.transforms.functional_tensor import rgb_to_grayscale as restored

    image = torch.rand(2, 3, 4, 4)
    assert torch.equal(restored(image), rgb_to_grayscale(image))
    assert not torchvision_repairs.restore_functional_tensor()  # nothing left to repair


@pytest.fixture
def small_lmdb(tmp_path):
    path = str(tmp_path / 'small.lmdb')
    with lmdb.open(path) as env, env.begin(write=True) as txn:
        txn.put(b'key', b'value')
    return path


def test_one_lmdb_serves_several_datasets_and_forked_workers(small_lmdb):
    clients = [FileClient('lmdb', db_paths=[small_lmdb], client_keys=['gt']) for _ in range(2)]
    assert [client.get('key', 'gt') for client in clients] == [b'value'] * 2
    child = os.fork()
    if child == 0:
        value = FileClient('lmdb', db_paths=[small_lmdb], client_keys=['gt']).get('key', 'gt')
        os._exit(0 if value == b'value' else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_lmdb_is_repaired_once():
    backend = FileClient._backends['lmdb']
    assert backend is not LmdbBackend
    assert not shared_lmdb.share_environments()
    assert FileClient._backends['lmdb'] is backend


def test_the_lmdb_fault_exists_upstream(small_lmdb):
    first = LmdbBackend([small_lmdb], ['gt'])
    with pytest.raises(Exception, match='already open'):
        LmdbBackend([small_lmdb], ['gt'])
    assert first.get('key', 'gt') == b'value'


def test_writable_lmdb_backends_are_basicsrs_own(small_lmdb):
    backend = FileClient('lmdb', db_paths=small_lmdb, client_keys='gt', readonly=False)
    assert backend.get('key', 'gt') == b'value'
    assert os.path.realpath(small_lmdb) not in shared_lmdb._environments


def test_shared_lmdb_wants_a_key_for_each_path(small_lmdb):
    with pytest.raises(ValueError, match='differ in length'):
        FileClient('lmdb', db_paths=[small_lmdb], client_keys=['lq', 'gt'])


def test_filter2d_takes_images_of_any_layout():
    from basicsr.models import realesrnet_model
    from basicsr.utils.img_process_util import filter2D

    image, kernel = torch.rand(2, 3, 16, 16), torch.rand(2, 5, 5)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    assert realesrnet_model.filter2D is filter2D
    assert torch.equal(filter2D(channels_last, kernel), filter2D(image, kernel))
    with pytest.raises(RuntimeError, match='view'):
        filter2D.__wrapped__(channels_last, kernel)  # the fault upstream
    assert not repairs.let_filter2d_take_any_layout()  # tries, and finds no fault any more
    assert realesrnet_model.filter2D is filter2D


def test_masks_of_swinir_are_made_where_it_is():
    from basicsr.archs.swinir_arch import SwinTransformerBlock

    block = SwinTransformerBlock(8, (16, 16), 2, window_size=8, shift_size=4)
    upstream = SwinTransformerBlock.calculate_mask.__wrapped__
    assert torch.equal(block.calculate_mask((24, 32)), upstream(block, (24, 32)))
    block.to('meta')  # stands for a GPU
    assert block.calculate_mask((24, 32)).device.type == 'meta'
    assert upstream(block, (24, 32)).device.type == 'cpu'  # the fault
    assert not repairs.make_swinir_masks_on_its_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_gpu_cuda_calls_stay_on_the_cpu():
    tensor, module = torch.zeros(1), torch.nn.Linear(1, 1)
    with repairs.without_gpu():
        assert tensor.cuda() is tensor
        assert module.cuda() is module
    with pytest.raises((AssertionError, RuntimeError)):
        tensor.cuda()


def test_wandb_has_ids_again(monkeypatch):
    """A stand-in for current wandb, whose ``util`` has no ``generate_id``."""
    wandb = types.ModuleType('wandb')
    wandb.util = types.ModuleType('wandb.util')
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    assert repairs.restore_wandb_generate_id()
    ids = {wandb.util.generate_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(name) == 8 and name.isalnum() for name in ids)
    assert not repairs.restore_wandb_generate_id()


@pytest.mark.slow
def test_modules_that_newer_versions_lack_are_given_back():
    """Where neither Python nor setuptools has distutils, and SciPy no ``ndimage.filters``."""
    script = """
import sys
import scipy.ndimage

def is_missing(name):
    return name.partition('.')[0] == 'distutils' or name == 'scipy.ndimage.filters'

class Missing:
    def find_spec(self, name, path=None, target=None):
        if is_missing(name):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Missing())
for name in filter(is_missing, list(sys.modules)):
    del sys.modules[name]
import drtl_plugin
from basicsr.archs.arch_util import LooseVersion
from basicsr.metrics.niqe import convolve
print(LooseVersion('0.9.0') < LooseVersion('0.29.2+cpu'), convolve is scipy.ndimage.convolve)
"""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert result.stdout.split() == ['True', 'True'], result.stderr


@pytest.mark.slow
def test_nothing_that_python_3_14_removed_is_needed():
    """The list is that of "What's New In Python 3.14"; it holds on older versions, where the names are deleted."""
    script = """
import ast, importlib.abc, importlib.resources, pkgutil  # Python 3.10's importlib.resources needs the deleted names
for module, names in (
    (ast, ('Bytes', 'Ellipsis', 'NameConstant', 'Num', 'Str')),
    (importlib.abc, ('ResourceReader', 'Traversable', 'TraversableResources')),
    (pkgutil, ('find_loader', 'get_loader')),
):
    for name in names:
        if name in vars(module):
            delattr(module, name)
import drtl_plugin, drtl_plugin.cli, drtl_plugin.preflight
import basicsr.archs, basicsr.data, basicsr.losses, basicsr.metrics, basicsr.models
print('imported')
"""
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True)
    assert result.stdout.split() == ['imported'], result.stderr


@pytest.mark.parametrize('backend', ['disk', 'lmdb'])
def test_other_errors_of_single_images_are_their_own(tmp_path, backend):
    """Only an image that cannot be decoded is named; here, a mean is no number."""
    from basicsr.data.single_image_dataset import SingleImageDataset

    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.png'), np.zeros((8, 8, 3), np.uint8))
    write_lmdb(tmp_path / 'images', tmp_path / 'images.lmdb')
    root = tmp_path / ('images.lmdb' if backend == 'lmdb' else 'images')
    opt = {'phase': 'test', 'dataroot_lq': str(root), 'io_backend': {'type': backend}}
    with pytest.raises(ValueError, match="too many dimensions 'str'"):
        SingleImageDataset({**opt, 'mean': ['a', 'b', 'c'], 'std': [1, 1, 1]})[0]


def test_single_images_of_an_lmdb_that_cannot_be_decoded_are_named(tmp_path):
    from basicsr.data.single_image_dataset import SingleImageDataset

    with lmdb.open(str(tmp_path / 'x.lmdb')) as env, env.begin(write=True) as txn:
        txn.put(b'key', b'no image')
    (tmp_path / 'x.lmdb/meta_info.txt').write_text('key.png (8,8,3) 1\n')
    opt = {'phase': 'test', 'dataroot_lq': str(tmp_path / 'x.lmdb'), 'io_backend': {'type': 'lmdb'}}
    with pytest.raises(DataError, match=r'key of .*x\.lmdb: cannot be read as an image'):
        SingleImageDataset(opt)[0]
