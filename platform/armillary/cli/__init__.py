"""The command line: `main.py` holds the table of commands, one small module per command group holds the commands."""
