"""Seeing the daemon: health checks, metrics, status."""
