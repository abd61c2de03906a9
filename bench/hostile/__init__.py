"""Hostile input from every side at once, on a lab of real daemons: `python -m bench.hostile`."""
