"""The JSON schema and the reference of options, against what is read, and against the shipped option files."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from drtl_plugin.options.file import OptionLoader
from drtl_plugin.options.schema import json_schema, reference
from tests.conftest import OPTIONS

DOCS = OPTIONS.parent / 'docs'


def test_the_files_are_of_these_options():
    """``python -m drtl_plugin.options.schema .`` makes them anew."""
    assert json.loads((OPTIONS / 'options.schema.json').read_text(encoding='utf-8')) == json_schema()
    assert (DOCS / 'options.md').read_text(encoding='utf-8') == reference()


def test_it_is_a_schema():
    validator = jsonschema.Draft202012Validator
    assert validator(validator.META_SCHEMA).is_valid(json_schema())
    assert not validator(validator.META_SCHEMA).is_valid({**json_schema(), 'type': 'none'})


@pytest.mark.parametrize('path', sorted(OPTIONS.glob('*.yml')), ids=lambda path: path.name)
def test_shipped_files_are_valid(path: Path):
    text = path.read_text(encoding='utf-8')
    jsonschema.validate(yaml.load(text, OptionLoader), json_schema())
    assert text.startswith('# yaml-language-server: $schema=options.schema.json\n')


def test_files_of_basicsr_are_valid():
    """A model, networks, datasets and losses of its own, in the form of its option files."""
    opt = yaml.safe_load("""
        name: gan
        model_type: SRGANModel
        scale: 4
        num_gpu: auto
        datasets:
          train: {name: a, type: RealESRGANDataset, dataroot_gt: x, blur_kernel_size: 21}
          val: {name: b, type: PairedImageDataset, dataroot_gt: x, dataroot_lq: y, io_backend: {type: disk}}
          val_2: {name: c, type: SingleImageDataset, dataroot_lq: x}
        network_g: {type: MSRResNet}
        network_d: {type: VGGStyleDiscriminator}
        path: {pretrain_network_g: ~, resume_state: ~}
        train: {optim_d: {type: Adam}, gan_opt: {type: GANLoss}}
        val: ~
    """)
    validator = jsonschema.validators.validator_for(json_schema())
    assert list(validator(json_schema()).iter_errors(opt)) == []


@pytest.mark.parametrize(
    'keys, value',
    [
        (['drtl', 'weigthing'], {}),
        (['drtl', 'weighting', 'mode'], 'sample'),
        (['drtl', 'weighting', 'floor'], 1.5),
        (['drtl', 'inner', 'steps'], 0),
        (['drtl', 'adapt', 'steps'], 'many'),
        (['datasets', 'train', 'num_suport'], 4),
        (['datasets', 'train', 'target', 'num_shots'], 5),
        (['datasets', 'train', 'target', 'names'], 'a'),
        (['datasets', 'trian'], {'type': 'x'}),
        (['datasets', 'val', 'dataroot_hq'], 'x'),
        (['train', 'ema_decay'], 2),
        (['train', 'amp'], 'fp16'),
        (['scale'], 0),
        (['name'], None),
    ],
)
def test_slips_are_found(keys, value):
    opt = yaml.load((OPTIONS / 'drtl_x4.yml').read_text(encoding='utf-8'), OptionLoader)
    section = opt
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(opt, json_schema())
