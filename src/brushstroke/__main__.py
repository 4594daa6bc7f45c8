"""`python -m brushstroke` is the command line."""

from brushstroke.cli import main

raise SystemExit(main())
