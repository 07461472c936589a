import pytest
import torch
from torch.nn import functional as F

from drtl_plugin.archs import DistortionRelationNet
from drtl_plugin.data.distortions import DistortionLibrary
from drtl_plugin.relation.drn_training import disturb_gt, train_drn
from drtl_plugin.relation.estimators import RelationEvidence, embedding_relation


def contents(num: int, generator) -> torch.Tensor:
    """Blobs of random colours with sharp edges."""
    coarse = torch.rand(num, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(64, 64), mode='nearest')


def test_disturbances_stay_within_their_bounds(generator):
    ramp = (torch.arange(64, dtype=torch.float32) / 100 + 0.1).expand(32, 3, 64, 64)
    disturbed = disturb_gt(ramp, generator, scale=4)
    inside = (..., slice(8, 56), slice(8, 56))
    # gain of ±2 %, shift of ±0.6 pixels of a slope of 0.01, noise averaged out
    change = (disturbed - ramp)[inside].mean(dim=(1, 2, 3)).abs()
    assert change.max() < 0.02 * ramp[inside].mean() + 0.006 + 0.001
    assert change.std() > 1e-3  # a new draw for each image
    noise = (disturbed - ramp)[inside].diff(dim=-1).std(dim=(1, 2, 3))
    assert 0.001 < noise.max() < 3 / 255 * 2


def test_shifts_are_up_to_015_pixels_of_the_low_quality_grid(generator):
    ramp = (torch.arange(64, dtype=torch.float32) / 128 + 0.25).expand(64, 3, 64, 64)
    steep, flat = (
        disturb_gt(image, torch.Generator().manual_seed(5), 4) for image in (ramp, torch.full_like(ramp, 0.5))
    )
    # same draws: the flat image has the gain alone
    gain = flat[..., 20:44, 20:44].mean(dim=(1, 2, 3)) / 0.5
    shift = (steep[..., 20:44, 20:44].mean(dim=(1, 2, 3)) / gain - ramp[0, 0, 20:44, 20:44].mean()) * 128
    assert 0.45 < shift.abs().max() < 0.75  # 0.15 · 4 = 0.6, and the noise's mean


def test_training_teaches_distortions_and_not_contents(generator):
    """Tasks are recovled from contents that were never seen, and a stronger blur is nearer to blur than to noise."""
    entries = [
        {'name': 'gaussian_blur', 'sigma': [3.0, 3.5], 'label': 'blur'},
        {'name': 'gaussian_noise', 'sigma': [10, 12], 'label': 'noise'},
        {'name': 'bicubic'},
    ]
    library = DistortionLibrary(entries, 4)
    torch.manual_seed(0)
    net = DistortionRelationNet(num_feat=8, num_embed=8, num_slot=8)

    def draw_pairs(num=4):
        gt = contents(num, generator)
        return gt, torch.stack([task(gt, generator) for task in library.tasks])

    losses = list(train_drn(net, draw_pairs, len(library), 60, 5e-3, generator))
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert not net.training
    gt, lq = draw_pairs(16)
    unseen = contents(16, generator)
    for i, task in enumerate(library.tasks):
        evidence = RelationEvidence(lq, gt, task(unseen, generator), unseen)
        graph = embedding_relation(library.labels, lambda evidence=evidence: evidence, net)
        assert graph.relation.argmax() == i


@pytest.mark.parametrize('size', [16, 23])
def test_patches_of_any_size_are_embedded(size):
    net = DistortionRelationNet(num_embed=12).eval()
    lq = torch.rand(2, 3, size, size)
    embedding = net(lq, lq)
    assert embedding.shape == (2, 12)
    slots = net.memory_bank.slots
    assert (embedding <= slots.max(0).values + 1e-6).all()  # convex combinations of the slots
    assert (embedding >= slots.min(0).values - 1e-6).all()
