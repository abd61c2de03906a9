"""The C engines and everything that touches tundp._native: above this folder nobody sees cdata."""
