"""``python -m saekit``: the same as the command ``saekit``."""

from .cli.app import main

if __name__ == "__main__":
    main()
