"""What becomes of weights after training: BasicSR's and Real-ESRGAN's forms, spandrel, ONNX."""

import builtins
import re
from pathlib import Path
from typing import ClassVar

import onnx
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import ModelLoader

from drtl_plugin import cli
from drtl_plugin.api.export import export_onnx, export_spandrel
from drtl_plugin.errors import DataError, OptionError
from drtl_plugin.runtime.trained_network import TrainedNetwork, load_trained
from drtl_plugin.sources.sample import SAMPLE_ROOT

# Of all these, spandrel recognises the kind and its sizes by the names and shapes of the weights alone.
NETWORKS = [
    {'type': 'RRDBNet', 'num_in_ch': 3, 'num_out_ch': 3, 'scale': 4, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 32},
    {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_conv': 2, 'upscale': 4},
    {
        **{'type': 'RCAN', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_group': 1, 'num_block': 1},
        **{'squeeze_factor': 16, 'upscale': 4},
    },
    {
        **{'type': 'SwinIR', 'upscale': 4, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12},
        **{'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect'},
    },
]
NAMES = [network['type'] for network in NETWORKS]


def trained(workdir, quick_opt, write_opt, network: dict) -> str:
    """Weights of a network after two steps."""
    quick_opt.update(network_g=network, name='trained', val=None)
    assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
    return str(workdir / 'experiments/trained/models/net_g_adapted_latest.pth')


@pytest.mark.parametrize('network', NETWORKS, ids=NAMES)
def test_our_weights_load_in_spandrel(workdir, quick_opt, write_opt, network):
    path = trained(workdir, quick_opt, write_opt, network)
    ours = load_trained(path)
    if network['type'] == 'RCAN':  # BasicSR's names are its own
        assert cli.main(['export', '--weights', path, '--spandrel', 'other/rcan.pth']) == 0
        path = 'other/rcan.pth'
    theirs = ModelLoader().load_from_file(path)
    assert theirs.scale == ours.scale == 4
    lq = torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        # spandrel clips what it hands out, and its RCAN overwrites what it is given.
        torch.testing.assert_close(theirs(lq.clone()).clamp(0, 1), ours.net(lq).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize('img_range', [1.0, 255.0])
def test_rcans_of_any_range(tmp_path, img_range):
    torch.manual_seed(0)
    network = {**NETWORKS[2], 'num_group': 2, 'num_block': 2, 'img_range': img_range, 'rgb_mean': [0.1, 0.2, 0.3]}
    ours = TrainedNetwork(build_network(network).eval(), network, 4)
    export_spandrel(ours, str(tmp_path / 'w.pth'))
    theirs = ModelLoader().load_from_file(tmp_path / 'w.pth')
    lq = torch.rand(1, 3, 20, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs.model(lq.clone()), ours.net(lq), rtol=1e-4, atol=1e-5)
    with pytest.raises(OptionError, match='res_scale: spandrel assumes 1'):
        export_spandrel(TrainedNetwork(ours.net, {**network, 'res_scale': 0.1}, 4), str(tmp_path / 'w.pth'))


class TestLoadTrained:
    network: ClassVar[dict] = {
        'type': 'EDSR',
        'num_in_ch': 3,
        'num_out_ch': 3,
        'num_feat': 4,
        'num_block': 1,
        'upscale': 4,
    }

    @pytest.fixture
    def weights(self):
        torch.manual_seed(0)
        return build_network(self.network).state_dict()

    def assert_loads(self, workdir, weights, *option_file):
        loaded = load_trained(str(workdir / 'models/w.pth'), *option_file)
        assert loaded.scale == 4
        assert not loaded.net.training
        for name, weight in loaded.net.state_dict().items():
            assert torch.equal(weight, weights[name])

    @pytest.fixture
    def write(self, workdir):
        (workdir / 'models').mkdir()
        return lambda content: torch.save(content, workdir / 'models/w.pth')

    def test_the_moving_average_comes_first(self, workdir, weights, write):
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        write({'params': zeros, 'params_ema': weights, 'network': self.network, 'scale': 4})
        self.assert_loads(workdir, weights)

    @pytest.mark.parametrize('form', ['params', 'params_ema', 'bare', 'module'])
    def test_forms_of_the_zoos(self, workdir, weights, write, form):
        write(
            {'bare': weights, 'module': {f'module.{name}': w for name, w in weights.items()}}.get(form, {form: weights})
        )
        (workdir / 'my.yml').write_text(yaml.safe_dump({'network_g': self.network, 'scale': 4}))
        self.assert_loads(workdir, weights)  # of the experiment
        (workdir / 'my.yml').rename(workdir / 'models/other.yml')
        self.assert_loads(workdir, weights, str(workdir / 'models/other.yml'))
        with pytest.raises(
            OptionError,
            match=r'w\.pth does not record its network, and spandrel does not recognise it; give its option file',
        ):
            load_trained(str(workdir / 'models/w.pth'))

    @pytest.mark.parametrize('form', ['params', 'params_ema', 'bare'])
    def test_forms_of_the_zoos_are_trained_from(self, workdir, quick_opt, write_opt, weights, write, form):
        write(weights if form == 'bare' else {form: weights})
        quick_opt['network_g'] = self.network
        quick_opt['path']['pretrain_network_g'] = str(workdir / 'models/w.pth')
        quick_opt['train']['optim_g']['lr'] = 0.0
        quick_opt['train']['ema_decay'] = 0
        quick_opt['drtl']['adapt']['steps'] = 0
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        after = torch.load(workdir / f'experiments/{quick_opt["name"]}/models/net_g_latest.pth')['params']
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())

    @pytest.mark.parametrize('model', ['SRModel', 'DRTLModel'])
    @pytest.mark.parametrize(
        'form, key, message',
        [
            ('both', 'parms_ema', "contains no weights under 'parms_ema'; it has params, params_ema."),
            ('params', 'params_ema', "contains no weights under 'params_ema'; it has params."),
            ('params', None, 'contains no weights without a key; it has params.'),
            ('bare', 'params', "contains no weights under 'params'; it has some without a key (null)."),
            ('none', 'params', "contains no weights under 'params', nor under another key."),
        ],
    )
    def test_a_key_that_is_not_in_the_file(
        self, workdir, quick_opt, write_opt, weights, write, capsys, model, form, key, message
    ):
        forms = {'both': {'params': weights, 'params_ema': weights}, 'bare': weights, 'none': {'x': 1}}
        write(forms.get(form, {form: weights}))
        assert self.run_test(workdir, quick_opt, write_opt, model, param_key_g=key) == 2
        error = capsys.readouterr().err
        assert error == f'basicsr: error: path.param_key_g: models/w.pth {message}\n'
        assert not (workdir / 'results').exists()

    @pytest.mark.parametrize('written', [True, False])
    @pytest.mark.parametrize('key', ['params', 'params_ema', None])
    def test_the_log_names_the_key(self, workdir, quick_opt, write_opt, weights, write, key, written):
        write(weights if key is None else {key: weights})
        assert self.run_test(workdir, quick_opt, write_opt, 'SRModel', **({'param_key_g': key} if written else {})) == 0
        taken = 'without a key' if key is None else f'key {key}'
        (log,) = (workdir / 'results').glob('*/*.log')
        assert f'Loading EDSR from models/w.pth, {taken}.' in log.read_text()

    def run_test(self, workdir, quick_opt, write_opt, model, **path) -> int:
        """Run ``basicsr test`` on the weights."""
        opt = {
            **{key: quick_opt[key] for key in ('scale', 'num_gpu')},
            'name': 't',
            'model_type': model,
            'datasets': {'test_1': quick_opt['datasets']['val']},
            'network_g': self.network,
            'path': {'pretrain_network_g': 'models/w.pth', **path},
            'val': {'save_img': False},
        }
        return cli.main(['test', '-opt', write_opt(opt)])

    @pytest.mark.parametrize('ignored', [None, ['network_g']])
    def test_a_key_is_of_the_file_that_is_named_not_of_a_state(
        self, workdir, quick_opt, write_opt, weights, write, ignored
    ):
        write(weights)
        quick_opt['network_g'] = self.network
        quick_opt['path'].update(pretrain_network_g='models/w.pth', param_key_g=None, ignore_resume_networks=ignored)
        quick_opt['logger']['save_checkpoint_freq'] = 2
        quick_opt['drtl']['weighting']['relation'] = 'uniform'
        assert cli.main(['train', '-opt', write_opt(quick_opt)]) == 0
        resumed = ['--auto_resume', '--force_yml', 'train:total_iter=3']
        assert cli.main(['train', '-opt', write_opt(quick_opt), *resumed]) == 0

    @pytest.mark.parametrize(
        'content, error, message',
        [
            ({'network': network, 'scale': 4}, DataError, 'contains no weights, neither under params_ema or params'),
            ({'params': {}, 'network': network}, DataError, 'contains no weights'),
            ([1], DataError, 'contains no weights'),
            ({'params': {'w': torch.ones(1)}, 'network': network}, DataError, 'w.pth does not fit the network_g of'),
            ({'params': {'w': torch.ones(1)}, 'network': {'type': 'EDSRR'}}, OptionError, "did you mean 'EDSR'"),
            ({'params': {'w': torch.ones(1)}, 'network': {'a': 1}}, OptionError, 'expected a section with a type'),
            (
                {'params': {'w': torch.ones(1)}, 'network': network, 'scale': 'x'},
                OptionError,
                'scale: expected a whole',
            ),
        ],
    )
    def test_others_are_named(self, workdir, write, content, error, message):
        write(content)
        with pytest.raises(error, match=message):
            load_trained(str(workdir / 'models/w.pth'))

    def test_files_of_other_things_are_passed_over(self, workdir, weights, write):
        write(weights)
        (workdir / 'environment.yml').write_text('dependencies: [python]')
        (workdir / 'broken.yml').write_text('a: [')
        with pytest.raises(OptionError, match='does not record its network'):
            load_trained(str(workdir / 'models/w.pth'))
        (workdir / 'my.yml').write_text(yaml.safe_dump({'network_g': self.network, 'scale': 4}))
        self.assert_loads(workdir, weights)

    @pytest.mark.parametrize('scale', [None, 1, 2])
    def test_other_scales_are_named(self, workdir, weights, write, scale):
        write(weights)
        (workdir / 'my.yml').write_text(yaml.safe_dump({'network_g': self.network, 'scale': scale or 1}))
        with pytest.raises(DataError, match=rf'my\.yml: scale is {scale or 1}, but the network enlarges 4 times'):
            load_trained(str(workdir / 'models/w.pth'))

    def test_weights_that_are_no_numbers_are_named(self, workdir, weights, write):
        weights['conv_first.bias'][0] = float('inf')
        weights['conv_first.bias'][1] = float('nan')
        write({'params': weights, 'network': self.network, 'scale': 4})
        with pytest.raises(DataError, match='infinite values or NaN for a grey image'):
            load_trained(str(workdir / 'models/w.pth'))


class OwnNet(torch.nn.Module):
    """Fails while it is built, or while it restores."""

    def __init__(self, building=None, restoring=None):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
        self.restoring = restoring
        if building:
            raise getattr(builtins, building)('first line\nsecond line')

    def forward(self, x):
        if self.restoring == 'tuple':
            return x * self.w, x
        raise getattr(builtins, self.restoring)('first line\nsecond line')


@pytest.mark.parametrize('command', ['upscale', 'export', 'adapt'])
@pytest.mark.parametrize('phase', ['building', 'restoring'])
@pytest.mark.parametrize('error', ['ValueError', 'KeyError', 'AssertionError', 'RuntimeError'])
def test_errors_of_ones_own_network_take_one_line(workdir, monkeypatch, capsys, command, phase, error):
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'OwnNet': OwnNet})
    network = {'type': 'OwnNet', phase: error}
    torch.save({'params': {'w': torch.ones(1)}, 'network': network, 'scale': 1}, 'w.pth')
    arguments = {
        'upscale': ['-i', SAMPLE_ROOT, '-o', 'out'],
        'export': ['--onnx', 'w.onnx'],
        'adapt': ['--pairs', f'{SAMPLE_ROOT}/camera/support', '-o', 'out'],
    }
    assert cli.main([command, *arguments[command], '--weights', 'w.pth']) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error: '))
    what = 'network_g: OwnNet cannot be built' if phase == 'building' else 'the network cannot restore colour images'
    assert line.startswith(f'basicsr: error: w.pth: {what}: {error}: ')
    assert re.search(rf'first line.*second line.* \({re.escape(__file__)}:\d+\)$', line)


