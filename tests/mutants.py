"""Mutation testing by hand: breaks the method in one place at a time, and shows that the tests notice.

    python tests/mutants.py                  # all but the slow ones, about 5 minutes on 2 CPU cores
    python tests/mutants.py fold rate        # those whose names contain a word
    python tests/mutants.py --slow           # with those that need whole training runs

Each mutant is applied to a copy of the repository, and its tests run there. They must pass before, and at least one of
them must fail after. The exit status is 1 if a mutant survives, and 2 if one cannot be judged: its source text is not
found exactly once, or its tests do not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_COPIED = ('drtl_plugin', 'tests', 'options', 'benchmarks', 'pyproject.toml')
# Exit codes of pytest.
_PASSED, _FAILED = 0, 1


class MutantError(Exception):
    """A mutant cannot be judged."""


@dataclass(frozen=True)
class Mutant:
    """A change that breaks the method.

    Attributes:
        name (str): What is broken.
        file (str): File to change, relative to the repository.
        source (str): Text in the file; it must occur exactly once.
        replacement (str): What it is replaced by.
        tests (tuple[str, ...]): Tests, at least one of which must fail, relative to ``tests/``.
        is_slow (bool): Whether the tests are marked as slow.
    """

    name: str
    file: str
    source: str
    replacement: str
    tests: tuple[str, ...]
    is_slow: bool = False


_FIT = 'drtl_plugin/tasks/camera_fit'
_EDGES = ('tasks/test_camera_fit.py::test_noise_at_edges_is_recovered_and_made_again',)
_CORRECTION = ('tasks/test_camera_correction.py::test_it_is_used_only_if_it_helps_a_pair_that_it_was_not_trained_on',)
_MEMBERS = ('archs/test_drn_arch.py::TestTransferRelationNet::test_members_are_averaged',)
_PREDICTED = ('relation/test_estimators.py::test_predicted_transfer_is_the_drns_prediction',)
_TRANSFER = ('relation/test_estimators.py::test_memorised_images_do_not_transfer',)
_DISTURBED = ('relation/test_drn_training.py::test_weak_distortions_are_recovered_from_gt_that_is_not_perfect',)
_BANK = ('archs/test_drn_arch.py',)
_GRAPH = ('relation/test_graph.py',)
_GAINS = ('relation/test_estimators.py::test_gains_become_edges',)
_WEIGHTS = ('relation/test_weights.py',)
_STEPS = ('models/test_steps.py::TestWeightedGradients',)
_LEARNER = ('meta/test_learner.py',)
_ADAPTATION = ('meta/test_adaptation.py',)
_CAMERA = ('tasks/test_library.py::TestRandomCamera',)
_RATES = ('models/test_inner_rates.py::TestInnerRates::test_the_gradient_is_that_of_the_logarithm',)
_CHOICE = ('models/test_cross_validation.py::TestChoice',)
_HELD_OUT = ('models/test_cross_validation.py::TestAdapting::test_judges_by_what_was_held_out',)
_MEMORISED = ('commands/test_adapt.py::test_memorised_images_are_no_gain',)
_REPORT = ('commands/test_adapt.py::test_the_report_is_of_networks_that_have_not_seen_the_pair',)
_PATCHES = ('tasks/test_patches.py',)
_REPLAY = ('models/test_adapter.py::TestAdaptation::test_replay_draws_auxiliary_patches_by_weight',)
_POINT = ('test_cli.py::TestTrain::test_adaptation_gains_on_photographs_that_were_not_seen',)

MUTANTS = (
    # The camera fit
    Mutant(
        'edge noise removed from the fit',
        f'{_FIT}/noise.py',
        'torch.cat([torch.ones_like(brightness), brightness, slope], dim=1)[0]',
        'torch.cat([torch.ones_like(brightness), brightness, 0 * slope], dim=1)[0]',
        _EDGES,
    ),
    Mutant(
        'edge noise not synthesised',
        f'{_FIT}/noise.py',
        '(constant + shot * brightness + edges * slope).sqrt()',
        '(constant + shot * brightness).sqrt()',
        _EDGES,
    ),
    Mutant(
        'correction accepted on seen pairs',
        f'{_FIT}/correction.py',
        'share_left(train_correction(parts[:-1], generator), parts[-1:])',
        'share_left(train_correction(parts[:-1], generator), parts[:-1])',
        _CORRECTION,
    ),
    Mutant(
        'correction trained on the left-out pair',
        f'{_FIT}/correction.py',
        'share_left(train_correction(parts[:-1], generator), parts[-1:])',
        'share_left(train_correction(parts, generator), parts[-1:])',
        _CORRECTION,
    ),
    # The relation
    Mutant(
        'transfer judged on the contents it learned from',
        'drtl_plugin/relation/estimators.py',
        'other = slice(half, half + 2)',
        'other = slice(0, 2)',
        _TRANSFER,
    ),
    Mutant(
        'DRN trained without GT disturbance',
        'drtl_plugin/relation/drn_training.py',
        'bicubic(disturb_gt(gt[chosen], generator, scale), scale)',
        'bicubic(gt[chosen], scale)',
        _DISTURBED,
    ),
    Mutant(
        'memory bank bypassed',
        'drtl_plugin/archs/drn_arch.py',
        'return self.memory_bank(self.encoder(features))',
        'return self.encoder(features)',
        _BANK,
    ),
    Mutant(
        'graph not centred',
        'drtl_plugin/relation/graph.py',
        'centred = embeddings - auxiliary.mean(dim=0)',
        'centred = embeddings',
        _GRAPH,
    ),
    Mutant(
        'gains not centred',
        'drtl_plugin/relation/estimators.py',
        'gains = gains - gains.mean(dim=0)',
        'gains = gains + 0',
        _GAINS,
    ),
    Mutant(
        'sign of the softmax flipped',
        'drtl_plugin/relation/weights.py',
        'softmax = torch.softmax(r / temperature, dim=0)',
        'softmax = torch.softmax(-r / temperature, dim=0)',
        _WEIGHTS,
    ),
    Mutant(
        'sign of the softmax of a given effective number flipped',
        'drtl_plugin/relation/weights.py',
        '_softmax_of_effective_number(r, min(effective_tasks, num))',
        '_softmax_of_effective_number(-r, min(effective_tasks, num))',
        _WEIGHTS,
    ),
    # Training
    Mutant(
        'weights ignored in the pre-training step',
        'drtl_plugin/models/steps.py',
        'total = total + weight / len(weights) * loss',
        'total = total + loss / len(weights)',
        _STEPS,
    ),
    Mutant(
        'weights ignored in the meta-learning step',
        'drtl_plugin/models/steps.py',
        'accumulate(parameters, outer.parameters, weight / len(weights))',
        'accumulate(parameters, outer.parameters, 1 / len(weights))',
        _STEPS,
    ),
    Mutant(
        'weights ignored by sampling',
        'drtl_plugin/models/drtl_model.py',
        "weights = self.weights if self.drtl.weighting.mode == 'sampling' else None",
        'weights = None',
        _STEPS,
    ),
    Mutant(
        "FOMAML's query gradient at θ instead of θ'",
        'drtl_plugin/meta/learner.py',
        '    query_loss = loss(adapted, query)\n    outer =',
        "    query_loss = loss(parameters if algorithm == 'fomaml' else adapted, query)\n    outer =",
        _LEARNER,
    ),
    Mutant(
        'wrong sign in the inner step at one rate',
        'drtl_plugin/meta/learner.py',
        'torch._foreach_sub(theta,',
        'torch._foreach_add(theta,',
        _LEARNER,
    ),
    # Adaptation
    Mutant(
        'wrong sign in the adaptation step with the inner rates',
        'drtl_plugin/meta/adaptation.py',
        'learned[name].sub_(rate * gradient)',
        'learned[name].add_(rate * gradient)',
        _ADAPTATION,
    ),
    Mutant(
        'wrong sign in the adaptation step by Adam',
        'drtl_plugin/meta/adaptation.py',
        'torch.optim.Adam(learned.values(), lr=lr)',
        'torch.optim.Adam(learned.values(), lr=lr, maximize=True)',
        _ADAPTATION,
    ),
    Mutant(
        'no decay of the rate',
        'drtl_plugin/meta/adaptation.py',
        'share_left = 1 - step / decay_steps if decay_steps else 1',
        'share_left = 1',
        _ADAPTATION,
    ),
    Mutant(
        'non-finite steps kept',
        'drtl_plugin/meta/adaptation.py',
        'if not nn.utils.clip_grad_norm_(learned.values(), math.inf).isfinite():',
        'if False:',
        _ADAPTATION,
    ),
    Mutant(
        'inverted blend',
        'drtl_plugin/meta/adaptation.py',
        'torch.lerp(value, mean, share)',
        'torch.lerp(mean, value, share)',
        _ADAPTATION,
    ),
    Mutant(
        'no average in the soup',
        'drtl_plugin/meta/adaptation.py',
        'torch.stack([state[name] for state in states]).mean(0)',
        'states[0][name]',
        _ADAPTATION,
    ),
    Mutant(
        'replay ignores the weights',
        'drtl_plugin/models/adapter.py',
        'torch.multinomial(weights, num,',
        'torch.multinomial(torch.ones_like(weights), num,',
        _REPLAY,
    ),
    Mutant(
        'GT colours permuted alone',
        'drtl_plugin/tasks/patches.py',
        'lq, gt = (images.gather(1, orders.to(images.device).expand_as(images)) for images in batch)',
        'lq, gt = batch[0], batch[1].gather(1, orders.to(batch[1].device).expand_as(batch[1]))',
        _PATCHES,
    ),
    # Predicted transfer
    Mutant(
        'members not averaged',
        'drtl_plugin/archs/drn_arch.py',
        'for member, *embeddings in parts]).mean(dim=0)',
        'for member, *embeddings in parts])[0]',
        _MEMBERS,
    ),
    Mutant(
        'predicted transfer transposed',
        'drtl_plugin/relation/estimators.py',
        'gains = predict(auxiliary, nodes)',
        'gains = predict(nodes, auxiliary).T',
        _PREDICTED,
    ),
    # Meta-learning on cameras
    Mutant(
        'a camera with other parameters for each image',
        'drtl_plugin/tasks/library.py',
        'fixed = tuple(replace(step, ranges=_points_of(step.ranges, drawn)) for step in steps)',
        'fixed = steps',
        _CAMERA,
    ),
    Mutant(
        'inner steps share their patches',
        'drtl_plugin/meta/learner.py',
        '(step * size + i) % len(lq)',
        'i % len(lq)',
        _LEARNER,
    ),
    Mutant(
        'gradient of a step size taken for that of its logarithm',
        'drtl_plugin/models/inner_rates.py',
        'self.logarithms[name].detach().exp() * value',
        'value',
        _RATES,
    ),
    # Cross-validation
    Mutant(
        'rate chosen on the first fold alone',
        'drtl_plugin/models/cross_validation.py',
        'judges = range(min(num_judges, len(folds)))',
        'judges = range(1)',
        _CHOICE,
    ),
    Mutant(
        'worst rate chosen',
        'drtl_plugin/models/cross_validation.py',
        'lr = min(trials, key=lambda trial: trial.loss).lr',
        'lr = max(trials, key=lambda trial: trial.loss).lr',
        _CHOICE,
    ),
    Mutant(
        'folds compared by the mean of their ratios',
        'drtl_plugin/models/cross_validation.py',
        'return {share: value / max(sums[0], 1e-12) for share, value in sums.items()}',
        'return {share: sum(each[share] / each[0] for each in judged) / len(judged) for share in sums}',
        _CHOICE,
    ),
    Mutant(
        'worst share chosen',
        'drtl_plugin/models/cross_validation.py',
        'share = min(losses,',
        'share = max(losses,',
        _CHOICE,
    ),
    Mutant(
        'leak between folds',
        'drtl_plugin/models/adapter.py',
        'for other, parts in enumerate(images) if other != fold for pair in parts',
        'for other, parts in enumerate(images) for pair in parts',
        _HELD_OUT,
    ),
    Mutant(
        'leak between folds, by its result',
        'drtl_plugin/models/adapter.py',
        'for other, parts in enumerate(images) if other != fold for pair in parts',
        'for other, parts in enumerate(images) for pair in parts',
        _MEMORISED,
    ),
    Mutant(
        'leak between parts of a pair',
        'drtl_plugin/models/adapter.py',
        'return lq[(..., *part.region(1))], gt[(..., *part.region(scale))]',
        'return lq, gt',
        _HELD_OUT,
    ),
    Mutant(
        'folds judged by a pair that was seen',
        'drtl_plugin/models/adapter.py',
        'lq, gt = judged_by[fold]',
        'lq, gt = judged_by[fold - 1]',
        _MEMORISED,
    ),
    Mutant(
        'report of the averaged network',
        'drtl_plugin/api/adapt_evaluation.py',
        'nets = cross_validation.networks\n',
        'nets = [cross_validation.result] * len(cross_validation.folds)\n',
        _REPORT,
    ),
    Mutant(
        "report of another fold's network",
        'drtl_plugin/api/adapt_evaluation.py',
        'nets = cross_validation.networks\n',
        'nets = [*cross_validation.networks[1:], cross_validation.networks[0]]\n',
        _REPORT,
    ),
    # The option file
    Mutant(
        'relation, fit and replay switched off',
        'options/drtl_x4.yml',
        """\
  camera_fit: true               # one more task: the camera's degradation, fitted to its pairs
  weighting: {relation: transfer, effective_tasks: 6, floor: 0.2, fit_share: 0.9, mode: sampling}
  inner: {algorithm: fomaml, lr: !!float 1e-2, steps: 1}
  adapt: {steps: 200, lr: !!float 3e-4, batch_size: 8, replay: 0.5}
