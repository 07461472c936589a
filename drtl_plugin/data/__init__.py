"""Datasets, registered in BasicSR's DATASET_REGISTRY, and the auxiliary distortions."""

from drtl_plugin.data.distortion_task_dataset import DistortionTaskDataset
from drtl_plugin.data.few_shot_pair_dataset import FewShotPairDataset

__all__ = ['DistortionTaskDataset', 'FewShotPairDataset']
