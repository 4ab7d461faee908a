"""The command line: the one place that prints. What is heavy is imported by the command that needs it."""

from fedloom.cli import running

# isort: split
# Commands stand in --help as their files stand here.
from fedloom.cli import comparing, deploying
from fedloom.cli.app import app, main

__all__ = ["app", "comparing", "deploying", "main", "running"]
