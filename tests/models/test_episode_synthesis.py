"""Draws of tasks and patches."""

import pytest
import torch

from tests.models.helpers import batch_of, skip_start


def test_draws_depend_on_seed_step_and_purpose_alone(build, quick_opt):
    model, other = build(quick_opt), build(quick_opt)
    for one in (model, other):
        one.prepare()
    model.episodes.relation_evidence(3, 0)  # whatever was drawn before

    def draws(model, purpose='a', num_update=0):
        generators = model.episodes.generators(purpose, num_update)
        return tuple(torch.rand((), generator=generator).item() for generator in generators)

    found = {draws(model)}
    assert {draws(model), draws(other)} == found
    found.add(draws(model, 'b'))
    found.add(draws(model, num_update=1))
    quick_opt['manual_seed'] += 1
    reseeded = build(quick_opt)
    reseeded.prepare()
    found.add(draws(reseeded))
    assert len({number for pair in found for number in pair}) == 8
    evidence = [vars(model.episodes.relation_evidence(3, 0)).values() for model in (model, other)]
    assert all(map(torch.equal, *evidence))


@pytest.mark.parametrize('mode', ['gradient', 'sampling'])
def test_tasks_are_drawn_uniformly_or_by_weight(build, quick_opt, mode):
    quick_opt['drtl']['weighting'].update(relation='uniform', mode=mode)
    model = build(quick_opt)
    skip_start(model)
    model.weights = torch.tensor([0.4, 1.6, 2.0, 0.0])
    expected = model.weights / 4 if mode == 'sampling' else torch.full((4,), 0.25)
    drawn = torch.zeros(4)
    batch = batch_of(model, 2)
    for model.num_update in range(100):
        model.feed_data(batch)
        drawn += torch.bincount(torch.tensor(model.batch.tasks), minlength=4)
    assert (drawn / 200).tolist() == pytest.approx(expected.tolist(), abs=0.12)
    assert (drawn[3] == 0) == (mode == 'sampling')


def test_a_batch_is_a_function_of_seed_step_and_index(build, quick_opt):
    """Whichever process an episode is in, and whatever else is in its batch."""
    quick_opt['drtl']['weighting'].update(relation='uniform')
    model = build(quick_opt)
    skip_start(model)
    batch = batch_of(model, 3)
    whole = model.episodes.draw(batch, model.weights, 5)
    part = model.episodes.draw({key: value[2:] for key, value in batch.items()}, model.weights, 5)
    assert part.tasks == whole.tasks[2:]
    assert torch.equal(part.lq, whole.lq[2:])
    later = model.episodes.draw(batch, model.weights, 6)
    assert later.tasks != whole.tasks or not torch.equal(later.lq, whole.lq)


def test_support_and_query_are_told_apart(build, quick_opt):
    quick_opt['drtl']['weighting'].update(relation='uniform')
    quick_opt['datasets']['train'].update(num_support=1, num_query=2)
    model = build(quick_opt)
    batch = batch_of(model, 2)
    model.feed_data(batch)
    (support_lq, support_gt), (query_lq, query_gt) = model.batch.support_and_query(1)
    assert torch.equal(support_gt, batch['support_gt'][1]) and torch.equal(query_gt, batch['query_gt'][1])
    assert support_lq.shape == (1, 3, 16, 16) and query_lq.shape == (2, 3, 16, 16)
