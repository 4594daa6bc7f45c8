"""`python -m brushstroke` is the command line."""

from brushstroke.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
