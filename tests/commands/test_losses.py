"""``basicsr adapt --loss``: from the command to an option file that repeats it."""

import pytest
import torch
import yaml
from basicsr.archs import build_network

from drtl_plugin import cli
from drtl_plugin.commands.losses import loss_sections
from drtl_plugin.errors import DataError, OptionError
from tests.commands.test_adapt import commands_in, folder, quick  # noqa: F401
from tests.losses.test_losses import vgg_weights  # noqa: F401

NETWORK = {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4}
ADAPT = ['adapt', '--pairs', 'pairs', '--weights', 'w.pth', '-o', 'mine', '--budget', '21']


def adapted(path: str) -> dict:
    return torch.load(path, weights_only=True)['params']


@pytest.mark.slow
def test_a_network_of_a_gan_is_adapted_by_a_gan(folder, quick, capsys):  # noqa: F811
    torch.save({'params': build_network(NETWORK).state_dict(), 'network': NETWORK, 'scale': 4}, 'w.pth')
    losses = ['--loss', 'pixel=1', 'msssim=0.2', 'frequency=0.1', 'gan=0.1']
    assert cli.main([*ADAPT, *losses]) == 0
    out, err = capsys.readouterr()
    assert 'warning' not in err
    opt = yaml.safe_load((folder / 'mine/adapt.yml').read_text())
    assert opt['network_d'] == {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 32}
    assert opt['train']['gan_opt'] == {'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1}
    assert opt['train']['msssim_opt'] == {'type': 'MSSSIMLoss', 'loss_weight': 0.2}
    first = adapted('mine/net_g_adapted_latest.pth')
    assert torch.load('mine/net_g_adapted_latest.pth')['network'] == NETWORK

    torch.rand(5)  # whatever was drawn before
    assert cli.main(commands_in(out)['train']) == 0
    second = adapted('experiments/mine/models/net_g_adapted_latest.pth')
    assert all(torch.equal(first[name], second[name]) for name in first)

    assert cli.main([*ADAPT[:6], 'pixel', *ADAPT[7:]]) == 0
    plain = adapted('pixel/net_g_adapted_latest.pth')
    assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_a_discriminator_is_named_by_file(folder, quick, capsys):  # noqa: F811
    """Ours, which says what it is, or Real-ESRGAN's, which does not."""
    net_d = build_network({'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4})
    torch.save({'params': net_d.state_dict()}, 'd.pth')
    assert cli.main([*ADAPT, '--loss', 'pixel=1', 'gan=0.1:d.pth']) == 0
    opt = yaml.safe_load((folder / 'mine/adapt.yml').read_text())
    assert opt['network_d']['num_feat'] == 4
    assert opt['path']['pretrain_network_d'] == str(folder / 'd.pth')
    own = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4, 'skip_connection': False}
    torch.save({'params': net_d.state_dict(), 'network': own}, 'd.pth')
    assert loss_sections(['pixel=1', 'gan=1:d.pth'])['network_d'] == own
    assert cli.main([*ADAPT[:6], 'other', *ADAPT[7:], '--loss', 'pixel=1', 'gan=0.1:w.pth']) == 2
    assert 'w.pth holds no UNetDiscriminatorSN; name other' in capsys.readouterr().err


def test_the_default_warns_where_weights_may_be_of_a_gan(folder, quick, capsys):  # noqa: F811
    def warnings(name: str, *losses: str) -> list[str]:
        assert cli.main([*ADAPT[:6], name, *ADAPT[7:], *losses]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if 'basicsr: warning' in line]

    (line,) = warnings('unknown')
    assert 'w.pth may have been trained with a GAN, whose texture the default pixel loss smooths; --loss' in line
    assert warnings('said', '--loss', 'pixel=1') == []
    for losses, expected in ((['pixel'], 0), (['gan', 'pixel'], 1), (['perceptual'], 1)):
        torch.save({**torch.load('w.pth'), 'losses': losses}, 'w.pth')
        assert len(warnings('_'.join(losses))) == expected


def test_sizes_that_a_discriminator_takes(folder, quick, monkeypatch):  # noqa: F811
    """Photographs of 92 pixels a side, of which a U-Net cannot make halves of halves of halves."""
    import cv2

    monkeypatch.undo()
    monkeypatch.chdir(folder)
    for name in 'abc':
        for suffix, side in (('LR', 23), ('HR', 92)):
            image = cv2.imread(f'pairs/{name}_{suffix}.png')[:side, :side]
            cv2.imwrite(f'pairs/{name}_{suffix}.png', image)
    from drtl_plugin.api.adapt_model import adaptation_options
    from drtl_plugin.runtime.trained_network import load_trained

    (folder / 'mine/pairs/gt').mkdir(parents=True)
    images = {}
    for name in 'abc':
        images[name] = (cv2.imread(f'pairs/{name}_HR.png'), cv2.imread(f'pairs/{name}_LR.png'))
        cv2.imwrite(f'mine/pairs/gt/{name}.png', images[name][0])
    for losses, size in ((['pixel=1'], 92), (['pixel=1', 'gan=1'], 88)):
        opt = adaptation_options(
            load_trained('w.pth'), 'w.pth', images, folder / 'mine', None, None, loss_sections(losses)
        )
        assert opt['datasets']['train']['gt_size'] == size


def test_perceptual(folder, vgg_weights):  # noqa: F811
    section = loss_sections([f'perceptual=0.5:{vgg_weights}', 'frequency=1'])['train']['perceptual_opt']
    assert section == {'type': 'VGGPerceptualLoss', 'vgg_weights': vgg_weights, 'perceptual_weight': 0.5}


@pytest.mark.parametrize(
    'losses, error, message',
    [
        (['pixle=1'], OptionError, r"^--loss pixle=1: unknown loss 'pixle'; did you mean 'pixel'\?$"),
        (['pixel'], OptionError, r"^--loss pixel: weight: expected a number, got ''"),
        (['pixel=0'], OptionError, r'^--loss pixel=0: weight: 0 is out of range'),
        (['pixel=x'], OptionError, r"^--loss pixel=x: weight: expected a number, got 'x'"),
        (['pixel=1', 'pixel=2'], OptionError, r'^--loss pixel=2: pixel is given twice'),
        (['pixel=1:a.pth'], OptionError, r'^--loss pixel=1:a\.pth: pixel takes no file; write pixel=1\.$'),
        (['gan=0.1'], OptionError, r'^--loss: pixel or perceptual is missing'),
        (['perceptual=1'], OptionError, r"^--loss perceptual=1: name torchvision's VGG19 weights"),
        (['perceptual=1:no.pth'], DataError, r'^--loss perceptual=1:no\.pth: there is no file no\.pth'),
        (['pixel=1', 'gan=1:no.pth'], DataError, r'^--loss gan=1:no\.pth: there is no file no\.pth'),
    ],
)
def test_wrong_losses(losses, error, message):
    with pytest.raises(error, match=message):
        loss_sections(losses)