def test_a_network_that_returns_no_image_is_named(workdir, monkeypatch):
    monkeypatch.setattr(ARCH_REGISTRY, '_obj_map', {**ARCH_REGISTRY._obj_map, 'OwnNet': OwnNet})
    network = {'type': 'OwnNet', 'restoring': 'tuple'}
    torch.save({'params': {'w': torch.ones(1)}, 'network': network, 'scale': 1}, 'w.pth')
    with pytest.raises(DataError, match=r"w\.pth: the network cannot restore colour images: AttributeError: 'tuple'"):
        load_trained('w.pth')


class TestWeightsOfAnotherNetwork:
    """One short line that says which network they are of."""

    RRDB = NETWORKS[0]
    EDSR = TestLoadTrained.network

    def refusal(self, capsys, *arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(list(arguments)) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith('basicsr: error: '))
        assert len(line) < 400
        return line

    @pytest.fixture
    def refused(self, workdir, quick_opt, write_opt, capsys):
        """The lines by which all commands refuse weights for a network_g."""

        def refuse(content: dict, network: dict) -> list[str]:
            torch.save(content, 'w.pth')
            plain = {'network_g': network, 'scale': 4, 'num_gpu': 0, 'path': {'pretrain_network_g': 'w.pth'}}
            quick_opt.update(plain)
            test = {**plain, 'name': 't', 'model_type': 'SRModel', 'val': {'save_img': False}}
            test['datasets'] = {'test_1': quick_opt['datasets']['val']}
            weights = ('-opt', write_opt(plain, 'plain.yml'), '--weights', 'w.pth')
            support = f'{SAMPLE_ROOT}/camera/support'
            return [
                self.refusal(capsys, 'train', '-opt', write_opt(quick_opt)),
                self.refusal(capsys, 'test', '-opt', write_opt(test, 'test.yml')),
                self.refusal(capsys, 'upscale', '-i', f'{support}/lq', '-o', 'out', *weights),
                self.refusal(capsys, 'adapt', '--pairs', support, '-o', 'out', *weights),
                self.refusal(capsys, 'export', '--spandrel', 'out.pth', *weights),
            ]

        return refuse

    @pytest.mark.parametrize(
        'recorded, wanted, message',
        [
            (RRDB, EDSR, 'it contains RRDBNet, not EDSR.'),
            ({**EDSR, 'num_feat': 64}, {**EDSR, 'num_feat': 32}, 'it contains EDSR with num_feat 64, not 32.'),
            # Arguments that are left out are the defaults of the network.
            (
                {**EDSR, 'num_block': 16, 'rgb_mean': [0.4488, 0.4371, 0.404]},
                {name: value for name, value in EDSR.items() if name not in ('num_feat', 'num_block')},
                'it contains EDSR with num_feat 4, not 64.',
            ),
        ],
    )
    def test_is_named_where_they_record_it(self, refused, recorded, wanted, message):
        state = build_network(recorded).state_dict()
        for line in refused({'params': state, 'network': recorded, 'scale': 4}, wanted):
            assert 'w.pth does not fit' in line and line.endswith(message)

    def test_is_counted_where_they_do_not(self, refused):
        state, other = (build_network(network).state_dict() for network in (self.RRDB, self.EDSR))
        both = state.keys() & other.keys()
        reshaped = sum(state[name].shape != other[name].shape for name in both)
        for line in refused(state, self.EDSR):
            assert f'{len(other) - len(both)} missing (' in line
            assert f'{len(state) - len(both)} unexpected (' in line
            assert f'{reshaped} of another shape (conv_first.weight is (8, 3, 3, 3), not (4, 3, 3, 3), ' in line


