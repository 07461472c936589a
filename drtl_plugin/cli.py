"""The ``basicsr`` command."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import basicsr
import basicsr.test
import basicsr.train
from basicsr.models import build_model
from basicsr.utils import mkdir_and_rename
from basicsr.utils.registry import MODEL_REGISTRY
from torch import distributed

import drtl_plugin
from drtl_plugin import preflight, shell
from drtl_plugin.commands.adapt import adapt
from drtl_plugin.commands.export import export_onnx, export_spandrel, require_other_file
from drtl_plugin.commands.init import write_option_files
from drtl_plugin.commands.upscale import upscale
from drtl_plugin.compat.basicsr import close_basicsr_logs, processes_without_gpu, without_gpu
from drtl_plugin.data.lmdb_files import check_lmdb_name, write_lmdb
from drtl_plugin.errors import DataError, DRTLError, OptionError, describe, own_line
from drtl_plugin.models import DRTLModel
from drtl_plugin.options.parse import DRTLOptions, parse_options
from drtl_plugin.relation.estimators import needs_trained_network
from drtl_plugin.report.pictures import draw_graph
from drtl_plugin.report.tables import relation_table, write_graph
from drtl_plugin.runtime.distributed import abandon, end_dist, of_first_process
from drtl_plugin.runtime.loop import TrainingRun, exclusive
from drtl_plugin.runtime.weights import load_trained
from drtl_plugin.sources.published import PAIRED_DATASETS, prepare_pairs, prepare_subimages
from drtl_plugin.sources.sample import SAMPLE_ROOT, prepare_sample_data

_DESCRIPTION = """\
BasicSR with distortion-relation guided transfer learning (DRTL).

  basicsr train -opt options/drtl_x4.yml        train, adapt to the camera, report the gain
  basicsr test -opt options/test_drtl_x4.yml    test a trained network
  basicsr adapt --pairs DIR --weights W -o OUT  adapt trained weights to your camera
  basicsr upscale -i IN -o OUT --weights W      restore images
  basicsr relation -opt options/adapt_x4.yml    which synthetic distortions resemble my camera?
  basicsr lmdb FOLDER FOLDER.lmdb               turn a folder of images into an LMDB
  basicsr prepare                               write the sample data; with a name, lay out RealSR, City100, …

Any BasicSR option file works, those of plain BasicSR models too. Training writes to experiments/, testing to
results/ and TensorBoard to tb_logger/, all in the current folder.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (Sequence[str] | None): Arguments, ``sys.argv[1:]`` by default.

    Returns:
        int: 0; or 2 where the options, the data or the disk are not as they should be: then one line says what, where
        and what to do; or 130 after an interrupt.

    Raises:
        SystemExit: Where training was ended by a signal, with 128 and its number as code.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        end_dist()
    except DRTLError as error:
        if getattr(args, 'debug', False):
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        # A loader process puts its traceback in front of the error.
        is_traced = len(lines) > 1 and 'Error: ' in lines[-1]
        return _failed(lines[-1].partition('Error: ')[2] if is_traced else ' '.join(lines))
    except OSError as error:
        return _failed(' '.join(str(error).split()))
    except KeyboardInterrupt:
        return _failed('interrupted.', 130)
    except Exception:
        if distributed.is_initialized():
            traceback.print_exc()
            abandon(1)
        raise
    return 0


