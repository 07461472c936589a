"""Auxiliary tasks, which turn GT into LQ: distortions, their library, and the camera fit."""
