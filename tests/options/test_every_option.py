"""Each documented option, with a value other than its default, in an option file that the command carries out.

The options are those that :mod:`drtl_plugin.options` and the shipped hooks declare. A new one fails
``test_no_option_is_left_out`` until one of the files below sets it.
"""

import inspect
import shutil

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn
from torch.nn import functional as F

from drtl_plugin import cli
from drtl_plugin.hooks import META_HOOK_REGISTRY
from drtl_plugin.hooks.base import DEFAULT_HOOKS
from drtl_plugin.options.basicsr import SECTIONS, FileOptions, PairedDatasetOptions
from drtl_plugin.options.convert import Section, declared, default, section_class
from drtl_plugin.options.sections import DRTLOptions, TaskDatasetOptions
from drtl_plugin.sources.sample import SAMPLE_ROOT
from drtl_plugin.tasks.camera_fit import CameraFit

NOT_PASSED = {
    'dist_params.backend': 'read with --launcher slurm only',
    'dist_params.port': 'read with --launcher slurm only',
    'logger.wandb': 'needs an account',
    'train.compile': 'the C++ compiler takes a minute; tests/test_acceleration.py',
}
# Set by BasicSR.
NOT_WRITTEN = {'phase', 'scale'}


def declared_options() -> dict[str, object]:
    """The documented options, and their defaults."""
    options = of_section(FileOptions, '', without={'datasets', 'drtl', *SECTIONS})
    for name, section in SECTIONS.items():
        options.update(of_section(section, f'{name}.'))
    options.update(of_section(DRTLOptions, 'drtl.', without={'hooks'}))
    options.update(of_section(TaskDatasetOptions, 'DistortionTaskDataset.', NOT_WRITTEN))
    options.update(of_section(PairedDatasetOptions, 'PairedImageDataset.', NOT_WRITTEN))
    for name in DEFAULT_HOOKS:
        for parameter in inspect.signature(META_HOOK_REGISTRY.get(name)).parameters.values():
            options[f'{name}.{parameter.name}'] = parameter.default
    return options


def of_section(section: type[Section], prefix: str, without: set[str] = frozenset()) -> dict[str, object]:
    options = {}
    for name, field in declared(section).items():
        nested = section_class(field.type)
        if nested is not None:
            options.update(of_section(nested, f'{prefix}{name}.'))
        elif name not in without:
            options[prefix + name] = default(section, name)
    return options


def written(opt: dict, prefix: str = '') -> list[tuple[str, object]]:
    """The options of a file, by the names that :func:`declared_options` gives them, and their values."""
    options = []
    for key, value in opt.items():
        options.append((prefix + key, value))
        if key == 'hooks':
            for hook in value:
                options += written(hook, f'{hook["type"]}.')
        elif key == 'datasets':
            for dataset in value.values():
                options += written(dataset, f'{dataset["type"]}.')
        elif isinstance(value, dict):
            options += written(value, f'{prefix}{key}.')
    return options


MODELS = 'experiments/first/models'

