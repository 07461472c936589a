"""Packaging of drtl_plugin; tool settings are in pyproject.toml, exact tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+?)'", (HERE / 'drtl_plugin' / '__init__.py').read_text(encoding='utf-8')).group(
    1
)

EXPORT = ['onnx', 'onnxscript', 'onnxruntime']

setup(
    name='drtl_plugin',
    version=VERSION,
    description='Distortion-relation guided transfer learning (DRTL) for the BasicSR image-restoration toolbox',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    # A wheel carries the shipped option files for `basicsr init`.
    packages=[*find_packages(include=['drtl_plugin', 'drtl_plugin.*']), 'drtl_plugin.shipped_options'],
    package_dir={'drtl_plugin.shipped_options': 'options'},
    package_data={
        'drtl_plugin': ['py.typed', '*/*.html', '*/*.pth'],
        'drtl_plugin.shipped_options': ['*.yml', '*.json'],
    },
    python_requires='>=3.10',
    install_requires=[
        # pip cannot build it on Python 3.13 and later; `python -m drtl_plugin.install` can.
        "basicsr==1.4.2; python_version < '3.13'",
        'torch>=2.6',  # from which on torch.load, as BasicSR calls it, runs no code of a file
        'torchvision',
        'mmengine>=0.10',
        'opencv-python>=4.12',  # the first that writes metadata
        'lmdb',
        'msgspec>=0.20',
        'pyyaml',
        'filelock>=4.1',  # whose locks forked processes do not keep
        'jinja2',
        'matplotlib',
        'numpy',
        'packaging',
        'pillow>=11',  # the first that gives all XMP
        'scikit-image',
        'safetensors',
        'scipy',
        'spandrel>=0.4',
        'torchmetrics',  # MS-SSIM on patches of any size; pytorch-msssim wants 161 pixels a side
        'tqdm',
        'setuptools<81',  # tensorboard imports pkg_resources, which later ones lack
    ],
    extras_require={
        # higher and torchopt: peers that outer gradients are compared with.
        'dev': [
            *('pytest>=8', 'pytest-cov', 'pytest-xdist', 'hypothesis', 'ruff==0.17.6', 'mypy', 'import-linter'),
            *('higher', 'torchopt', 'jsonschema', 'build', 'twine', 'check-jsonschema', *EXPORT),
            *('nbclient', 'nbformat', 'ipykernel'),  # run docs/your_camera.ipynb
        ],
        'export': EXPORT,
        'pyiqa': ['pyiqa'],
    },
    entry_points={'console_scripts': ['basicsr = drtl_plugin.__main__:main']},
    classifiers=[
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Programming Language :: Python :: 3.14',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