def _failed(line: str, code: int = 2) -> int:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f'basicsr: error: {line}', file=sys.stderr, flush=True)
    abandon(code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='basicsr', description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    version = f'drtl_plugin {drtl_plugin.__version__} (basicsr {basicsr.__version__})'
    parser.add_argument('--version', action='version', version=version)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

    for name, run, doc in (
        ('train', _train, 'Train with an option file. An existing run of the same name is renamed, not overwritten.'),
        ('test', _test, 'Test with an option file: metrics in the log, images in results/.'),
    ):
        command = commands.add_parser(name, help=doc, description=doc)
        command.set_defaults(run=run)
        _add_option_file(command)
        command.add_argument(
            '--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='how a distributed run is started'
        )
        command.add_argument(
            '--auto_resume', action='store_true', help='resume from the last training state (train only)'
        )
        command.add_argument(
            '--debug',
            action='store_true',
            help='log each iteration, validate every 8 iterations, no TensorBoard; show the traceback of errors',
        )
        command.add_argument('--local_rank', type=int, default=0, help='set by torch.distributed.launch; ignored')

    doc = "Adapt trained weights to a camera from pairs of its images. Checks the alignment, fits the camera's "
    doc += (
        'degradation, measures its relation to the synthetic distortions, adapts the network, and evaluates it on each '
    )
    doc += 'pair left out in turn. Writes weights, a report and an option file that repeats the run to OUT.'
    command = commands.add_parser('adapt', help='adapt trained weights to your camera', description=doc)
    command.set_defaults(run=_adapt)
    command.add_argument(
        '--pairs',
        required=True,
        metavar='DIR',
        help='folder that contains gt and lq, HR and LR, or HR and LR_x4 (for x4 weights), or images whose names end '
        'in _HR and _LR',
    )
    _add_weights(command)
    command.add_argument('-o', '--output', required=True, metavar='OUT', help='folder to write')
    command.add_argument(
        '--auxiliary',
        metavar='DIR',
        help='folder of GT images for the auxiliary tasks; default: the GT images of the pairs',
    )
    command.add_argument('--steps', type=int, default=200, help='adaptation steps; default: 200')
    command.add_argument(
        '--loss',
        nargs='+',
        default=[],
        metavar='KIND=WEIGHT[:FILE]',
        help='losses of adaptation: pixel, msssim, frequency, perceptual (FILE: VGG19 weights), gan (FILE: a '
        'discriminator; default: a new one), e.g. pixel=1 msssim=0.2 or pixel=1 frequency=1 gan=0.1; default: pixel=1',
    )
    command.add_argument('--register', action='store_true', help='align the images of each pair first')
    command.add_argument(
        '--no-evaluation',
        action='store_true',
        help='skip the leave-one-out evaluation, which adapts once for each pair',
    )

    doc = 'Restore one image or a folder of images with a trained network. Grey, alpha, 16 bits, colour profile, EXIF '
    doc += 'and XMP are kept where the output format allows. Images that fail are reported, the others restored.'
    command = commands.add_parser('upscale', help='restore images with trained weights', description=doc)
    command.set_defaults(run=_upscale)
    command.add_argument('-i', '--input', required=True, metavar='IN', help='image or folder')
    command.add_argument('-o', '--output', required=True, metavar='OUT', help='folder; for one image, also a file')
    _add_weights(command)
    command.add_argument(
        '--tile', type=int, default=512, help='tile size in input pixels, 0 for no tiles; default: 512'
    )
    command.add_argument('--overlap', type=int, default=32, help='tile overlap in input pixels; default: 32')
    command.add_argument('--suffix', default='', help='appended to the names of results')
    command.add_argument('--ext', default='auto', help="format of results, e.g. png; default: each image's own")
    command.add_argument('--fp32', action='store_true', help='on a GPU, compute in single instead of half precision')

    doc = 'Write a trained network for other programs.'
    command = commands.add_parser('export', help='trained weights for other programs', description=doc)
    command.set_defaults(run=_export)
    kinds = command.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        '--onnx', metavar='FILE', help='write ONNX, for images of any size, checked by onnxruntime against the original'
    )
    kinds.add_argument(
        '--spandrel', metavar='FILE', help='write weights under the names that spandrel (chaiNNer) knows; for RCAN'
    )
    _add_weights(command)

    doc = 'Measure how the camera of datasets.train.target relates to the auxiliary tasks: a table with bars, and the '
    doc += 'knowledge graph as picture and JSON in results/. The relations transfer and gradient need '
    doc += 'path.pretrain_network_g; for embedding, the relation network is trained first, unless '
    doc += 'path.pretrain_network_r names one.'
    command = commands.add_parser('relation', help='which synthetic distortions resemble my camera?', description=doc)
    command.set_defaults(run=_relation, launcher='none', auto_resume=False, debug=False)
    _add_option_file(command)

    doc = f'Without DATASET, write the sample data to {SAMPLE_ROOT}: images from scikit-image and five pairs of a '
    doc += (
        'simulated camera. train and test do this automatically when they need it. With DATASET, lay out an unpacked '
    )
    doc += 'published dataset as the option files expect. Nothing is downloaded.'
    command = commands.add_parser(
        'prepare', help='write the sample data, or lay out a published dataset', description=doc
    )
    command.set_defaults(run=_prepare)
    recipes = command.add_subparsers(title='datasets', metavar='DATASET')
    for name, layout in PAIRED_DATASETS.items():
        doc = f'{name} to support/{{gt,lq}} and val/{{gt,lq}}. Expected in SOURCE: '
        doc += ' '.join((layout.find.__doc__ or '').replace('``', '').split())
        recipe = recipes.add_parser(name, help='pairs of real cameras', description=doc)
        recipe.set_defaults(run=_prepare_pairs, dataset=name)
        recipe.add_argument('source', help='folder of the unpacked archive')
        recipe.add_argument('target', help='folder to write')
        recipe.add_argument('--scale', type=int, default=4, help='default: 4')
        recipe.add_argument('--camera', help='pairs of this camera only: ' + (', '.join(layout.cameras) or 'by name'))
        recipe.add_argument('--lmdb', action='store_true', help='gt.lmdb and lq.lmdb instead of folders')
    doc = 'Cut images (DIV2K, Flickr2K, …) into overlapping sub-images, for the auxiliary tasks.'
    recipe = recipes.add_parser('subimages', help='images for the auxiliary tasks', description=doc)
    recipe.set_defaults(run=_prepare_subimages)
    recipe.add_argument('source', nargs='+', help='folders of images')
    recipe.add_argument('target', help='folder, or with --lmdb LMDB, to write')
    recipe.add_argument('--size', type=int, default=480, help='side in pixels; default: 480')
    recipe.add_argument('--step', type=int, default=240, help='pixels from one to the next; default: 240')
    recipe.add_argument('--lmdb', action='store_true', help='an LMDB instead of a folder')

    doc = 'Write the shipped option files to DIR/options, as a starting point for your own.'
    command = commands.add_parser('init', help='write the shipped option files', description=doc)
    command.set_defaults(run=_init)
    command.add_argument('folder', metavar='DIR', nargs='?', default='.', help='default: the current folder')

    doc = 'Turn a folder of images into an LMDB in the BasicSR layout: keys are the names without extension, values '
    doc += 'PNG files, and meta_info.txt lists them. Use it with io_backend: {type: lmdb}.'
    command = commands.add_parser('lmdb', help='turn a folder of images into an LMDB', description=doc)
    command.set_defaults(run=_lmdb)
    command.add_argument('folder', help='folder of images')
    command.add_argument('lmdb', help='LMDB to write; its name ends in .lmdb')
    command.add_argument(
        '--strip', default='', metavar='ENDING', help='suffix to remove from keys: with x4, babyx4.png becomes baby'
    )
    command.add_argument(
        '--compress_level', type=int, choices=range(10), default=1, metavar='0-9', help='PNG compression level'
    )
    command.add_argument('--overwrite', action='store_true', help='replace an LMDB of this name')
    return parser


