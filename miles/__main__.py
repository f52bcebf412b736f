"""`python -m miles`: the same as the `miles` command."""

from miles.cli.main import main

main()
