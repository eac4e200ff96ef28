"""The ``hip-trt`` command. Subcommands are verbs; each is a thin layer over the Python function of the same meaning.

A command is a module here with ``register(app)``, which :mod:`hip_trt.cli.app` calls. Modules import the heavy packages
inside the command, so that ``--help`` answers at once. A :class:`~hip_trt.errors.HipTrtError` that leaves a command is
printed on one line, and the exit status is 1.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``hip-trt`` script."""
    from hip_trt.cli.app import app

    app()
