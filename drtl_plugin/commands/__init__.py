"""One command a file: its arguments, and what it prints.

Each module has ``SUMMARY``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(args)``. Heavy imports are inside
``run``, so that ``--help`` and wrong command lines answer at once.
"""
