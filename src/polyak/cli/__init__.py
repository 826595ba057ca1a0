"""The command `polyak`: arguments and printing."""

from .app import main as main
