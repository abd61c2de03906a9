"""The daemon: `run` opens everything in order, `node` is what it keeps going."""
