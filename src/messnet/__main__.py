"""``python -m messnet`` and the ``messnet`` command."""

from messnet import cli
from messnet.costs.processor import spin_briefly


def main() -> None:
    """Runs the command line."""
    spin_briefly()  # before anything imports torch
    cli.main()


if __name__ == "__main__":
    main()