FIRST = yaml.safe_load(f"""
name: first
model_type: DRTLModel
scale: 4
num_gpu: auto
manual_seed: 1
datasets:
  train:
    name: tasks
    type: DistortionTaskDataset
    dataroot_gt: {SAMPLE_ROOT}/auxiliary
    meta_info_file: auxiliary.txt
    gt_size: 64
    image_cache_mb: 8
    num_support: 1
    num_query: 1
    batch_size_per_gpu: 2
    num_worker_per_gpu: 0
    distortions: [{{name: bicubic}}, {{name: gaussian_blur}}, {{name: jpeg}}]
    target:
      dataroot_gt: {SAMPLE_ROOT}/camera/support/gt
      dataroot_lq: support_x4
      filename_tmpl: '{{}}x4'
      meta_info_file: support.txt
      num_shot: 1
      seed: 1
  val:
    name: camera
    type: PairedImageDataset
    dataroot_gt: {SAMPLE_ROOT}/camera/val/gt
    dataroot_lq: {SAMPLE_ROOT}/camera/val/lq
    io_backend: {{type: disk}}
network_g: {{type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_block: 1, upscale: 4}}
network_r: {{type: DistortionRelationNet, num_feat: 8, num_embed: 8, num_slot: 8}}
drtl:
  camera_fit: false
  inner: {{algorithm: maml, checkpoint: true, steps: 2, batch_size: 2, lr: 0.02, parameters: [conv_*], rate_lr: 0.001}}
  weighting: {{relation: embedding, effective_tasks: 2}}
  adapt: {{steps: 1, batch_size: 2}}
  hooks:
    - type: RelationHook
      interval: 2
      drn_steps: 2
      drn_lr: 0.001
      drn_patches: 2
      drn_contents: 4
      num_patches: 4
      transfer_steps: 1
      transfer_lr: 0.001
    - {{type: NanGuardHook, max_skips: 1}}
path: {{pretrain_network_g: ~, pretrain_camera_fit: ~}}
train:
  total_iter: 2
  warmup_iter: 1
  ema_decay: 0.5
  optim_g: {{type: Adam, lr: 0.001}}
  scheduler: {{type: MultiStepLR, milestones: [1], gamma: 0.5}}
  pixel_opt: {{type: L1Loss}}
val:
  val_freq: 2
  save_img: true
  pbar: false
  tile: 48
  overlap: 4
  metrics: {{psnr_y: {{type: calculate_psnr, crop_border: 4, test_y_channel: true}}}}
logger: {{print_freq: 1, save_checkpoint_freq: 1, use_tb_logger: true, keep_checkpoints: 1}}
""")

SECOND = {
    **FIRST,
    'name': 'second',
    'path': {
        'pretrain_network_g': f'{MODELS}/net_g_latest.pth',
        'param_key_g': 'params_ema',
        'strict_load_g': False,
        'pretrain_network_r': f'{MODELS}/net_r_latest.pth',
        'strict_load_r': False,
        'pretrain_camera_fit': 'fit.pth',
        'pretrain_inner_rates': f'{MODELS}/inner_rates_latest.pth',
    },
    'drtl': {
        **FIRST['drtl'],
        'weighting': {'relation': 'embedding', 'temperature': 0.5, 'floor': 0.1, 'fit_share': 0.5, 'mode': 'gradient'},
        'adapt': {'steps': 1, 'batch_size': 2, 'optimizer': 'inner', 'early_stop': True},
        'camera_fit': True,
    },
    'train': {**FIRST['train'], 'amp': 'bf16'},
}
SECOND['datasets'] = {**FIRST['datasets'], 'train': {**FIRST['datasets']['train']}}
SECOND['datasets']['train'].update(num_worker_per_gpu=1, persistent_workers=True)
SECOND['datasets']['train']['target'] = {**FIRST['datasets']['train']['target'], 'num_shot': 2}

RESUMED = {
    **SECOND,
    'path': {
        **SECOND['path'],
        'resume_state': 'experiments/second/training_states/2.state',
        'ignore_resume_networks': ['network_r'],
    },
    'train': {**SECOND['train'], 'total_iter': 3},
}

ADAPTED = {
    **{key: FIRST[key] for key in ('scale', 'num_gpu', 'network_g', 'val')},
    'name': 'adapted',
    'model_type': 'DRTLAdaptModel',
    'datasets': {
        'train': {
            'name': 'tasks',
            'type': 'DistortionTaskDataset',
            'dataroot_gt': f'{SAMPLE_ROOT}/auxiliary',
            'gt_size': 64,
            'target': {
                'dataroot_gt': f'{SAMPLE_ROOT}/camera/support/gt',
                'dataroot_lq': f'{SAMPLE_ROOT}/camera/support/lq',
                'names': ['4_rocket'],
            },
        }
    },
    'drtl': {
        'weighting': {'relation': 'uniform'},
        'adapt': {
            'steps': 1,
            'batch_size': 2,
            'folds': 2,
            'schedule': 'linear',
            'replay': 0,
            'mixup': 0.5,
            'rgb_permutation': 0.5,
        },
    },
    'path': {
        'pretrain_network_g': f'{MODELS}/net_g_adapted_latest.pth',
        'pretrain_camera_fit': 'fit.pth',
    },
    'train': {'pixel_opt': {'type': 'L1Loss'}},
}

