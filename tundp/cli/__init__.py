"""The command line: parsing, printing and exit codes, one file a command."""

from tundp.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from tundp.cli.program import flanneld, main

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_OK", "EXIT_USAGE", "flanneld", "main"]
