"""How published datasets are laid out, and where the sample data is. ``--help`` uses this, so imports are light."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SAMPLE_ROOT = 'datasets/drtl_sample'
# City100 has no split: ours holds out every tenth pair and uses five others as the support set.
_CITY100_SUPPORT = ('011', '031', '051', '071', '091')
_CITY100_VAL = tuple(f'{number:03d}' for number in range(4, 100, 10))


@dataclass(frozen=True)
class SourcePair:
    """A pair in the published layout.

    Attributes:
        split (str): ``support`` or ``val``.
        name (str): File name of both images in the target, without extension.
        gt, lq (Path): The files.
    """

    split: str
    name: str
    gt: Path
    lq: Path


def _find_realsr(source: Path, camera: str | None, scale: int) -> Iterator[SourcePair]:
    """``Canon/Train/4/Canon_001_HR.png`` and ``Canon_001_LR4.png``; ``Test`` is held out."""
    for split, folder in (('support', 'Train'), ('val', 'Test')):
        for gt in sorted(source.rglob(f'{camera or "*"}/{folder}/{scale}/*_HR.*')):
            name = gt.stem.removesuffix('_HR')
            yield SourcePair(split, name, gt, gt.with_name(f'{name}_LR{scale}{gt.suffix}'))


def _find_drealsr(source: Path, camera: str | None, scale: int) -> Iterator[SourcePair]:
    """``Train_x4/train_HR/NAME_x4.png`` and ``Train_x4/train_LR/NAME_x1.png``; ``Test_x4`` is held out.

    File names begin with the camera: panasonic, sony, DSC, ….
    """
    for split, phase in (('support', 'train'), ('val', 'test')):
        for gt in sorted(source.rglob(f'{phase.title()}_x{scale}/{phase}_HR/{camera or ""}*')):
            name = gt.stem.removesuffix(f'_x{scale}')
            yield SourcePair(split, name, gt, gt.parent.with_name(f'{phase}_LR') / f'{name}_x1{gt.suffix}')


def _find_city100(source: Path, camera: str | None, scale: int) -> Iterator[SourcePair]:
    """``City100_NikonD5500/001H.PNG`` and ``001L.PNG``, of the same size."""
    for gt in sorted(source.rglob(f'City100_{camera or "*"}/*H.PNG')):
        name = gt.stem.removesuffix('H')
        if name in _CITY100_SUPPORT + _CITY100_VAL:
            yield SourcePair(
                'val' if name in _CITY100_VAL else 'support', name, gt, gt.with_name(f'{name}L{gt.suffix}')
            )


@dataclass(frozen=True)
class PairedDataset:
    """How to find the pairs of a dataset.

    Attributes:
        find (Callable): ``find(source, camera, scale)`` yields all pairs; its docstring describes the layout.
        cameras (tuple[str, ...]): Names of the cameras in the layout.
        scales (tuple[int, ...]): Scales at which it is published or commonly used.
        interpolated (bool): Whether LQ is published at the size of GT and must be reduced.
    """

    find: Callable[[Path, str | None, int], Iterator[SourcePair]]
    cameras: tuple[str, ...]
    scales: tuple[int, ...]
    interpolated: bool = False


PAIRED_DATASETS = {
    'realsr': PairedDataset(_find_realsr, ('Canon', 'Nikon'), (2, 3, 4)),
    'drealsr': PairedDataset(_find_drealsr, (), (2, 3, 4)),
    'city100': PairedDataset(_find_city100, ('NikonD5500', 'iPhoneX'), (2, 3, 4), interpolated=True),
}
