"""What the kernel would do with the overlay's packets, asked of it read-only: look.py.

packet.py     the packets, and what a test of a rule says of them
rules.py      tables, chains and rules of netfilter; a packet's way through them
xtables.py    iptables-save's lines to rules      (pure)
nft.py        `nft -j list table` to rules      (pure)
rulesets.py   the programs that list them
firewall.py   rules in the way, as findings with the command that lets packets pass
programs.py   filters of tc, and XDP
ipsec.py      IPsec policies
sysctls.py    forwarding, rp_filter, conntrack
routes.py     the kernel's own routing decisions
look.py       all of it
"""