def _add_option_file(command: argparse.ArgumentParser) -> None:
    command.add_argument('-opt', required=True, metavar='FILE', help='option file (YAML)')
    command.add_argument(
        '--force_yml',
        nargs='+',
        metavar='KEY:KEY=VALUE',
        help='change options of the file, e.g. train:total_iter=500 network_g:num_feat=32 '
        '(values are read as YAML; a number in KEY is a list index)',
    )
    _add_import(command)


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--import',
        dest='modules',
        nargs='+',
        default=[],
        metavar='MODULE',
        help='import modules of your own first (from the current folder too), e.g. with hooks or networks '
        'that register themselves',
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument('--weights', required=True, metavar='W', help='a .pth file: net_g_….pth of an experiment')
    command.add_argument(
        '-opt', dest='opt', metavar='FILE', help='option file with network_g and scale, for weights from elsewhere'
    )
    _add_import(command)


def _import_modules(modules: Sequence[str]) -> None:
    """Import modules named by ``--import``, from the current folder too.

    Raises:
        OptionError: If there is no such module, or it registers a name that is taken.
    """
    if modules:
        sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise OptionError(f'--import {module}: {error}.') from None
        except AssertionError as error:  # BasicSR's registries refuse a name that is taken
            raise OptionError(f'--import {module}: {describe(error)}{own_line(error)}') from None


