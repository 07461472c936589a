"""The paper's system: its two option files are what they claim, and their runs weight tasks by cosines of the DRN."""

import csv

import pytest
import torch
from torch.nn import functional as F

from drtl_plugin import cli
from drtl_plugin.archs import DistortionRelationNet
from drtl_plugin.models.episode_synthesis import Episodes
from drtl_plugin.options.file import load_option_file
from drtl_plugin.options.sections import DRTLOptions
from drtl_plugin.tasks.distortions import bicubic
from tests.conftest import OPTIONS

pytestmark = pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])


def test_the_settings_are_those_of_the_paper(pipeline):
    opt = load_option_file(str(OPTIONS / f'drtl_paper_{pipeline}_x4.yml'))
    drtl = DRTLOptions.from_opt(opt)
    assert drtl.pipeline == pipeline
    assert opt['network_r']['type'] == 'DistortionRelationNet'
    assert (drtl.weighting.relation, drtl.weighting.mode) == ('embedding', 'gradient')
    assert (drtl.weighting.temperature, drtl.weighting.floor) == (1, 0)  # a plain softmax
    assert not drtl.camera_fit and 'fit_share' not in opt['drtl']['weighting']
    assert drtl.adapt.replay == 0
    (hook,) = drtl.hooks
    assert hook.get('interval', 10000) > opt['train']['total_iter']  # the relation is measured once


def test_the_rest_is_as_in_the_file_of_the_default(pipeline):
    """Same network, data and schedule, so that the results can be compared."""
    name = {'pretrain': 'drtl_pretrain_x4', 'meta': 'drtl_x4'}[pipeline]
    opt, default = (load_option_file(str(OPTIONS / f'{file}.yml')) for file in (f'drtl_paper_{pipeline}_x4', name))
    assert opt['drtl'].get('inner') == default['drtl'].get('inner')
    assert opt['drtl']['adapt'] == default['drtl']['adapt']
    for section in (opt, default):
        for key in ('name', 'drtl', 'network_r'):
            section.pop(key, None)
    assert opt == default


def test_a_run_weights_gradients_by_a_softmax_of_the_cosines(pipeline, workdir, build):
    path = OPTIONS / f'drtl_paper_{pipeline}_x4.yml'
    shorter = ['name=short', 'train:total_iter=3', 'val:val_freq=3', 'drtl:adapt:steps=1', 'network_g:num_feat=8']
    shorter += ['network_g:num_block=1', 'drtl:hooks:0:drn_steps=20', 'drtl:hooks:0:drn_contents=32']
    shorter += ['drtl:hooks:0:num_patches=16', 'datasets:train:num_worker_per_gpu=0', 'logger:use_tb_logger=false']
    assert cli.main(['train', '-opt', str(path), '--force_yml', *shorter]) == 0
    root = workdir / 'experiments/short'
    with open(root / 'weights.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    weights = torch.tensor([float(row['weight']) for row in rows])
    assert len(weights) == 17 and {row['iteration'] for row in rows} == {'0'}
    assert weights.max() > 1.2 * weights.min()

    model = build(load_option_file(str(path)))
    net = DistortionRelationNet().eval()
    net.load_state_dict(torch.load(root / 'models/net_r_0.pth', weights_only=True)['params'])
    evidence = Episodes(model.train_set, None, torch.device('cpu'), seed=0).relation_evidence(16, 0)
    with torch.no_grad():
        reduced, target = (bicubic(gt, 4) for gt in (evidence.auxiliary_gt, evidence.target_gt))
        tasks = torch.stack([net(lq, reduced).mean(0) for lq in evidence.auxiliary_lq])
        camera = net(evidence.target_lq, target).mean(0)
    cosines = F.cosine_similarity(tasks - tasks.mean(0), (camera - tasks.mean(0))[None])
    torch.testing.assert_close(weights, 17 * torch.softmax(cosines, 0), rtol=1e-4, atol=1e-4)
