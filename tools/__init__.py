"""Command-line tools, see README.md in this folder."""
