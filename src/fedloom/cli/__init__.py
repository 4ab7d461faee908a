"""The command line: the one place that prints. What is heavy is imported by the command that needs it."""

from fedloom.cli import running

# isort: split
# Commands stand in --help as their files stand here.
from fedloom.cli import benching, comparing, exporting

# isort: split
from fedloom.cli import deploying, starting
from fedloom.cli.app import app, main

__all__ = ["app", "benching", "comparing", "deploying", "exporting", "main", "running", "starting"]
