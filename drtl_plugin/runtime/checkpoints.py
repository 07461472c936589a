"""Checkpoints: written atomically, read without running code in them, found for resuming, and deleted when old."""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import os
import pickle
import random
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors.torch
import torch
from torch import nn

from drtl_plugin.errors import DataError, DRTLError

_UNFINISHED = '.unfinished'
# Key of the metadata of a safetensors file that holds all of our record.
_RECORD = 'drtl_plugin_record'


class SaveError(DRTLError):
    """A checkpoint could not be written."""


def save(content: Any, path: str | Path) -> None:
    """``torch.save``, atomically: the content is written to another file, synced and renamed.

    Raises:
        SaveError: If it cannot be written, e.g. on a full disk; an existing file of this name is unchanged.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with open(unfinished, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's zip writer, on top of the OSError
        unfinished.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, 'strerror', None) or ' '.join(str(cause).split())
        raise SaveError(
            f'{path}: cannot be written ({reason}). Earlier checkpoints are intact: free some space, then continue '
            'with --auto_resume.'
        ) from error


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, 'O_DIRECTORY'):
        return
    with contextlib.suppress(OSError):  # not all file systems support it
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str | Path, key: str) -> Any:
    """Read weights or a training state onto the CPU; a pickle with code is rejected, and its code does not run.

    Args:
        path (str | Path): The file.
        key (str): Option that names the file, for messages.

    Raises:
        DataError: If the file is missing or damaged, or contains something other than tensors and plain values.
    """
    try:
        if Path(path).suffix == '.safetensors':
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch writes checksums but does not check them
                    raise DataError(f'{key}: {path} is damaged; its checksum is wrong.')
        return torch.load(path, map_location='cpu', weights_only=True)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f'{key}: {path} cannot be read ({error.strerror or error}).') from None
    except Exception as error:  # unpickling a damaged file raises anything
        if isinstance(error, pickle.UnpicklingError) and 'global' in str(error).lower():
            raise DataError(
                f'{key}: {path} contains objects other than tensors and plain values, or code, which is not run; get '
                'the file from another source.'
            ) from None
        raise DataError(f'{key}: {path} is damaged, or contains no weights or state.') from None


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    """Weights without a key, or, of a file of ours, with what a checkpoint of ours records."""
    with safetensors.safe_open(path, 'pt') as file:
        weights = {name: file.get_tensor(name) for name in list(file.keys())}
        record = (file.metadata() or {}).get(_RECORD)
    return weights if record is None else {'params': weights, **json.loads(record)}


def save_safetensors(weights: dict[str, torch.Tensor], record: dict[str, Any], path: str | Path) -> None:
    """Write weights as safetensors, with metadata for other programs and for :func:`read`.

    Args:
        weights (dict[str, Tensor]): By parameter name.
        record (dict): What a checkpoint of ours records: ``network``, ``scale``, ``losses``, ``adaptation``.
        path (str | Path): The file to write.
    """
    about = {key: record[key] if isinstance(record[key], str) else json.dumps(record[key]) for key in record}
    metadata = {**about, 'drtl_plugin': importlib.metadata.version('drtl_plugin'), _RECORD: json.dumps(record)}
    # Tensors that share memory, or have gaps in it, cannot be written.
    copies = {name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}
    unfinished = f'{path}{_UNFINISHED}'
    safetensors.torch.save_file(copies, unfinished, metadata)
    os.replace(unfinished, path)


def weights_in(
    content: Any, path: str | Path, where: str, keys: Sequence[str | None] = ('params', 'params_ema', None)
) -> tuple[str | None, dict[str, torch.Tensor]]:
    """Find the weights in the content of a file, in any of the forms in which weights are published.

    Args:
        content (Any): From :func:`read`.
        path (str | Path): The file, for messages.
        where (str): Option that names the file or the key, for messages.
        keys (Sequence[str | None]): Keys to try, in this order; None: weights without a key.

    Returns:
        tuple[str | None, dict[str, torch.Tensor]]: The key, and the weights by parameter name, without the ``module.``
        of parallel networks.

    Raises:
        DataError: If there are no weights under these keys; names the keys that have some.
    """
    for name in keys:
        weights = content if name is None else content.get(name) if isinstance(content, dict) else None
        if _are_weights(weights):
            return name, {parameter[7 * parameter.startswith('module.') :]: w for parameter, w in weights.items()}
    if len(keys) > 1:
        raise DataError(f'{where}: {path} contains no weights, neither under params_ema or params, nor without a key.')
    wanted = 'without a key' if keys[0] is None else f'under {keys[0]!r}'
    found = [str(name) for name in content if _are_weights(content[name])] if isinstance(content, dict) else []
    if found:
        hint = f'; it has {", ".join(found)}.'
    else:
        hint = '; it has some without a key (null).' if _are_weights(content) else ', nor under another key.'
    raise DataError(f'{where}: {path} contains no weights {wanted}{hint}')


def _are_weights(content: Any) -> TypeGuard[dict[str, torch.Tensor]]:
    return isinstance(content, dict) and bool(content) and all(isinstance(w, torch.Tensor) for w in content.values())


def load_weights(
    net: nn.Module,
    weights: dict[str, torch.Tensor],
    content: Any,
    options: dict | None,
    where: str,
    strict: bool = True,
) -> None:
    """Load weights into a network.

    Args:
        net (nn.Module): The network.
        weights (dict[str, Tensor]): From :func:`weights_in`.
        content (Any): From :func:`read`; checkpoints of this plug-in record their network.
        options (dict | None): Type and arguments of the network, if known.
        where (str): Beginning of the message, e.g. ``path.pretrain_network_g: w.pth does not fit network_g``.
        strict (bool): Whether names must match exactly.

    Raises:
        DataError: If the weights belong to another network; names it, or counts the differing weights.
    """
    try:
        net.load_state_dict(weights, strict=strict)
    except RuntimeError as error:
        recorded = content.get('network') if isinstance(content, dict) else None
        other = _other_network(recorded, options, type(net)) if isinstance(recorded, dict) and options else None
        reason = other or _other_weights(net, weights) or ' '.join(str(error).split())[:300]
        raise DataError(f'{where}: {reason}.') from None


def _other_network(recorded: dict, options: dict, network: type) -> str | None:
    """Difference between the network recorded in a checkpoint and the one that it is loaded into."""
    if recorded.get('type') != options['type']:
        return f'it contains {recorded.get("type")}, not {options["type"]}'
    parameters = inspect.signature(network).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    recorded, options = ({**plain(defaults), **plain(arguments)} for arguments in (recorded, options))
    differences = [
        f'{key} {recorded.get(key)}, not {options.get(key)}'
        for key in dict.fromkeys([*options, *recorded])
        if recorded.get(key) != options.get(key)
    ]
    return f'it contains {options["type"]} with {", ".join(differences)}' if differences else None


def _other_weights(net: nn.Module, weights: dict[str, torch.Tensor]) -> str | None:
    """Number of differing weights, with two examples of each kind."""
    wanted = net.state_dict()
    shapes = [
        f'{name} is {tuple(weights[name].shape)}, not {tuple(weight.shape)}'
        for name, weight in wanted.items()
        if name in weights and weights[name].shape != weight.shape
    ]
    kinds = {
        'missing': [name for name in wanted if name not in weights],
        'unexpected': [name for name in weights if name not in wanted],
        'of another shape': shapes,
    }
    counts = [
        f'{len(names)} {kind} ({", ".join(names[:2])}{", …" * (len(names) > 2)})'
        for kind, names in kinds.items()
        if names
    ]
    return f'weights: {", ".join(counts)}' if counts else None


def plain(options: Any) -> Any:
    """Options as plain dictionaries and lists, which any reader of a checkpoint accepts."""
    if isinstance(options, dict):
        return {key: plain(value) for key, value in options.items()}
    return [plain(value) for value in options] if isinstance(options, (list, tuple)) else options


def losses_learned(train: dict, before: Iterable[str] | None) -> list[str] | None:
    """The losses that a network was trained with, to record in its checkpoint.

    Args:
        train (dict): Section ``train`` of the option file; each ``KIND_opt`` in it is a loss.
        before (Iterable[str] | None): Losses of its initial weights; None: unknown.

    Returns:
        list[str] | None: E.g. ``['gan', 'pixel']``, or None if they are not all known.
    """
    if before is None:
        return None
    return sorted({*before, *(key[:-4] for key, section in train.items() if key.endswith('_opt') and section)})


def newest_valid_state(folder: Path, models: Path, labels: Iterable[str]) -> tuple[Path, dict] | None:
    """Find the newest training state that is readable together with its networks; prints skipped ones to stderr.

    Args:
        folder (Path): Folder of the training states, ``ITERATION.state``.
        models (Path): Folder of the networks, ``LABEL_ITERATION.pth``.
        labels (Iterable[str]): Labels of the required networks, e.g. ``net_g``.

    Returns:
        tuple[Path, dict] | None: File and content of the state, or None if there is no state.

    Raises:
        DataError: If there are states, but none is readable.
    """
    for unfinished in (*folder.glob(f'*{_UNFINISHED}'), *models.glob(f'*{_UNFINISHED}')):
        unfinished.unlink(missing_ok=True)  # left by a run that was killed while saving
    states = [path for path in folder.glob('*.state') if path.stem.isdigit()] if folder.is_dir() else []
    for path in sorted(states, key=lambda path: int(path.stem), reverse=True):
        try:
            networks = {models / f'{label}_{path.stem}.pth' for label in labels}
            for network in sorted(networks.union(models.glob(f'*_{path.stem}.pth'))):
                read(network, '--auto_resume')
            return path, read(path, '--auto_resume')
        except DataError as error:
            print(f'basicsr: warning: iteration {path.stem} is damaged and skipped: {error}', file=sys.stderr)
    if states:
        raise DataError(
            f'--auto_resume: all training states in {folder} are damaged; start again without --auto_resume.'
        )
    return None


def thin_out(opt: dict, current_iter: int, best: Iterable[int]) -> None:
    """Delete old checkpoints, except the last ``logger.keep_checkpoints`` ones up to this iteration and the best ones.

    Checkpoints of later iterations (the run was resumed from an earlier one) and ``net_r_0.pth`` are kept.
    """
    keep = opt['logger'].get('keep_checkpoints')
    if keep is None:
        return
    files = [*Path(opt['path']['training_states']).glob('*.state'), *Path(opt['path']['models']).glob('*.pth')]
    numbered = [(int(match[1]), path) for path in files if (match := re.search(r'(?:^|_)(\d+)\.\w+$', path.name))]
    iterations = sorted({number for number, _ in numbered if 0 < number <= current_iter})
    doomed = set(iterations[:-keep]) - set(best)
    for number, path in numbered:  # states first, since a state without its networks is useless
        if number in doomed:
            path.unlink(missing_ok=True)


def random_state() -> dict:
    """States of the global random generators, as tensors and plain values."""
    name, words, *position = np.random.get_state(legacy=True)
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *position),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    """Restore the states from :func:`random_state`; those of GPUs only if there are as many GPUs."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words), gauss))
    name, words, *position = state['numpy']
    np.random.set_state((name, words.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state['torch'])
    if torch.cuda.is_available() and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state['cuda'])
