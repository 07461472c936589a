"""Properties that hold for whatever is thrown at them: 25 examples each, or 1,000 by ``make test-slow``."""

import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drtl_plugin.data.few_shot_pair_dataset import FewShotPairDataset
from drtl_plugin.data.image_files import names_of_list
from drtl_plugin.errors import DataError, DRTLError, OptionError
from drtl_plugin.options.parse import (
    AdaptOptions,
    DRTLOptions,
    InnerOptions,
    LoggerOptions,
    PathOptions,
    TaskDatasetOptions,
    TrainOptions,
    ValOptions,
    WeightingOptions,
    force_yml,
    load_option_file,
    parse_section,
)
from drtl_plugin.tasks.distortions import DISTORTION_REGISTRY, REDUCTION
from drtl_plugin.tasks.library import DistortionLibrary

pytestmark = pytest.mark.fuzz
SECTIONS = (
    *(AdaptOptions, DRTLOptions, InnerOptions, LoggerOptions, PathOptions, TaskDatasetOptions, TrainOptions),
    *(ValOptions, WeightingOptions),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(['1e-3', 'auto', 'none'])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def one_line(error: DRTLError) -> bool:
    return bool(str(error)) and '\n' not in str(error)


@pytest.mark.parametrize('cls', SECTIONS)
@given(data=st.data())
def test_sections_are_read_or_refused_in_a_line(cls, data):
    known = st.sampled_from(sorted(cls.__dataclass_fields__))
    section = data.draw(st.dictionaries(st.one_of(known, st.text(max_size=8)), VALUES, max_size=6))
    try:
        options = parse_section(cls, section, 'here')
    except OptionError as error:
        assert one_line(error)
        return
    for name, field in cls.__dataclass_fields__.items():
        value = getattr(options, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert field.metadata['low'] <= value <= field.metadata['high']


@given(opt=st.dictionaries(st.sampled_from(['drtl', 'scale']), VALUES))
def test_drtl_sections_are_read_or_refused_in_a_line(opt):
    try:
        assert DRTLOptions.from_opt(opt).adapt.batch_size >= 1
    except OptionError as error:
        assert one_line(error)


@given(text=st.one_of(st.text(), st.binary().map(lambda content: content.decode('latin-1')), VALUES.map(repr)))
def test_option_files_are_read_or_refused_in_a_line(text):
    with tempfile.NamedTemporaryFile('w', suffix='.yml', encoding='utf-8') as file:
        file.write(text.encode('utf-8', 'ignore').decode('utf-8'))
        file.flush()
        try:
            assert isinstance(load_option_file(file.name), dict)
        except OptionError as error:
            assert one_line(error)


@given(keys=st.lists(st.text(max_size=6), min_size=1, max_size=3), value=st.text(max_size=12))
def test_forced_options_change_their_key_or_nothing(keys, value):
    opt = {'a': {'b': 1}, 'c': [1, {'d': 2}]}
    try:
        force_yml(opt, [f'{":".join(keys)}={value}'])
    except OptionError as error:
        assert one_line(error)
        assert opt == {'a': {'b': 1}, 'c': [1, {'d': 2}]}
    else:
        assert {'a', 'c'} <= set(opt)


@st.composite
def steps(draw):
    """An entry of a library, all its parameters within their ranges."""
    name = draw(st.sampled_from([*DISTORTION_REGISTRY.keys(), REDUCTION]))
    if name == REDUCTION:
        return {'name': name}
    kind = DISTORTION_REGISTRY.get(name)
    entry = {'name': name}
    for key, drawn in kind.drawn.items():
        entry[key] = sorted(draw(st.floats(drawn.low, drawn.high)) for _ in range(2))
    for key in kind.fixed:
        entry[key] = draw(st.integers(0, 10)) * 2 + 1
    return entry


@given(
    entries=st.lists(steps(), min_size=1, max_size=3),
    scale=st.sampled_from([1, 2, 3, 4, 8]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    level=st.sampled_from(['black', 'white', 'noise']),
    seed=st.integers(0, 2**31),
)
def test_distortions_give_pictures_of_the_right_size(entries, scale, size, level, seed):
    if sum(entry['name'] == REDUCTION for entry in entries) > 1:
        entries = [entry for entry in entries if entry['name'] != REDUCTION] or [{'name': REDUCTION}]
    library = DistortionLibrary([{'name': 'compose', 'steps': entries}], scale)
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(2, 3, size[0] * scale, size[1] * scale, generator=generator)
    gt = {'black': gt * 0, 'white': gt * 0 + 1, 'noise': gt}[level]
    try:
        lq = library.tasks[0](gt, generator)
    except ValueError as error:
        assert 'is too small for a' in str(error)
        return
    assert lq.shape == (2, 3, *size)
    assert lq.isfinite().all() and lq.min() >= 0 and lq.max() <= 1


NAMES = st.text(st.characters(blacklist_categories=['Cs', 'Cc'], blacklist_characters='/\0.{}'), min_size=1, max_size=6)


@given(
    gt=st.sets(NAMES, max_size=4), lq=st.sets(NAMES, max_size=4), same=st.booleans(), num_shot=st.integers(1, 4),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_pairs_are_found_or_refused_in_a_line(gt, lq, same, num_shot, seed):
    lq = gt if same else lq
    root = Path(tempfile.mkdtemp())
    try:
        for folder, names, side in (('gt', gt, 8), ('lq', lq, 4)):
            (root / folder).mkdir()
            for name in names:
                content = cv2.imencode('.png', np.full((side, side, 3), 9, np.uint8))[1].tobytes()
                (root / folder / f'{name}.png').write_bytes(content)
        opt = {'dataroot_gt': str(root / 'gt'), 'dataroot_lq': str(root / 'lq'), 'num_shot': num_shot, 'seed': seed}
        opt.update(scale=2, phase='train', io_backend={'type': 'disk'})
        try:
            paths = FewShotPairDataset(dict(opt)).paths
        except DataError as error:
            assert one_line(error)
            assert gt != lq or len(gt) < num_shot or any(name.startswith(' ') or name != name.strip() for name in gt)
            return
        assert len({path['gt_path'] for path in paths}) == num_shot
        assert all(Path(path['gt_path']).name == Path(path['lq_path']).name for path in paths)
        assert paths == FewShotPairDataset(dict(opt)).paths
    finally:
        shutil.rmtree(root)


@given(names=st.lists(NAMES.map(str.strip).filter(bool), max_size=4))
def test_listed_names_come_back(names):
    names = [f'{name}.png' for name in names]
    with tempfile.NamedTemporaryFile('w', suffix='.txt', encoding='utf-8') as file:
        file.write('\n'.join(f'{name} (4,5,3)' for name in names))
        file.flush()
        assert names_of_list(file.name, 'key') == names