""",
        """\
  camera_fit: false
  weighting: {relation: uniform}
  inner: {algorithm: fomaml, lr: !!float 1e-2, steps: 1}
  adapt: {steps: 200, lr: !!float 3e-4, batch_size: 8, replay: 0}
""",
        _POINT,
        is_slow=True,
    ),
)


def copy_repository(folder: Path, mutant: Mutant | None = None) -> None:
    """Copy what the tests need to an empty folder, with a mutant applied.

    Raises:
        MutantError: If the mutant's source text is not found exactly once.
    """
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, folder / name)
    if mutant is not None:
        path = folder / mutant.file
        text = path.read_text(encoding='utf-8')
        found = text.count(mutant.source)
        if found != 1:
            raise MutantError(f'{mutant.file} has the source text {found} times, not once: {mutant.source!r}')
        path.write_text(text.replace(mutant.source, mutant.replacement), encoding='utf-8')


def run_tests(folder: Path, tests: list[str], with_slow: bool, stops: bool) -> tuple[int, str]:
    """Run tests of a copy; returns pytest's exit code and output."""
    # The package of the copy, and not one that is installed.
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    for name in ('PYTEST_ADDOPTS', 'PYTEST_XDIST_WORKER'):
        environment.pop(name, None)
    markers = 'not wheel' if with_slow else 'not slow and not wheel'
    options = ['-m', markers, '--tb=short', '-p', 'no:cacheprovider', *(['-x'] if stops else [])]
    command = [sys.executable, '-m', 'pytest', *options, *(f'tests/{test}' for test in tests)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant) -> tuple[bool, str]:
    """Whether a mutant is caught, and by which test.

    Raises:
        MutantError: If that cannot be judged.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder, mutant)
        code, output = run_tests(folder, list(mutant.tests), mutant.is_slow, stops=True)
    if code == _PASSED:
        return False, 'SURVIVED'
    failed = re.findall(r'^FAILED tests/(.*?)(?: - |$)', output, re.MULTILINE)
    # A mutant that breaks imports or syntax, or fails in a fixture, proves nothing.
    broken = re.search(r'^E\s+(SyntaxError|ImportError|ModuleNotFoundError|NameError|AttributeError)\b', output, re.M)
    if code != _FAILED or not failed or broken:
        raise MutantError(f'its tests do not run:\n{output[-2000:]}')
    return True, f'caught by {failed[0]}'


def main() -> int:
    """Apply the chosen mutants; returns the exit status."""
    parser = argparse.ArgumentParser(description='Break the method in one place at a time; the tests must notice.')
    parser.add_argument('words', nargs='*', metavar='WORD', help='only mutants whose names contain one of these words')
    parser.add_argument('--slow', action='store_true', help='also those that need whole training runs')
    parser.add_argument('--jobs', type=int, default=2, help='mutants at a time (default: 2)')
    args = parser.parse_args()
    chosen = [
        mutant
        for mutant in MUTANTS
        if (args.slow or not mutant.is_slow) and (not args.words or any(word in mutant.name for word in args.words))
    ]
    if not chosen:
        parser.error('no mutant has such a name')
    began = time.monotonic()
    tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    with tempfile.TemporaryDirectory() as name:
        copy_repository(Path(name))
        code, output = run_tests(Path(name), tests, any(mutant.is_slow for mutant in chosen), stops=False)
    if code != _PASSED:
        print(f'Without a mutant, the tests must pass, but do not:\n{output[-4000:]}')
        return 2
    print(f'Without a mutant: {output.strip().splitlines()[-1].strip("= ")}', flush=True)
    survived = failed = 0

    def judge(mutant: Mutant) -> tuple[bool, str] | MutantError:
        try:
            return verdict(mutant)
        except MutantError as error:
            return error

    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, result in zip(chosen, pool.map(judge, chosen), strict=True):
            if isinstance(result, MutantError):
                failed += 1
                print(f'{mutant.name}: ERROR: {result}', flush=True)
            else:
                survived += not result[0]
                print(f'{mutant.name}: {result[1]}', flush=True)
    caught = len(chosen) - survived - failed
    print(f'{caught} of {len(chosen)} mutants caught in {time.monotonic() - began:.0f} s.')
    return 2 if failed else 1 if survived else 0


if __name__ == '__main__':
    sys.exit(main())
