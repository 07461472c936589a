"""Datasets, registered in BasicSR's DATASET_REGISTRY, and functions that read and write image files."""

from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.data.few_shot_pair_dataset import FewShotPairDataset

__all__ = ['DistortionTaskDataset', 'FewShotPairDataset']
