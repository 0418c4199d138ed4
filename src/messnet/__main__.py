"""``python -m messnet`` and the ``messnet`` command."""

from messnet.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
