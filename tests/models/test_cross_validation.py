"""Adaptation by cross-validation."""

import copy

import pytest
import torch
from torch import nn

from drtl_plugin.errors import OptionError
from drtl_plugin.models.cross_validation import cross_validate, folds_of, num_runs
from tests.models.helpers import parameters


class TestFolds:
    @pytest.mark.parametrize(
        ('sizes', 'num', 'folds'),
        [
            ([(30, 40)] * 3, 5, [[0], [1], [2]]),
            ([(30, 40)] * 5, 5, [[0], [1], [2], [3], [4]]),
            ([(30, 40)] * 7, 3, [[0, 3, 6], [1, 4], [2, 5]]),
        ],
    )
    def test_are_whole_pairs(self, sizes, num, folds):
        found = folds_of(sizes, num)
        assert [[part.pair for part in fold] for fold in found] == folds
        assert all((part.height, part.width) == sizes[part.pair] for fold in found for part in fold)

    @pytest.mark.parametrize('sizes', [[(30, 41)], [(30, 41), (50, 20)], [(31, 31)]])
    def test_are_parts_of_few_pairs(self, sizes):
        """Four, each of which is held out alone; none overlap, and none is narrow."""
        folds = folds_of(sizes, 5)
        assert len(folds) == 4
        covered = [torch.zeros(size) for size in sizes]
        for (part,) in folds:
            covered[part.pair][part.region(1)] += 1
            assert max(part.height, part.width) <= 2.5 * min(part.height, part.width)
        for image in covered:
            assert image.max() == 1
            assert image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2].min() == 1

    def test_gt_is_cut_as_lq_is(self):
        lq = torch.arange(30 * 40).view(30, 40)
        gt = lq.repeat_interleave(3, 0).repeat_interleave(3, 1)
        for (part,) in folds_of([(30, 40)], 5):
            assert torch.equal(gt[part.region(3)][::3, ::3], lq[part.region(1)])


class Scalar(nn.Module):
    def __init__(self, value: float = 0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(value))


THREE = folds_of([(8, 8)] * 3, 5)


def outcome(ends, targets, rates=(1.0,), num_judges=1):
    """Fold k is best at targets[k]; adapting without it at a rate leads to ends[rate][k]."""
    return cross_validate(
        Scalar(),
        THREE,
        rates,
        lambda fold, lr: Scalar(ends[lr][fold]),
        lambda net, fold: (net.theta.item() - targets[fold]) ** 2,
        num_judges,
    )


class TestChoice:
    def test_the_rate_is_the_best_on_the_first_fold(self):
        ends = {0.1: [0.2] * 3, 1.0: [0.9, 0.8, 1.0], 3.0: [-1.0] * 3}
        chosen = outcome(ends, [1.0, 1.0, 1.0], (0.1, 1.0, 3.0))
        assert (chosen.lr, chosen.share) == (1.0, 1.0)
        assert chosen.result.theta.item() == pytest.approx(0.9)  # the mean
        assert [net.theta.item() for net in chosen.networks] == pytest.approx([0.9, 0.8, 1.0])
        assert [trial.lr for trial in chosen.trials] == [0.1, 1.0, 3.0]
        assert chosen.trials[0].loss == pytest.approx(0.8**2)

    @pytest.mark.parametrize(('num_judges', 'lr'), [(1, 3.0), (2, 1.0), (3, 1.0), (9, 1.0)])
    def test_the_rate_is_the_best_on_several_folds_together(self, num_judges, lr):
        """The first fold alone likes 3 better; on the second one it is far worse."""
        ends = {1.0: [0.8, 0.9, 1.0], 3.0: [1.0, 3.0, 1.0]}
        chosen = outcome(ends, [1.0, 1.0, 1.0], (1.0, 3.0), num_judges)
        assert chosen.lr == lr
        assert [net.theta.item() / chosen.share for net in chosen.networks] == pytest.approx(ends[lr])

    @pytest.mark.parametrize('num_judges', [1, 2, 3, 9])
    def test_runs_are_counted(self, num_judges):
        runs = []

        def adapted(fold, lr):
            runs.append((fold, lr))
            return Scalar(1.0)

        cross_validate(Scalar(), THREE, (1.0, 3.0, 9.0), adapted, lambda net, fold: 1.0, num_judges)
        assert len(runs) == len(set(runs)) == num_runs(3, 3, num_judges)

    def test_it_goes_as_far_as_all_folds_together_like(self):
        chosen = outcome({1.0: [1.0, 1.0, 1.0]}, [0.5, 0.6, 0.7])
        assert chosen.share == 0.6
        assert chosen.result.theta.item() == pytest.approx(0.6)
        expected = sum((0.6 - target) ** 2 for target in (0.5, 0.6, 0.7)) / (0.5**2 + 0.6**2 + 0.7**2)
        assert chosen.losses[0.6] == pytest.approx(expected)

    def test_it_stays_where_nothing_is_gained(self):
        chosen = outcome({1.0: [1.0, 1.0, 1.0]}, [-0.5, -0.5, -0.5])
        assert chosen.share == 0
        assert chosen.result.theta.item() == 0
        assert 'stay as they were' in chosen.in_words()

    def test_one_fold_that_gains_does_not_outweigh_two_that_lose(self):
        assert outcome({1.0: [1.0, 1.0, 1.0]}, [1.0, -1.0, -1.0]).share == 0

    def test_a_fold_that_was_almost_perfect_does_not_outweigh_the_others(self):
        """Its loss rises to 81 times that before adaptation, but by less than the others fall."""
        assert outcome({1.0: [1.0, 1.0, 1.0]}, [0.1, 1.0, 1.0]).share >= 0.7

    def test_what_ends_in_nan_is_not_chosen(self):
        ends = {0.1: [0.5] * 3, 1.0: [float('nan')] * 3}
        assert outcome(ends, [1.0] * 3, (1.0, 0.1)).lr == 0.1
        assert outcome({1.0: ends[1.0]}, [1.0] * 3).result.theta.item() == 0