DISCRIMINATOR = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}

PRETRAINED = {
    **{key: value for key, value in FIRST.items() if key != 'network_r'},
    'name': 'pretrained',
    'datasets': {
        'train': {
            'name': 'tasks',
            'type': 'DistortionTaskDataset',
            'dataroot_gt': 'auxiliary.lmdb',
            'io_backend': {'type': 'lmdb'},
            'gt_size': 64,
            'num_support': 1,
            'num_query': 1,
            'num_episodes': 8,
            'seed': 1,
            'use_hflip': False,
            'use_rot': False,
            'batch_size_per_gpu': 2,
            'num_worker_per_gpu': 2,
            'prefetch_mode': 'cpu',
            'num_prefetch_queue': 2,
            'pin_memory': True,
            'target': {
                'dataroot_gt': 'support_gt.lmdb',
                'dataroot_lq': 'support_lq.lmdb',
                'io_backend': {'type': 'lmdb'},
                'num_shot': 2,
            },
        },
        'val': {
            'name': 'camera',
            'type': 'PairedImageDataset',
            'dataroot_gt': 'support_gt.lmdb',
            'dataroot_lq': 'support_lq.lmdb',
            'io_backend': {'type': 'lmdb'},
        },
    },
    'drtl': {
        'pipeline': 'pretrain',
        'camera_fit': False,
        'weighting': {'relation': 'uniform'},
        'adapt': {
            'steps': 1,
            'lr': 0.001,
            'warmup': 1,
            'batch_size': 2,
            'replay': 0,
            'ema_decay': 0.5,
        },
    },
    'network_d': DISCRIMINATOR,
    'path': {'pretrain_network_d': 'net_d.pth', 'param_key_d': None, 'strict_load_d': False},
    'train': {
        **FIRST['train'],
        'perceptual_opt': {'type': 'CoarseLoss'},
        'msssim_opt': {'type': 'MSSSIMLoss', 'loss_weight': 0.2},
        'frequency_opt': {'type': 'FFTLoss'},
        'gan_opt': {'type': 'GANLoss', 'gan_type': 'hinge', 'loss_weight': 0.1},
        'relativistic': True,
        'optim_d': {'type': 'Adam', 'lr': 0.0001},
        'net_d_iters': 2,
        'net_d_init_iters': 1,
    },
}

PAIRS = {
    'type': 'PairedImageDataset',
    'dataroot_gt': f'{SAMPLE_ROOT}/camera/support/gt',
    'dataroot_lq': 'support_x4',
    'filename_tmpl': '{}x4',
    'io_backend': {'type': 'disk'},
    'meta_info_file': 'support.txt',
    'mean': [0.5],
    'std': [0.5],
    'color': 'y',
}
PLAIN = {
    **{key: FIRST[key] for key in ('scale', 'num_gpu', 'train', 'logger')},
    'name': 'plain',
    'model_type': 'SRModel',
    'find_unused_parameters': True,
    'datasets': {
        'train': {
            **PAIRS,
            'name': 'pairs',
            'use_shuffle': False,
            'gt_size': 64,
            'use_hflip': False,
            'use_rot': False,
            'batch_size_per_gpu': 2,
            'num_worker_per_gpu': 1,
            'dataset_enlarge_ratio': 2,
            'prefetch_mode': 'cpu',
            'num_prefetch_queue': 2,
            'pin_memory': True,
        },
        'val': {**PAIRS, 'name': 'camera'},
    },
    'network_g': {'type': 'MSRResNet', 'num_in_ch': 1, 'num_out_ch': 1, 'num_feat': 8, 'num_block': 1, 'upscale': 4},
    'path': {},
    'val': {'val_freq': 2, 'save_img': False},
}
TESTED = {
    **{key: PLAIN[key] for key in ('scale', 'num_gpu', 'model_type', 'network_g')},
    'name': 'tested',
    'datasets': {'test_1': {**PAIRS, 'name': 'camera'}},
    'path': {'pretrain_network_g': 'experiments/plain/models/net_g_latest.pth'},
    'val': {'save_img': True, 'suffix': '_tested'},
}

