"""``python -m dora_export``: the command line."""

from dora_export.cli import main

if __name__ == "__main__":
    main()