@pytest.mark.parametrize('kind', ['onnx', 'spandrel'])
def test_exports_do_not_take_the_place_of_weights(workdir, quick_opt, write_opt, capsys, kind):
    path = trained(workdir, quick_opt, write_opt, quick_opt['network_g'])
    before = Path(path).read_bytes()
    assert cli.main(['export', '--weights', path, f'--{kind}', path]) == 2
    assert 'is the weights file; choose another name' in capsys.readouterr().err
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize('network', [*NETWORKS, TestLoadTrained.network], ids=[*NAMES, 'EDSR'])
@pytest.mark.slow
def test_onnx(tmp_path, network):
    """onnxruntime's outputs, at three sizes, are compared in :func:`export_onnx`; here, that it notices."""
    torch.manual_seed(0)
    net = build_network(network).eval()
    assert export_onnx(TrainedNetwork(net, network, 4), str(tmp_path / 'net.onnx')) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']
    graph = onnx.load(tmp_path / 'net.onnx').graph
    assert [value.name for value in (*graph.input, *graph.output)] == ['lq', 'restored']


def test_an_export_that_does_something_else_is_refused(tmp_path, monkeypatch):
    net = build_network(TestLoadTrained.network).eval()
    export = torch.onnx.export

    def export_other(model, *arguments, **options):
        torch.manual_seed(1)
        return export(build_network(TestLoadTrained.network).eval(), *arguments, **options)

    monkeypatch.setattr(torch.onnx, 'export', export_other)
    with pytest.raises(DataError, match=r'net\.onnx: the exported network differs from the original by'):
        export_onnx(TrainedNetwork(net, TestLoadTrained.network, 4), str(tmp_path / 'net.onnx'))
    assert not list(tmp_path.iterdir())


def test_the_commands(workdir, quick_opt, write_opt, capsys):
    path = trained(workdir, quick_opt, write_opt, quick_opt['network_g'])
    assert cli.main(['export', '--weights', path, '--onnx', 'deep/net.onnx']) == 0
    assert 'deep/net.onnx gives the same results as' in capsys.readouterr().out
    assert cli.main(['upscale', '-i', f'{SAMPLE_ROOT}/camera/val/lq', '-o', 'out', '--weights', path]) == 0
    assert '3 restored images are in out.' in capsys.readouterr().out
    assert len(list((workdir / 'out').iterdir())) == 3
