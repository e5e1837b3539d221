"""`python -m casallm` is the `casallm` command."""

from casallm.cli import main

if __name__ == "__main__":
    main()
