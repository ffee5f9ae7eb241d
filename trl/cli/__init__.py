"""The command line, `trl` or `python -m trl.cli`. Imports nothing heavy before a command needs it."""
