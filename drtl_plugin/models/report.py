"""What a run leaves for people: the table of its last lines, and a picture to look at."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

# What a training run validates: the suffix that names its results after the dataset, and its name in words.
BICUBIC, BEFORE, AFTER = '_bicubic', '', '_adapted'
PASSES = {BICUBIC: 'bicubic upsampling', BEFORE: 'before adaptation', AFTER: 'after adaptation'}
_TILE = 192
_CAPTION = 22


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The metrics of each validation set before and after adaptation.

    Args:
        results (Mapping): Metrics by dataset name and pass.

    Returns:
        str: A table for each dataset; a row for each pass, a column for each metric, 4 decimals.
    """
    tables = []
    for dataset in (name[: -len(BICUBIC)] for name in results if name.endswith(BICUBIC)):
        rows = {words: results[dataset + suffix] for suffix, words in PASSES.items() if dataset + suffix in results}
        metrics = list(rows[PASSES[BICUBIC]])
        if not metrics:
            continue
        lines = [f'{dataset:<24}' + ''.join(f'{metric:>12}' for metric in metrics)]
        lines += [f'  {words:<22}' + ''.join(f'{row[m]:>12.4f}' for m in metrics) for words, row in rows.items()]
        tables.append('\n'.join(lines))
    return '\n'.join(tables)


def comparison_picture(
    images: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], dataset: str
) -> np.ndarray | None:
    """Crops side by side, where the ground truth has most detail: a row for each image, each pass and the ground truth.

    Args:
        images (Mapping): ``(result, gt)`` of some images, by dataset name and pass; uint8 BGR ``(H, W, 3)``.
        dataset (str): The validation set.

    Returns:
        ndarray | None: uint8 BGR ``(H, W, 3)``; None where there are no images.
    """
    shown = {suffix: images[dataset + suffix] for suffix in PASSES if images.get(dataset + suffix)}
    rows = []
    for results in zip(*shown.values()):
        gt = results[0][1]
        top, left = busiest(gt, _TILE)
        tiles = [result for result, _ in results] + [gt]
        rows.append(np.hstack([tile[top : top + _TILE, left : left + _TILE] for tile in tiles]))
    if not rows:
        return None
    width = max(row.shape[1] for row in rows)
    rows = [cv2.copyMakeBorder(row, 0, 0, 0, width - row.shape[1], cv2.BORDER_CONSTANT) for row in rows]
    captions = [PASSES[suffix] for suffix in shown] + ['ground truth']
    head = np.full((_CAPTION, width, 3), 255, np.uint8)
    for i, caption in enumerate(captions):
        place = (i * width // len(captions) + 4, _CAPTION - 7)
        cv2.putText(head, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([head, *rows])


def busiest(gt: np.ndarray, side: int) -> tuple[int, int]:
    """Corner, top and left, of the square with the strongest gradients."""
    grey = cv2.cvtColor(gt, cv2.COLOR_BGR2GRAY)
    detail = cv2.boxFilter(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), -1, (side, side), anchor=(0, 0))
    height, width = (max(extent - side + 1, 1) for extent in grey.shape)
    top, left = np.unravel_index(np.argmax(detail[:height, :width]), (height, width))
    return int(top), int(left)


def command_line(*words: object, modules: Sequence[str] = ()) -> str:
    """A ``basicsr`` command to paste into a shell.

    Args:
        words (object): The subcommand and its arguments; those with spaces are quoted.
        modules (Sequence[str]): Modules that the command must ``--import``.

    Returns:
        str: The command.
    """
    imports = ['--import', *modules] if modules else []
    return shlex.join(['basicsr', *map(str, words), *imports])
