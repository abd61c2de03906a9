"""The C engines: the only folder that touches tundp._native."""
