"""The camera fit: an auxiliary task fitted to the target's pairs."""

from drtl_plugin.tasks.camera_fit.fit import check_pairs, fit_camera
from drtl_plugin.tasks.camera_fit.model import CameraFit

__all__ = ['CameraFit', 'check_pairs', 'fit_camera']
