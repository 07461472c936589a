"""The DRN that is shipped, on cameras and contents that its training has not seen."""

import json
from pathlib import Path

import pytest
import torch
from basicsr.utils import imfrombytes, img2tensor
from scipy.stats import spearmanr
from torch import nn

from drtl_plugin.models.relation_net import load_shipped
from drtl_plugin.relation.estimators import RelationEvidence, RelationQuestion, predicted_transfer
from drtl_plugin.sources.sample import SCALE, prepare_sample_data
from drtl_plugin.tasks.library import DistortionLibrary
from drtl_plugin.tasks.patches import paired_patches

TRUTH = Path(__file__).resolve().parents[2] / 'benchmarks/transfer_truth/sample_x4_0.json'


@pytest.fixture(scope='module')
def net() -> nn.Module:
    return load_shipped('TransferRelationNet')


@pytest.fixture(scope='module')
def sample(tmp_path_factory) -> Path:
    return prepare_sample_data(tmp_path_factory.mktemp('data') / 'sample')


def images(folder: Path) -> list[torch.Tensor]:
    return [(img2tensor(imfrombytes(path.read_bytes()))).round().byte() for path in sorted(folder.iterdir())]


def relation(net: nn.Module, library: DistortionLibrary, auxiliary: list, pairs: list) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    gt = paired_patches([(image, image) for image in auxiliary], 64, 24 * SCALE, generator)[1]
    lq = torch.stack([task(gt, generator) for task in library.tasks])
    evidence = RelationEvidence(lq, gt, *paired_patches(pairs, 64, 24, generator))
    return predicted_transfer(RelationQuestion(library.labels, lambda: evidence, net, net, nn.L1Loss())).relation


def test_ranks_tasks_by_what_they_teach_about_the_sample_camera(net, sample):
    """The PSNR of networks that were trained on one task each, on other photographs, from scratch."""
    library = DistortionLibrary('default', SCALE)
    pairs = list(zip(images(sample / 'camera/support/lq'), images(sample / 'camera/support/gt'), strict=True))
    found = relation(net, library, images(sample / 'auxiliary'), pairs)
    psnr = json.loads(TRUTH.read_text(encoding='utf-8'))
    assert list(psnr) == library.labels
    assert spearmanr(found, list(psnr.values()))[0] > 0.6


def test_a_camera_that_blurs_more_relates_to_wider_blurs(net, sample):
    """Also to distortions of a user's own, which are none of the default library's."""
    sigmas = (1.0, 1.7, 2.4, 3.1)
    blurs = [{'name': 'gaussian_blur', 'sigma': sigma, 'kernel_size': 25} for sigma in sigmas]
    library = DistortionLibrary(blurs, SCALE)
    gt = images(sample / 'camera/support/gt')
    for best, task in enumerate(library.tasks):
        lq = [(task(image[None] / 255, torch.Generator())[0] * 255).round().byte() for image in gt]
        found = relation(net, library, images(sample / 'auxiliary'), list(zip(lq, gt, strict=True)))
        assert abs(int(found.argmax()) - best) <= 1
        if best in (0, 3):
            assert found.argsort().tolist() == ([3, 2, 1, 0] if best == 0 else [0, 1, 2, 3])
