"""``plot``."""

from sb3_diffrl.cli.arguments import Subparsers


def add_commands(commands: Subparsers) -> None:
    """Add the command."""
