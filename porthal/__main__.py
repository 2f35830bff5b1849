"""`python -m porthal`, as torchrun starts it."""

from porthal.cli import main

main()