class TestAdapting:
    @pytest.fixture
    def model(self, build, quick_opt):
        quick_opt['drtl']['adapt'].update(
            folds=5, steps=2, lr=[1e-4, 1e-3], replay=0, batch_size=8, schedule='linear', ema_decay=0
        )
        model = build(quick_opt)
        model.prepare()
        return model

    @pytest.mark.parametrize('num', [5, 1], ids=['pairs', 'quarters of a pair'])
    def test_judges_by_what_was_held_out(self, model, num):
        """Pair k, or quarter k of one, is of the brightness k / 10, so that each pixel tells where it comes from."""
        folds = num if num > 1 else 4
        images = [torch.full((3, 128, 128), 25 * k, dtype=torch.uint8) for k in range(folds)]
        if num == 1:
            images = [torch.cat([torch.cat(images[:2], dim=2), torch.cat(images[2:], dim=2)], dim=1)]
        model.adapter.pairs = [(gt[:, ::4, ::4], gt) for gt in images]
        calls = []

        def criterion(output, gt):
            calls.append((output.requires_grad, {round(value * 255 / 25) for value in gt.unique().tolist()}))
            return nn.functional.mse_loss(output, gt)

        model.adapter.criterion = criterion
        model.adapt_to_target()
        trained = [seen for trains, seen in calls if trains]
        held_out = [0, 1, *range(folds)]  # the first two folds at two rates, the others at one
        assert len(trained) == 2 * len(held_out)
        for run, fold in enumerate(held_out):
            assert set().union(*trained[2 * run : 2 * run + 2]) == set(range(folds)) - {fold}
        assert {tuple(seen) for trains, seen in calls if not trains} == {(k,) for k in range(folds)}

    def test_repeats_and_leaves_the_network_alone(self, model):
        before = copy.deepcopy(model.net_g.state_dict())
        model.adapt_to_target()
        first = parameters(model.net_g_adapted)
        model.adapt_to_target()
        assert torch.equal(parameters(model.net_g_adapted), first)
        assert all(torch.equal(value, before[name]) for name, value in model.net_g.state_dict().items())
        assert model.adapter.in_words() == '7 times 2 steps on 5 pairs'

    def test_the_networks_of_the_folds_average_to_the_result(self, model):
        model.adapt_to_target()
        chosen = model.adapter.cross_validation
        mean = torch.stack([parameters(net) for net in chosen.networks]).mean(0)
        assert torch.allclose(mean, parameters(chosen.result), atol=1e-6)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'lr': []}, r'drtl\.adapt\.lr: the list is empty'),
            ({'folds': 0}, r'drtl\.adapt\.lr: only with drtl\.adapt\.folds'),
            ({'folds': 1}, r'drtl\.adapt\.folds: at least 2'),
            ({'early_stop': True}, r'drtl\.adapt\.early_stop: .* remove one'),
            ({'replay': 0.5}, r'drtl\.adapt\.replay: .* set it to 0'),
            ({'optimizer': 'inner'}, r'drtl\.adapt\.optimizer: .* set adam'),
        ],
    )
    def test_options_that_contradict_each_other(self, build, quick_opt, options, message):
        quick_opt['drtl']['adapt'].update({'folds': 5, 'lr': [1e-4, 1e-3], 'replay': 0, **options})
        with pytest.raises(OptionError, match=message):
            build(quick_opt)
