"""Option sections: defaults, ranges, and errors that name the key."""

from typing import Annotated, Literal

import pytest
from msgspec import Meta

from drtl_plugin.errors import OptionError
from drtl_plugin.options.basicsr import FileOptions, TrainOptions
from drtl_plugin.options.convert import Section, convert, declared, default, number, parse_section
from drtl_plugin.options.sections import (
    AdaptOptions,
    DRTLOptions,
    InnerOptions,
    TargetOptions,
    TaskDatasetOptions,
    WeightingOptions,
)

TASKS = {'name': 'n', 'type': 't', 'dataroot_gt': 'x'}


def test_defaults_without_a_drtl_section():
    options = DRTLOptions.from_opt({})
    assert options.pipeline == 'meta'
    assert options.weighting.relation == 'transfer'
    assert options.hooks == []


def test_numbers_in_exponent_notation_are_numbers():
    # YAML 1.1 reads 1e-4 as a string.
    assert DRTLOptions.from_opt({'drtl': {'adapt': {'lr': '1e-4', 'steps': '20'}}}).adapt.lr == 1e-4


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'pipelin': 'meta'}, r"drtl: unknown key 'pipelin'; did you mean 'pipeline'\?"),
        ({'inner': {'step': 1}}, r"drtl\.inner: unknown key 'step'; did you mean 'steps'\?"),
        ({'pipeline': 'both'}, r"drtl\.pipeline: 'both' is not one of meta, pretrain"),
        ({'inner': {'steps': 0}}, r'drtl\.inner\.steps: 0 is out of range; it must be at least 1'),
        ({'inner': {'steps': [1]}}, r'drtl\.inner\.steps: expected one number or \[low, high\], got \[1\]'),
        ({'inner': {'steps': [3, 1]}}, r'drtl\.inner\.steps: expected one number or \[low, high\], got \[3, 1\]'),
        (
            {'inner': {'steps': 1.5}},
            r'drtl\.inner\.steps: expected a whole number or a list of whole numbers, got 1\.5',
        ),
        ({'inner': {'lr': True}}, r'drtl\.inner\.lr: expected a number, got True'),
        ({'inner': {'lr': 'fast'}}, r"drtl\.inner\.lr: expected a number, got 'fast'"),
        ({'weighting': {'floor': 2}}, r'drtl\.weighting\.floor: 2 is out of range; it must be between 0 and 1'),
        ({'weighting': 'uniform'}, r"drtl\.weighting: expected a section of keys and values, got 'uniform'"),
        ({'hooks': {'type': 'RelationHook'}}, r'drtl\.hooks: expected a list'),
        ({'hooks': ['RelationHook']}, r"drtl\.hooks\[0\]: expected a section of keys and values, got 'RelationHook'"),
        ({'inner': {'parameters': ['*', 1]}}, r'drtl\.inner\.parameters\[1\]: expected text, got 1'),
        ({'inner': {'checkpoint': 1}}, r'drtl\.inner\.checkpoint: expected true or false, got 1'),
        ({'inner': {'checkpoint': 'true'}}, r"drtl\.inner\.checkpoint: expected true or false, got 'true'"),
        ({'weighting': {'temperature': 'null'}}, r"drtl\.weighting\.temperature: expected a number, got 'null'"),
        ({'inner': {'checkpoint': 'often'}}, r"drtl\.inner\.checkpoint: expected true or false, got 'often'"),
        ({'weighting': {'relation': 3}}, r'drtl\.weighting\.relation: expected text, got 3'),
        (
            {'weighting': {'temperature': 0}},
            r'drtl\.weighting\.temperature: 0 is out of range; it must be at least 1e-06',
        ),
        ({'inner': {'lr': float('inf')}}, r'drtl\.inner\.lr: expected a number, got inf'),
        ({'inner': {'lr': float('nan')}}, r'drtl\.inner\.lr: expected a number, got nan'),
        (
            {'inner': {'steps': 1e30}},
            r'drtl\.inner\.steps: expected a whole number or a list of whole numbers, got 1e\+30',
        ),
        ({'xyz': 1}, r"drtl: unknown key 'xyz'; known: adapt, camera_fit, hooks, inner, pipeline"),
    ],
)
def test_wrong_sections_are_named(section, message):
    with pytest.raises(OptionError, match=message):
        DRTLOptions.from_opt({'drtl': section})


def test_missing_key_says_what_it_is_for():
    with pytest.raises(OptionError, match=r'target\.dataroot_lq is missing: Folder or \.lmdb of LQ images'):
        parse_section(TargetOptions, {'dataroot_gt': 'x'}, 'target')


def test_nested_sections_are_objects():
    section = {'name': 'n', 'type': 't', 'dataroot_gt': 'x', 'target': {'dataroot_gt': 'a', 'dataroot_lq': 'b'}}
    assert parse_section(TaskDatasetOptions, section, 'train').target.num_shot == 5
    assert parse_section(TaskDatasetOptions, {**section, 'target': None}, 'train').target is None


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'target_weight': 0.1}, r"drtl\.target_weight was removed: drtl\.adapt trains on the target's pairs"),
        ({'adapt': {'rank': 4}}, r'drtl\.adapt\.rank was removed: adaptation trains all weights'),
        (
            {'adapt': {'replay_source': 'support'}},
            r'drtl\.adapt\.replay_source was removed: replay draws auxiliary tasks',
        ),
    ],
)
def test_removed_options_are_named_with_their_replacement(section, message):
    with pytest.raises(OptionError, match=message):
        DRTLOptions.from_opt({'drtl': section})


