"""Lets BasicSR's models save through :mod:`drtl_plugin.runtime.checkpoints`: atomically, and with an error on failure.

Faults: ``BaseModel.save_network`` and ``save_training_state`` overwrite files in place, and training goes on if that
fails; weights don't record their network; ``load_network`` does not find weights without a key; a resumed run forgets
its best metrics.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path

from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only

from drtl_plugin.runtime import checkpoints
from drtl_plugin.runtime.recognition import SPANDREL_NETWORK, recognise

_resume_training = BaseModel.resume_training


@master_only
def save_network(self, net, net_label, current_iter, param_key='params'):
    """Save networks, each under its key, as ``models/NET_LABEL_ITERATION.pth``."""
    options = self.opt.get(f'network_{net_label.partition("_")[2].split("_")[0]}')
    content = {} if options is None else {'network': checkpoints.plain(options), 'scale': self.opt.get('scale', 1)}
    if options is not None and options['type'] == SPANDREL_NETWORK:
        del content['network']['checkpoint']  # these weights can be recognised by themselves
    if self.opt.get('train') and net_label.startswith('net_g'):
        losses = checkpoints.losses_learned(self.opt['train'], getattr(self, 'losses_before', ()))
        if losses is not None:
            content['losses'] = losses
    if net_label == 'net_g_adapted' and getattr(self, 'adaptation', None):
        content['adaptation'] = self.adaptation
    for one, key in zip(*(value if isinstance(value, list) else [value] for value in (net, param_key)), strict=True):
        state = self.get_bare_model(one).state_dict()
        content[key] = OrderedDict((name[7 * name.startswith('module.') :], w.cpu()) for name, w in state.items())
    name = f'{net_label}_{"latest" if current_iter == -1 else current_iter}.pth'
    checkpoints.save(content, Path(self.opt['path']['models'], name))


@master_only
def save_training_state(self, epoch, current_iter, **more):
    """Save what a run needs to resume, and ``more``, as ``training_states/ITERATION.state``."""
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


@functools.wraps(_resume_training, assigned=('__name__', '__doc__'))
def resume_training(self, resume_state):
    _resume_training(self, resume_state)
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
    found = None
    if (self.opt.get(network) or {}).get('type') == SPANDREL_NETWORK:
        found = recognise(content, f'{where}: {load_path}')
    if found is not None:
        key, weights = None, found.net.state_dict()
    elif written in options and options[written] == param_key:
        key, weights = checkpoints.weights_in(content, load_path, f'path.{written}', [param_key])
    else:
        key, weights = checkpoints.weights_in(content, load_path, where, keys)
    taken = 'without a key' if key is None else f'key {key}'
    get_root_logger().info(f'Loading {type(self.get_bare_model(net)).__name__} from {load_path}, {taken}.')
    self._print_different_keys_loading(net, weights, strict)
    fault = f'{where}: {load_path} does not fit {network}'
    checkpoints.load_weights(self.get_bare_model(net), weights, content, self.opt.get(network), fault, strict)


def install() -> bool:
    """Replace the methods of ``BaseModel`` that save and load.

    Faults: ``save_network`` and ``save_training_state`` overwrite the file in place, continue training if that
    fails, and don't record the network; ``load_network`` rejects weights without a key; a resumed run has lost the
    best metrics. ``logger.keep_checkpoints`` is ours.

    Returns:
        bool: Whether they were not replaced before.
    """
    if BaseModel.save_network is save_network:
        return False
    for method in (load_network, save_network, save_training_state, resume_training):
        setattr(BaseModel, method.__name__, method)
    return True
