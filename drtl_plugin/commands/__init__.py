"""One file per command: its arguments, and what it prints.

The module of a command has ``SUMMARY``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(args)``. Heavy imports are
inside ``run``, so that ``--help`` and errors on the command line appear at once. ``arguments``, ``runs`` and ``losses``
are not commands; they have what several commands share, and ``adapt --loss``.
"""