def _read_options(args: argparse.Namespace, is_train: bool) -> dict:
    """The parsed option file, after the user's modules are imported."""
    _import_modules(args.modules)
    close_basicsr_logs()
    return parse_options(args, os.getcwd(), is_train)


def _check_run(opt: dict) -> None:
    """Write the sample data if the options name it, then check the options."""
    if f"'{SAMPLE_ROOT}/" in str(opt['datasets']):
        of_first_process(prepare_sample_data)
    preflight.check(opt)
    if opt.get('val') and opt['val'].get('pbar') is None:
        opt['val']['pbar'] = sys.stderr.isatty()


def _resumes(opt: dict) -> bool:
    """Whether a training run resumes an older one, whose folder BasicSR then keeps instead of archiving it."""
    if opt['auto_resume']:
        return any(Path(opt['path']['training_states']).glob('[0-9]*.state'))
    return bool(opt['path'].get('resume_state'))


def _alone(opt: dict, folder: str) -> contextlib.AbstractContextManager:
    """The context in which no other run has the name of this one; of several processes the first one sees to it."""
    return exclusive(folder, opt['name']) if opt['rank'] == 0 else contextlib.nullcontext()


def _train(args: argparse.Namespace) -> None:
    opt = _read_options(args, is_train=True)
    if not _resumes(opt):
        preflight.check_archiving(opt, args.opt, opt['path']['experiments_root'])
    _check_run(opt)
    parsed = mock.patch.object(basicsr.train, 'parse_options', lambda *_, **__: (opt, args))
    with _alone(opt, 'experiments'), parsed, without_gpu(), processes_without_gpu(), TrainingRun(opt) as run:
        basicsr.train.train_pipeline(os.getcwd())
        if hasattr(run.model, 'finish') and opt['rank'] == 0:
            print(run.model.finish(args.modules))


def _test(args: argparse.Namespace) -> None:
    opt = _read_options(args, is_train=False)
    preflight.check_archiving(opt, args.opt, opt['path']['results_root'])
    _check_run(opt)
    parsed = mock.patch.object(basicsr.test, 'parse_options', lambda *_, **__: (opt, args))
    with _alone(opt, 'results'), parsed, without_gpu(), processes_without_gpu():
        basicsr.test.test_pipeline(os.getcwd())
    if opt['rank'] == 0:
        what = 'Images and log are' if opt['val']['save_img'] else 'The log is'
        print(f'{what} in {opt["path"]["results_root"]}.')


def _adapt(args: argparse.Namespace) -> None:
    _import_modules(args.modules)
    with without_gpu():
        report = adapt(
            *(args.pairs, args.weights, args.output, args.opt, args.auxiliary, args.steps, args.register),
            evaluates=not args.no_evaluation,
            modules=args.modules,
            losses=args.loss,
        )
    print(report)
    print(f'All this is in {args.output}, with the weights: net_g_adapted_latest.pth.')


def _upscale(args: argparse.Namespace) -> None:
    _import_modules(args.modules)
    network = load_trained(args.weights, args.opt)
    options = {'tile': args.tile, 'overlap': args.overlap, 'suffix': args.suffix, 'ext': args.ext}
    written, failed = upscale(network, args.input, args.output, **options, full_precision=args.fp32)
    if len(written) == 1:
        print(f'The restored image is {written[0]}.')
    elif written:
        print(f'{len(written)} restored images are in {args.output}.')
    if failed:
        raise DataError(f'{len(failed)} of {len(written) + len(failed)} images could not be restored.')


