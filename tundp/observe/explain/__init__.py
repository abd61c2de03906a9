"""`tundp explain`: what would become of a packet, from facts that were looked at.

model.py     the question, steps, the explanation, as JSON
facts.py     what was looked at, and who an address belongs to
host.py      steps of the kernel: routes, rules, neighbours        (pure)
overlay.py   steps of the overlay: leases, sizes, source check       (pure)
judge.py     all steps of a packet, and the verdict                  (pure)

daemon/explain.py looks.
"""
