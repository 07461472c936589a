"""Few-shot adaptation of the model's network."""

import copy

import pytest
import torch
from basicsr.utils import get_root_logger
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.models import adapter
from tests.models.helpers import parameters


class TestAdaptation:
    def adapted(self, build, quick_opt, **options):
        quick_opt['drtl']['adapt'].update(steps=4, **options)
        torch.manual_seed(0)
        model = build(quick_opt)
        model.adapt_to_target()
        return model

    def test_replay_draws_auxiliary_patches_by_weight(self, build, quick_opt, monkeypatch):
        model = self.adapted(build, quick_opt, replay=0.5, batch_size=4)
        model.weights = torch.tensor([0.0, 0.0, 4.0, 0.0])
        drawn = []
        monkeypatch.setattr(adapter, 'adaptation', lambda net, criterion, batches, *_: drawn.extend(batches))
        model.adapter.course(model.net_g, model.weights, model.target_pairs, 3)
        assert [lq.shape for lq, _ in drawn] == [(4, 3, 16, 16)] * 3
        for lq, gt in drawn:
            residual = (lq - nn.functional.interpolate(gt, scale_factor=0.25, mode='bicubic', antialias=True)).abs()
            # the third task is noise of 5 to 10 grey levels
            assert residual[2:].mean(dim=(1, 2, 3)).min() > 3 / 255

    @pytest.mark.parametrize('options', [{'replay': 1.0}, {'optimizer': 'inner'}, {'early_stop': True}])
    def test_ways_to_adapt_differ_and_repeat(self, build, quick_opt, options):
        plain = self.adapted(build, copy.deepcopy(quick_opt))
        model = self.adapted(build, copy.deepcopy(quick_opt), **options)
        result = parameters(model.net_g_adapted)
        assert result.shape == parameters(model.net_g).shape
        # Early stopping may find that all steps are best.
        assert options == {'early_stop': True} or not torch.equal(result, parameters(plain.net_g_adapted))
        model.adapt_to_target()
        assert torch.equal(parameters(model.net_g_adapted), result)

    def test_early_stop_holds_pairs_out_then_adapts_to_all(self, build, quick_opt, monkeypatch):
        model = self.adapted(build, quick_opt, early_stop=True)
        adapted_to, judged_by = [], []
        course, patches = model.adapter.course, model.episodes.target_patches

        def spied_course(net, weights, pairs, steps):
            adapted_to.append(([id(lq) for lq, _ in pairs], steps))
            return course(net, weights, pairs, steps)

        def spied_patches(num, generator, pairs=None):
            if num == 32:  # of the held-out pairs
                judged_by.extend(id(lq) for lq, _ in pairs)
            return patches(num, generator, pairs)

        monkeypatch.setattr(model.adapter, 'course', spied_course)
        monkeypatch.setattr(model.episodes, 'target_patches', spied_patches)
        monkeypatch.setattr(adapter, 'best_step', lambda *_: 2)
        model.adapt_to_target()
        (others, first), (everything, second) = adapted_to
        assert (len(others), first, len(everything), second) == (4, 4, 5, 2)
        assert len(judged_by) == 1
        assert set(others) | set(judged_by) == set(everything)

    @pytest.mark.parametrize(
        ('replay', 'batch_size', 'expected'), [(0.05, 8, 1), (0.95, 8, 7), (0.5, 8, 4), (1.0, 8, 8)]
    )
    def test_replay_is_a_share_of_each_batch(self, build, quick_opt, monkeypatch, replay, batch_size, expected):
        model = self.adapted(build, quick_opt, replay=replay, batch_size=batch_size)
        replayed = []
        patches = model.adapter.replayed_patches
        monkeypatch.setattr(model.adapter, 'replayed_patches', lambda num, *g: replayed.append(num) or patches(num, *g))
        model.adapt_to_target()
        assert replayed == [expected] * 4

    def test_progress_counts_the_steps(self, build, quick_opt, monkeypatch, caplog):
        monkeypatch.setattr('drtl_plugin.runtime.progress._FIRST', 0)
        monkeypatch.setattr('drtl_plugin.runtime.progress._INTERVAL', 0)
        monkeypatch.setattr(get_root_logger(), 'propagate', True)
        caplog.set_level('INFO', 'basicsr')
        self.adapted(build, quick_opt)
        counts = dict.fromkeys(line for line in caplog.messages if line.startswith('adaptation: '))
        assert list(counts) == [f'adaptation: {step} of 4 steps' for step in range(1, 5)]

    def test_early_stop_needs_two_pairs(self, build, quick_opt):
        quick_opt['datasets']['train']['target']['num_shot'] = 1
        with pytest.raises(OptionError, match=r'drtl.adapt.early_stop: .* at least 2 pairs'):
            self.adapted(build, quick_opt, early_stop=True)
