import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from drtl_plugin.archs import DistortionRelationNet, TransferRelationNet
from drtl_plugin.archs.drn_arch import PairSpectrum
from drtl_plugin.relation.drn_training import TransferMatrix, disturb_gt, relation_loss, train_drn, train_transfer
from drtl_plugin.relation.estimators import mean_embedding
from drtl_plugin.relation.graph import graph_from_embeddings
from drtl_plugin.tasks.distortions import bicubic
from drtl_plugin.tasks.library import DistortionLibrary


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


def test_loss_is_the_cross_entropy_of_the_graphs_cosines(generator):
    """Against the graph itself: one target at a time, its softmax over the relation."""
    embeddings = torch.randn(3, 6, 5, generator=generator)
    auxiliary, queries = embeddings[:, :3].mean(dim=1), embeddings[:, 3:]
    losses = []
    for sets in (queries, queries.mean(dim=1, keepdim=True)):
        of_sets = []
        for task in range(3):
            for query in sets[task]:
                relation = graph_from_embeddings(list('abc'), auxiliary, query).relation
                of_sets.append(-torch.log_softmax(relation / 0.1, dim=0)[task])
        losses.append(torch.stack(of_sets).mean())
    assert relation_loss(embeddings).item() == pytest.approx(sum(losses).item() / 2, rel=1e-4)


def train(entries: list[dict], seed: int = 0):
    """A small DRN, trained on blobs; the library; the losses."""
    generator = torch.Generator().manual_seed(seed)
    library = DistortionLibrary(entries, 4)
    torch.manual_seed(seed)
    net = DistortionRelationNet(num_feat=16, num_embed=8, num_slot=8)
    gt = contents(32, generator)
    lq = torch.stack([task(gt, generator) for task in library.tasks])
    losses = list(train_drn(net, gt, lq, 60, 5e-3, 8, generator))
    return net, library, losses


@pytest.fixture(scope='module')
def trained():
    entries = [
        {'name': 'gaussian_blur', 'sigma': [3.0, 3.5], 'label': 'blur'},
        {'name': 'gaussian_noise', 'sigma': [10, 12], 'label': 'noise'},
        {'name': 'jpeg', 'quality': [30, 40], 'label': 'jpeg'},
        {'name': 'bicubic'},
    ]
    return train(entries)


def test_training_lowers_the_loss(trained):
    net, _, losses = trained
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert not net.training


def embed(net, task, num: int, generator) -> torch.Tensor:
    gt = contents(num, generator)
    return mean_embedding(net, task(gt, generator), gt)


def test_tasks_are_recovered_from_contents_that_were_never_seen(trained, generator):
    net, library, _ = trained
    auxiliary = torch.stack([embed(net, task, 16, generator) for task in library.tasks])
    for i, task in enumerate(library.tasks):
        graph = graph_from_embeddings(library.labels, auxiliary, embed(net, task, 8, generator))
        assert graph.relation.argmax() == i


def as_a_camera(gt: torch.Tensor, seed: int) -> torch.Tensor:
    """GT that is shifted by up to 0.15 LQ pixels, exposed differently, and noisy."""
    draws = np.random.default_rng(seed)
    images = []
    for img in gt.numpy():
        shifted = scipy.ndimage.shift(img, (0, *draws.uniform(-0.6, 0.6, 2)), order=1, mode='reflect')
        noise = draws.normal(scale=draws.uniform(0, 3 / 255), size=img.shape)
        images.append(draws.uniform(0.98, 1.02) * shifted + noise)
    return torch.from_numpy(np.stack(images)).float().clamp(0, 1)


@pytest.mark.parametrize('seed', [0, 1])
def test_weak_distortions_are_recovered_from_gt_that_is_not_perfect(seed):
    """A DRN that was trained on perfect GT takes the difference for a distortion: it recovers 24 or 25 of the 32."""
    entries = [
        {'name': 'bicubic'},
        {'name': 'gaussian_blur', 'sigma': [1.0, 1.2]},
        {'name': 'gaussian_noise', 'sigma': [2, 3]},
        {'name': 'jpeg', 'quality': [85, 90]},
    ]
    net, library, _ = train(entries, seed)
    generator = torch.Generator().manual_seed(100)
    auxiliary = torch.stack([embed(net, task, 16, generator) for task in library.tasks])
    recovered = 0
    for i, task in enumerate(library.tasks):
        for k in range(8):
            gt = contents(4, generator)
            target = mean_embedding(net, task(gt, generator), as_a_camera(gt, k))
            recovered += int(graph_from_embeddings(library.labels, auxiliary, target).relation.argmax() == i)
    assert recovered >= 30


def test_neighbours_in_strength_are_neighbours_in_embedding(trained, generator):
    """Of blurs that it was not trained on, too."""
    net, _, _ = trained
    blurs = [{'name': 'gaussian_blur', 'sigma': sigma, 'label': str(sigma)} for sigma in (1.0, 2.0, 3.0)]
    weak, middle, strong = (embed(net, task, 16, generator) for task in DistortionLibrary(blurs, 4).tasks)
    assert (weak - middle).norm() < (weak - strong).norm()
    assert (middle - strong).norm() < (weak - strong).norm()


@pytest.mark.parametrize('size', [16, 23])
def test_patches_of_any_size_are_embedded(size):
    net = DistortionRelationNet(num_embed=12).eval()
    lq = torch.rand(2, 3, size, size)
    embedding = net(lq, lq)
    assert embedding.shape == (2, 12)
    slots = net.memory_bank.slots
    assert (embedding <= slots.max(0).values + 1e-6).all()  # convex combinations of the slots
    assert (embedding >= slots.min(0).values - 1e-6).all()


def test_transfer_is_learned_for_contents_and_strengths(generator):
    """Gains fall with the distance of two blurs; blurs that training has not seen are ordered by it, too."""
    sigmas = torch.linspace(1.0, 4.0, 13)
    entries = [{'name': 'gaussian_blur', 'sigma': sigma, 'label': str(sigma)} for sigma in sigmas.tolist()]
    library, spectrum = DistortionLibrary(entries, 4), PairSpectrum(8)

    def features() -> torch.Tensor:
        gt = contents(24, generator)
        return torch.stack([spectrum(task(gt, generator), bicubic(gt, 4)) for task in library.tasks])

    gains = -0.1 * (sigmas[:, None] - sigmas).abs()
    seen, unseen = [0, 2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11]
    auxiliary, target = features(), features()
    matrix = TransferMatrix(gains[seen][:, seen], auxiliary[seen], target[seen])
    torch.manual_seed(0)
    (member,) = TransferRelationNet(num_feat=16, num_member=1).members
    *_, last = train_transfer(member, [matrix], 300, 5e-3, 8, seed=0)
    assert last < 0.1
    with torch.no_grad():
        embeddings = [member.embed(features()[task]).mean(dim=0) for task in range(13)]
        predicted = member.gains(torch.stack(embeddings), torch.stack([embeddings[task] for task in unseen]))
    expected = (gains - gains.mean(dim=0))[:, unseen]
    assert all(spearmanr(predicted[:, i], expected[:, i])[0] > 0.9 for i in range(6))
    assert predicted.std() == pytest.approx(expected.std().item(), rel=0.3)
