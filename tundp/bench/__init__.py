"""`tundp bench`: what the overlay costs, against kernel VXLAN, with numbers people can trust.

Start reading at run.py. docs/benchmarking.md explains method, columns and traps.
"""
