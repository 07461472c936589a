"""One file per command: its arguments, and what it prints.

Each module has ``SUMMARY``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(args)``. Heavy imports are inside
``run``, so that ``--help`` and errors on the command line appear at once.
"""
