"""A file for each command of fixmatch/cli.py: its arguments and what it prints, in `main(argv) -> exit code`."""
