"""`tundp doctor`: what keeps pods from reaching each other, and the one command that mends it.

    cases.py      every id that can be named: its cause and its remedy, one table
    checks.py     the checks, in the order of the answer; each yields findings of those ids
    context.py    what checks share: the daemon's status if one answers, the kernel's netlink
    examine.py    runs them, each on its own: one that fails or takes too long hides no other
    diagnosis.py  what was found, as a document

Most findings are those of `tundp config check`, /readyz and `tundp.linux.obstacles`, unchanged.
"""
