"""The wire rules: bytes in, verdicts out. No sockets, no clock, no state: the specification.

Start reading at encap.py.
"""