def test_removed_options_of_a_dataset_are_named_in_derived_sections_too():
    class Derived(TaskDatasetOptions):
        darkness: float = 0.5

    with pytest.raises(OptionError, match=r'datasets\.train\.camera_fit was removed: set drtl\.camera_fit'):
        parse_section(Derived, {**TASKS, 'camera_fit': True}, 'datasets.train')


def test_empty_nested_sections_have_all_defaults():
    assert DRTLOptions.from_opt({'drtl': {'inner': None, 'adapt': {}}}) == DRTLOptions()


def test_defaults_can_be_read_without_an_object():
    assert default(TargetOptions, 'num_shot') == 5
    assert default(TargetOptions, 'io_backend') == {'type': 'disk'}


def test_default_lists_and_dicts_are_not_shared():
    first, second = InnerOptions(), InnerOptions()
    assert first.parameters is not second.parameters
    assert parse_section(TaskDatasetOptions, TASKS, 'a').io_backend is not default(TaskDatasetOptions, 'io_backend')


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        AdaptOptions().steps = 3


def test_values_without_a_declared_bound_may_be_negative():
    assert parse_section(TargetOptions, {'dataroot_gt': 'a', 'dataroot_lq': 'b', 'seed': -1}, 'target').seed == -1


class OwnOptions(Section):
    """Options of a class outside of this package: two bounds on one side, no description, a union."""

    label: str
    rate: Annotated[float, Meta(gt=0)] = 1.0
    ratio: Annotated[float, Meta(gt=0, le=1)] = 0.5
    most: Annotated[int, Meta(le=3)] = 1
    size: int | list[int] = 1
    way: Literal['up', 'down'] | None = None
    parts: list[WeightingOptions] = []
    shares: dict[str, float] = {}


@pytest.mark.parametrize(
    ('section', 'message'),
    [
        ({'label': 'a', 'rate': 0}, r'own\.rate: 0 is out of range; it must be above 0\.'),
        ({'label': 'a', 'ratio': 2}, r'own\.ratio: 2 is out of range; it must be above 0 and at most 1\.'),
        ({'label': 'a', 'most': 4}, r'own\.most: 4 is out of range; it must be at most 3\.'),
        ({'label': 'a', 'size': 'a'}, r"own\.size: expected a whole number or a list of whole numbers, got 'a'"),
        ({'label': 'a', 'way': 'null'}, r"own\.way: 'null' is not one of down, up\."),
        ({'label': 'a', 'size': [1, 'b']}, r"own\.size\[1\]: expected a whole number, got 'b'"),
        ({}, r'own\.label is missing\.$'),
    ],
)
def test_sections_of_ones_own_have_the_same_messages(section, message):
    with pytest.raises(OptionError, match=message):
        parse_section(OwnOptions, section, 'own')


def test_numbers_written_as_text_are_numbers_inside_lists_and_sections_too():
    section = {'label': '1', 'size': ['2', '3e1'], 'parts': [{'floor': '1e-1'}], 'shares': {'a': '1e-4'}}
    options = parse_section(OwnOptions, section, 'own')
    assert (options.label, options.size, options.parts[0].floor) == ('1', [2, 30], 0.1)
    assert options.shares == {'a': 1e-4}


@pytest.mark.parametrize(
    ('cls', 'name', 'value', 'expected'),
    [
        (FileOptions, 'num_gpu', 'auto', 'auto'),
        (FileOptions, 'num_gpu', '2', 2),
        (FileOptions, 'manual_seed', None, None),
        (TrainOptions, 'total_iter', 3e5, 300000),
        (TrainOptions, 'ema_decay', '1e-3', 1e-3),
    ],
)
def test_values_are_converted_to_the_declared_type(cls, name, value, expected):
    converted = convert(value, declared(cls)[name].type, name)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ('value', 'kind', 'bounds', 'message'),
    [
        (1.5, int, (), r'key: expected a whole number, got 1\.5'),
        (True, int, (), r'key: expected a whole number, got True'),
        ('inf', float, (), r"key: expected a number, got 'inf'"),
        (10**400, float, (), r'key: expected a number, got 1000'),
        (-1, int, (0,), r'key: -1 is out of range; it must be at least 0'),
        (70000, int, (1, 65535), r'key: 70000 is out of range; it must be between 1 and 65535'),
    ],
)
def test_numbers_out_of_range_or_of_another_kind_are_named(value, kind, bounds, message):
    with pytest.raises(OptionError, match=message):
        number(value, kind, 'key', *bounds)


def test_numbers_are_converted():
    assert number('1e-4', float, 'key') == 1e-4
    assert number(-3.0, int, 'key') == -3
    assert type(number(2, float, 'key')) is float
