"""``python -m nbrunner``: the command line."""

from nbrunner.cli import main

if __name__ == "__main__":
    main()
