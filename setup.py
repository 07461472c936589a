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
    packages=find_packages(include=['drtl_plugin', 'drtl_plugin.*']),
    package_data={'drtl_plugin': ['py.typed']},
    # The build of basicsr 1.4.2 itself fails from Python 3.13 on; the marker keeps pip from trying before it looks at
    # python_requires.
    python_requires='>=3.9,<3.13',
    install_requires=[
        "basicsr==1.4.2; python_version < '3.13'",
        'torch>=2.6',  # from which on torch.load, as BasicSR calls it, runs no code of a file
        'mmengine>=0.10',
        'opencv-python',
        'lmdb',
        'pyyaml',
    ],
    extras_require={
        # higher and torchopt: what outer gradients are checked against.
        # spandrel: what others read our weights with.
        'dev': [
            *('pytest>=8', 'pytest-cov', 'pytest-xdist', 'hypothesis', 'ruff==0.17.6', 'mypy', 'higher'),
            *('torchopt', 'spandrel', 'jsonschema', *EXPORT),
        ],
        'export': EXPORT,
        'pyiqa': ['pyiqa'],
    },
    entry_points={'console_scripts': ['basicsr = drtl_plugin.cli:main']},
    classifiers=[
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
