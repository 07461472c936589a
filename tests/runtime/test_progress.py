"""What is shown of long work, on a terminal and elsewhere."""

import io
import logging
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from drtl_plugin.api.upscale import upscale
from drtl_plugin.compat.basicsr import quiet_basicsr_log
from drtl_plugin.data.lmdb_files import write_lmdb
from drtl_plugin.runtime import progress as module
from drtl_plugin.runtime.progress import aside, progress, say, seconds_aside, stage
from drtl_plugin.runtime.trained_network import TrainedNetwork
from drtl_plugin.sources.published import prepare_pairs, prepare_subimages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that this module sees, in seconds; as a list of one."""
    now = [1000.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    return now


@pytest.fixture
def log(caplog, monkeypatch):
    """Switch BasicSR's log on; returns its messages."""
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    caplog.set_level(logging.INFO, 'basicsr')
    return caplog


def slowly(clock: list[float], num: int, seconds: float):
    for item in range(num):
        yield item
        clock[0] += seconds


def test_lines_come_after_two_seconds_and_then_every_ten(clock, log):
    assert list(progress(slowly(clock, 18, 1.0), 'relation', 18, 'task')) == list(range(18))
    # The generator has moved the clock when the next item is asked for: item n is done at n - 1 seconds.
    assert log.messages == ['relation: 3 of 18 tasks', 'relation: 13 of 18 tasks']


def test_fast_loops_say_nothing(clock, log, capsys):
    assert len(list(progress(slowly(clock, 10, 0.1), 'relation', 10))) == 10
    assert not log.messages and not capsys.readouterr().err


def test_terminals_show_a_bar(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    assert list(progress(range(3), 'relation', 3, 'task')) == [0, 1, 2]
    assert 'relation: ' in sys.stderr.getvalue() and '/3 [' in sys.stderr.getvalue()


def test_stages_say_how_long_they_took(clock, log):
    with stage('Fitting'):
        clock[0] += 34.25
    assert log.messages == ['Fitting.', 'Fitting took 34.2 s.']


def test_without_the_log_lines_go_to_stderr_but_not_among_bars(log, capsys, monkeypatch):
    """As in ``basicsr adapt``, and in the checks before a run, also after another run of the process."""
    with quiet_basicsr_log(logging.INFO):
        say('on the way')
        assert capsys.readouterr().err == 'basicsr: on the way\n'
        monkeypatch.setattr(sys, 'stderr', Terminal())
        say('on the way')
        assert sys.stderr.getvalue() == ''
    assert not log.messages


def test_lines_go_to_stderr_after_a_run_has_closed_its_log(capsys, monkeypatch):
    logger = logging.getLogger('basicsr')
    monkeypatch.setattr(logger, 'handlers', [])
    monkeypatch.setattr(logger, 'propagate', False)
    monkeypatch.setattr(logger, 'level', logging.INFO)
    say('on the way')
    assert capsys.readouterr().err == 'basicsr: on the way\n'


def test_only_the_first_process_speaks(log, capsys, monkeypatch):
    monkeypatch.setattr(module, 'get_dist_info', lambda: (1, 2))
    say('on the way')
    assert not log.messages and not capsys.readouterr().err


def test_inner_blocks_count_once_and_failures_too(clock):
    before = seconds_aside()
    with aside():
        clock[0] += 1
        with aside():
            clock[0] += 2
    clock[0] += 50
    with pytest.raises(KeyError), aside():
        clock[0] += 4
        raise KeyError
    assert seconds_aside() - before == 7


@pytest.fixture
def eager(monkeypatch):
    """Each step says its line, to stderr, since the log is off."""
    monkeypatch.setattr(module, '_FIRST', 0)
    monkeypatch.setattr(module, '_INTERVAL', 0)
    with quiet_basicsr_log(logging.INFO):
        yield


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three images of 40 by 24 pixels."""
    (tmp_path / 'images').mkdir()
    for name in 'abc':
        cv2.imwrite(str(tmp_path / f'images/{name}.png'), np.full((24, 40, 3), 200, np.uint8))
    return tmp_path / 'images'


def upscale_in_tiles(images: Path, tile: int) -> None:
    network = TrainedNetwork(torch.nn.Upsample(scale_factor=2), {'type': 'nearest'}, 2)
    written, _ = upscale(network, str(images), str(images.parent / 'out'), tile=tile, overlap=4)
    assert len(written) == 3


def test_lmdbs_say_how_far_they_are(eager, images, capsys):
    assert write_lmdb(images, images.with_suffix('.lmdb')) == 3
    assert capsys.readouterr().err.splitlines() == [f'basicsr: LMDB: {i} of 3 images' for i in (1, 2, 3)]


def test_subimages_say_how_far_they_are(eager, images, capsys):
    assert prepare_subimages([str(images)], images.parent / 'cut', 16, 8) == 3 * 4 * 2
    assert capsys.readouterr().err.splitlines() == [f'basicsr: sub-images: {i} of 3 images' for i in (1, 2, 3)]


def test_published_pairs_say_how_far_they_are(eager, images, capsys):
    for phase in ('Train', 'Test'):
        folder = images / f'RealSR/Canon/{phase}/2'
        folder.mkdir(parents=True)
        shutil.copy(images / 'a.png', folder / 'Canon_001_HR.png')
        cv2.imwrite(str(folder / 'Canon_001_LR2.png'), np.zeros((12, 20, 3), np.uint8))
    prepare_pairs('realsr', images / 'RealSR', images.parent / 'pairs', 2)
    assert capsys.readouterr().err.splitlines() == [f'basicsr: realsr: {i} of 2 pairs' for i in (1, 2)]


def test_upscaling_says_how_far_it_is(eager, images, capsys):
    upscale_in_tiles(images, 24)
    assert capsys.readouterr().err.splitlines() == [
        f'basicsr: {line}'
        for i, name in enumerate('abc', 1)
        for line in (f'{name}.png: 1 of 2 tiles', f'{name}.png: 2 of 2 tiles', f'upscale: {i} of 3 images')
    ]


def test_images_and_tiles_take_turns_at_their_lines(eager, images, capsys, monkeypatch):
    """A folder of images that take a few seconds each fills no log."""
    monkeypatch.setattr(module, '_INTERVAL', 600)
    upscale_in_tiles(images, 24)
    assert capsys.readouterr().err == 'basicsr: a.png: 1 of 2 tiles\n'
