"""Makes `python -m esper` the same as `esper`."""

from esper.cli.main import main

main()