PERSISTENT = {
    **PLAIN,
    'name': 'persistent',
    'datasets': {
        'train': {
            **{key: value for key, value in PLAIN['datasets']['train'].items() if 'prefetch' not in key},
            'persistent_workers': True,
        }
    },
}

# Files of a sequence use what the files before them have made.
SEQUENCES = {
    'meta': [FIRST, SECOND, RESUMED, ADAPTED],
    'pretrain': [PRETRAINED],
    'plain': [PLAIN, PERSISTENT, TESTED],
}


class CoarseLoss(nn.Module):
    """A perceptual loss that needs no trained network."""

    def forward(self, output, gt):
        return F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(gt, 4)), None


@pytest.mark.parametrize('name', SEQUENCES)
def test_files_are_carried_out(workdir, write_opt, capsys, monkeypatch, name):
    monkeypatch.setattr(LOSS_REGISTRY, '_obj_map', {**LOSS_REGISTRY._obj_map, 'CoarseLoss': CoarseLoss})
    support = workdir / SAMPLE_ROOT / 'camera/support'
    (workdir / 'support_x4').mkdir()
    for path in (support / 'lq').iterdir():
        shutil.copy(path, workdir / f'support_x4/{path.stem}x4.png')
    for file, folder in (('support.txt', support / 'gt'), ('auxiliary.txt', workdir / SAMPLE_ROOT / 'auxiliary')):
        (workdir / file).write_text('\n'.join(path.name for path in sorted(folder.iterdir())))
    for folder in ('auxiliary', 'camera/support/gt', 'camera/support/lq'):
        lmdb = '_'.join(folder.split('/')[-2:]).replace('camera_', '') + '.lmdb'
        assert cli.main(['lmdb', f'{SAMPLE_ROOT}/{folder}', lmdb]) == 0
    torch.save(build_network(DISCRIMINATOR).state_dict(), workdir / 'net_d.pth')
    fit = CameraFit(
        scale=4,
        kernel=torch.full((3, 8, 8), 1 / 64),
        tone=torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 3),
        shift=torch.zeros(2, 2),
        noise=torch.full((3, 3), 1e-4),
        colour_correlation=torch.eye(3),
        neighbour_correlation=0.1,
        gt_sigma=0.5,
        explained=0.9,
        explained_left_out=0.8,
    )
    torch.save(fit.state(), workdir / 'fit.pth')
    for opt in SEQUENCES[name]:
        command = 'train' if 'train' in opt else 'test'
        assert cli.main([command, '-opt', write_opt(opt)]) == 0, (opt['name'], capsys.readouterr().err)


def test_no_option_is_left_out():
    options = declared_options()
    assert {'name', 'path.pretrain_camera_fit', 'drtl.inner.lr', 'RelationHook.interval'} <= set(options)
    assert {'DistortionTaskDataset.target.num_shot', 'PairedImageDataset.color'} <= set(options)
    values = [item for sequence in SEQUENCES.values() for opt in sequence for item in written(opt)]
    changed = {name for name, value in values if name in options and value != options[name]}
    assert set(options) - changed == set(NOT_PASSED)
