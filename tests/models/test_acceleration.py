"""Bfloat16, memory layout and compiling."""

from typing import ClassVar
from unittest import mock

import pytest
import torch
from basicsr.utils import get_root_logger
from torch._dynamo import lookup_backend

from drtl_plugin.errors import OptionError
from drtl_plugin.meta.learner import trainable_parameters
from drtl_plugin.models import acceleration
from drtl_plugin.relation.estimators import ESTIMATOR_REGISTRY, RelationQuestion
from tests.models.helpers import feed, parameters, skip_start


class AutocastRecord(torch.autograd.Function):
    """The identity, which records whether autocast is on in forward and backward passes."""

    forwards: ClassVar[list[bool]] = []
    backwards: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        AutocastRecord.forwards.append(torch.is_autocast_enabled('cpu'))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        AutocastRecord.backwards.append(torch.is_autocast_enabled('cpu'))
        return gradient


class TestBfloat16:
    @pytest.fixture(autouse=True)
    def imitated(self, monkeypatch):
        """Processors that cannot compute in bfloat16 give the same numbers slowly."""
        monkeypatch.setattr(acceleration, 'computes_bfloat16', lambda device: True)

    def test_devices_that_cannot_compute_in_single_precision_and_say_so(self, build, quick_opt, monkeypatch):
        monkeypatch.setattr(acceleration, 'computes_bfloat16', lambda device: False)
        warning = mock.Mock()
        monkeypatch.setattr(get_root_logger(), 'warning', warning)
        quick_opt['drtl'].update(hooks=[])
        gradients = []
        for amp in (None, 'bf16'):
            quick_opt['train']['amp'] = amp
            torch.manual_seed(0)
            model = build(quick_opt)
            skip_start(model)
            feed(model, [0, 1])
            model.optimize_parameters(1)
            gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
        assert torch.equal(*gradients)
        warning.assert_called_once()
        assert warning.call_args.args[0].startswith('train.amp: this device cannot compute in bfloat16')

    @pytest.mark.parametrize('pipeline', ['pretrain', 'meta'])
    def test_gradients_are_those_of_single_precision_but_for_rounding(self, build, quick_opt, pipeline):
        gradients = []
        for amp in (None, 'bf16'):
            quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
            quick_opt['drtl']['weighting']['relation'] = 'uniform'
            quick_opt['train']['amp'] = amp
            torch.manual_seed(0)
            model = build(quick_opt)
            feed(model, [0, 1])
            model.optimize_parameters(1)
            assert {p.dtype for p in model.net_g.parameters()} == {torch.float32}
            gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(model.net_g).values()]))
        single, half = gradients
        assert not torch.equal(single, half)
        # 8 bits of mantissa: 2^-8 a rounding
        assert (half - single).norm() < 0.05 * single.norm()

    @pytest.mark.parametrize(
        ('pipeline', 'algorithm', 'checkpoint'),
        [
            ('pretrain', 'fomaml', False),
            ('meta', 'fomaml', False),
            ('meta', 'maml', False),
            ('meta', 'maml', True),
            ('meta', 'reptile', False),
        ],
    )
    @pytest.mark.parametrize('weights', [(1.0, 1.0), (0.5, 1.5)])
    def test_backward_passes_run_outside_autocast(
        self, build, quick_opt, monkeypatch, pipeline, algorithm, checkpoint, weights
    ):
        """In steps, in the relations that take gradients, and in adaptation."""
        monkeypatch.setattr(AutocastRecord, 'forwards', [])
        monkeypatch.setattr(AutocastRecord, 'backwards', [])
        quick_opt['train']['amp'] = 'bf16'
        quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
        quick_opt['drtl']['inner'].update(algorithm=algorithm, steps=2, checkpoint=checkpoint)
        quick_opt['drtl']['weighting']['relation'] = 'transfer'
        model = build(quick_opt)
        model.net_g.register_forward_hook(lambda net, inputs, output: AutocastRecord.apply(output))
        model.net_g_ema.register_forward_hook(lambda net, inputs, output: AutocastRecord.apply(output))
        skip_start(model)
        model.weights = torch.tensor([*weights, 1.0, 1.0])

        def assert_only_forward_passes_were_in_it():
            assert AutocastRecord.forwards and all(AutocastRecord.forwards)
            assert AutocastRecord.backwards and not any(AutocastRecord.backwards)
            AutocastRecord.forwards.clear()
            AutocastRecord.backwards.clear()

        feed(model, [0, 1])
        model.optimize_parameters(1)
        assert_only_forward_passes_were_in_it()
        evidence = model.episodes.relation_evidence(4, model.num_update)
        ask = RelationQuestion(
            *(model.library.labels, lambda: evidence, None, model.net_g, model.criterion, 1),
            precision=model.precision,
        )
        for relation in ('gradient', 'transfer'):
            ESTIMATOR_REGISTRY.get(relation)(ask)
            assert_only_forward_passes_were_in_it()
        model.adapt_to_target()
        assert_only_forward_passes_were_in_it()

    def test_adaptation_and_relations_use_it(self, build, quick_opt):
        results = []
        for amp in (None, 'bf16'):
            quick_opt['train']['amp'] = amp
            quick_opt['drtl']['weighting']['relation'] = 'transfer'
            torch.manual_seed(0)
            model = build(quick_opt)
            model.prepare()
            next(hook for hook in model.hooks if hasattr(hook, 'measure')).measure(model)
            model.adapt_to_target()
            results.append((parameters(model.net_g_adapted), model.graph.relation))
        (single, relation), (half, half_relation) = results
        assert not torch.equal(single, half)
        assert torch.allclose(single, half, atol=1e-3)
        assert not torch.equal(relation, half_relation)


