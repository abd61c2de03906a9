"""The checks of `tundp config check`; daemon/check.py has the list."""
