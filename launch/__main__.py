"""`python -m launch` is the launcher's command line."""

from launch.cli import main

if __name__ == "__main__":
    main()