class TestLayout:
    def test_networks_are_trained_in_what_the_processor_likes(self, build, quick_opt, monkeypatch):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            monkeypatch.setattr(acceleration, 'training_format', lambda device, chosen=memory_format: chosen)
            model = build(quick_opt)
            skip_start(model)
            feed(model, [0, 1])
            model.optimize_parameters(1)
            model.adapt_to_target()
            for net in (model.net_g, model.net_g_ema, model.net_g_adapted):
                assert net.conv_last.weight.is_contiguous(memory_format=memory_format)
            assert model.net_g.conv_last.weight.grad.is_contiguous(memory_format=memory_format)

    def test_uniform_pretraining_is_laid_out_as_srmodel(self, build, quick_opt, monkeypatch):
        monkeypatch.setattr(acceleration, 'training_format', lambda device: torch.channels_last)
        quick_opt['drtl']['pipeline'] = 'pretrain'
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert build(quick_opt).net_g.conv_last.weight.is_contiguous()


class TestCompiled:
    @pytest.fixture
    def traced(self, monkeypatch):
        """Networks as torch.compile traces and differentiates them, without the minute of making machine code."""
        torch.compiler.reset()
        compile_function, graphs = torch.compile, []

        def backend(graph, inputs):
            graphs.append(graph)
            return lookup_backend('aot_eager')(graph, inputs)

        monkeypatch.setattr(torch, 'compile', lambda function: compile_function(function, backend=backend))
        return graphs

    @pytest.mark.parametrize(
        ('pipeline', 'algorithm'), [('pretrain', 'fomaml'), ('meta', 'fomaml'), ('meta', 'reptile')]
    )
    def test_steps_are_those_of_the_plain_network(self, build, quick_opt, traced, pipeline, algorithm):
        quick_opt['drtl'].update(pipeline=pipeline, hooks=[])
        quick_opt['drtl']['inner'].update(algorithm=algorithm, steps=2)
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        quick_opt['train']['ema_decay'] = 0  # so that net_g itself is validated
        gradients, names = [], []
        for compiled in (False, True):
            quick_opt['train']['compile'] = compiled
            torch.manual_seed(0)
            model = build(quick_opt)
            names.append(list(model.net_g.state_dict()))
            traced.clear()  # of the trial
            for step in range(1, 3):
                feed(model, [0, 1])
                model.optimize_parameters(step)
            gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
            assert bool(traced) == compiled
        assert names[0] == names[1]
        plain, fast = gradients
        assert (plain - fast).norm() <= 1e-5 * plain.norm()
        # Neither validation, in any size, nor adaptation is waited for.
        made = len(traced)
        model.lq = torch.rand(1, 3, 17, 23)
        model.test()
        model.adapt_to_target()
        assert len(traced) == made

    def test_what_is_differentiated_twice_is_refused(self, build, quick_opt):
        quick_opt['drtl'].update(pipeline='meta')
        quick_opt['drtl']['inner']['algorithm'] = 'maml'
        quick_opt['train']['compile'] = True
        with pytest.raises(OptionError, match=r'train.compile: .* differentiated twice'):
            build(quick_opt)

    def test_a_machine_without_a_compiler_is_told(self, build, quick_opt, monkeypatch):
        def no_compiler(function):
            raise RuntimeError('No working C++ compiler found\nmore')

        monkeypatch.setattr(torch, 'compile', no_compiler)
        quick_opt['train']['compile'] = True
        with pytest.raises(OptionError, match=r'train.compile: .*\(No working C\+\+ compiler found\)'):
            build(quick_opt)

    @pytest.mark.slow
    def test_machine_code_gives_the_same_steps(self, build, quick_opt):
        quick_opt['drtl'].update(pipeline='meta', hooks=[])
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        gradients = []
        for compiled in (False, True):
            quick_opt['train']['compile'] = compiled
            torch.manual_seed(0)
            model = build(quick_opt)
            feed(model, [0, 1])
            model.optimize_parameters(1)
            gradients.append(torch.cat([p.grad.flatten() for p in model.net_g.parameters()]))
        assert (gradients[1] - gradients[0]).norm() <= 1e-4 * gradients[0].norm()
