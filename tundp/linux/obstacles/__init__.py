"""What the kernel would do with the overlay's packets, asked of it read-only: look.py.

packet.py     the packets, and what a test of a rule says of them
rules.py      tables, chains and rules of netfilter; a packet's way through them
xtables.py    iptables-save's lines to rules      (pure)
nft.py        `nft -j list table` to rules      (pure)
rulesets.py   the programs that list them
firewall.py   rules in the way, as findings with the command that lets packets pass
devices.py    devices, what they are stacked on, VRFs
programs.py   filters and queues of tc, and XDP
bpf.py        programs no netlink dump lists: tcx, sk_lookup, control groups
neighbours.py fixed link addresses
ipsec.py      IPsec policies
sysctls.py    forwarding, rp_filter, conntrack
routes.py     the kernel's own routing decisions
own_rules.py  the policy rules it starts with
look.py       all of it
"""