def _export(args: argparse.Namespace) -> None:
    require_other_file(args.onnx or args.spandrel, args.weights)
    _import_modules(args.modules)
    network = load_trained(args.weights, args.opt)
    if args.spandrel is not None:
        export_spandrel(network, args.spandrel)
        print(f'The weights are in {args.spandrel}.')
        return
    difference = export_onnx(network, args.onnx)
    print(f'{args.onnx} restores as {args.weights} does, to {difference:.1g}.')
    print('Input lq: RGB from 0 to 1, (1, 3, height, width). Output restored: the same, enlarged.')


def _relation(args: argparse.Namespace) -> None:
    opt = _read_options(args, is_train=True)
    folder = Path('results', f'{opt["name"]}_relation')
    preflight.check_archiving(opt, args.opt, folder)
    _check_run(opt)
    if not issubclass(MODEL_REGISTRY.get(opt['model_type']), DRTLModel):
        raise OptionError(f'model_type: the relation is measured by DRTLModel, not by {opt["model_type"]}.')
    if not opt['datasets']['train'].get('target'):
        raise OptionError('datasets.train.target is missing: the pairs of the camera.')
    drtl = DRTLOptions.from_opt(opt)
    relation = drtl.weighting.relation
    if relation == 'uniform':
        raise OptionError("drtl.weighting.relation: 'uniform' measures nothing; choose another.")
    if needs_trained_network(relation) and not opt['path'].get('pretrain_network_g'):
        raise OptionError(f'path.pretrain_network_g is missing: relation {relation!r} asks a trained network.')
    with exclusive('results', folder.name), without_gpu():
        mkdir_and_rename(str(folder))
        opt['path'].update(experiments_root=str(folder), models=str(folder))
        model = build_model(opt)
        model.start()
        write_graph(model.graph, folder / 'knowledge_graph.json', model.weights)
        draw_graph(model.graph, folder / 'knowledge_graph.png', model.weights, model.fit_share)
    print(f'Relation to the target ({relation}), and the weight that follows from it:')
    print(relation_table(model.graph, model.weights))
    print(f'The knowledge graph is in {folder}.')


def _prepare(args: argparse.Namespace) -> None:
    print(f'The sample data is in {prepare_sample_data()}.')


def _prepare_pairs(args: argparse.Namespace) -> None:
    counts = prepare_pairs(args.dataset, args.source, args.target, args.scale, args.camera)
    if args.lmdb:
        for folder in sorted(Path(args.target).glob('*/*')):
            _replace_by_lmdb(folder, folder.with_suffix('.lmdb'))
    print(f'{counts["support"]} pairs to adapt to, {counts["val"]} held out are in {args.target}.')


def _prepare_subimages(args: argparse.Namespace) -> None:
    target = Path(args.target)
    if args.size < 8 or args.step < 1:
        raise DataError('--size must be at least 8, --step at least 1.')
    if not args.lmdb:
        num = prepare_subimages(args.source, target, args.size, args.step)
    else:
        check_lmdb_name(target)
        folder = target.with_suffix('')
        num = prepare_subimages(args.source, folder, args.size, args.step)
        _replace_by_lmdb(folder, target)
    print(f'{num} sub-images are in {target}.')


def _replace_by_lmdb(folder: Path, target: Path) -> None:
    write_lmdb(folder, target)
    shutil.rmtree(folder)


def _init(args: argparse.Namespace) -> None:
    files = write_option_files(args.folder)
    print(f'Wrote {len(files)} files to {files[0].parent}.')
    print(f'Next:\n  {shell.join("cd", args.folder)}\n  basicsr train -opt options/drtl_x4.yml')


def _lmdb(args: argparse.Namespace) -> None:
    num = write_lmdb(args.folder, args.lmdb, args.strip, args.compress_level, args.overwrite)
    print(f'{num} images are in {args.lmdb}.')


if __name__ == '__main__':
    sys.exit(main())
