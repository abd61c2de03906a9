"""netfilter's tables, chains and rules, and the way of a packet through one base chain.

Each base chain judges for itself: an accept ends it, not the next one; a drop is final
(nftables wiki, "Configuring chains"). iptables' built-in chains are base chains, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, unique
from typing import Final

from tundp.linux.obstacles.packet import Match, Packet, Test, worst

TRACKING: Final = -200
"""Priority at which conntrack meets packets (NF_IP_PRI_CONNTRACK); later exemptions are void."""
ALL_BITS: Final = 0xFFFFFFFF


@unique
class Kind(Enum):
    """What becomes of a packet a rule matches."""

    NONE = "goes on"
    ACCEPT = "accept"
    DROP = "drop"
    QUEUE = "queue"
    """A program in user space decides."""
    DIVERT = "divert"
    """It goes to another address or socket, and is not judged any more."""
    RETURN = "return"
    JUMP = "jump"
    GOTO = "goto"


_ENDS: Final = (Kind.DROP, Kind.QUEUE, Kind.DIVERT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. Of a verdict map there is one for each of its elements."""

    text: str
    """As the program that lists it prints it, or its JSON."""
    tests: tuple[Test, ...] = ()
    kind: Kind = Kind.NONE
    target: str = ""
    """The chain of JUMP and GOTO."""
    marks: int = 0
    """The bits of the packet's mark it may set."""
    untracks: bool = False
    """Whether it keeps conntrack from the packet."""
    rewrites_source: bool = False
    """Whether it gives a connection another source address."""
    place: int = 0
    """iptables: its number in the chain, from 1. nft: its handle."""

    def match(self, packet: Packet, mark: int) -> Match:
        """All tests together; stops at the first that fails."""
        answer = Match.YES
        for test in self.tests:
            answer = worst(answer, test.match(packet, mark))
            if answer is Match.NO:
                break
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A chain, a base chain if it has a hook."""

    name: str
    rules: tuple[Rule, ...] = ()
    hook: str = ""
    """`prerouting`, `input`, `forward`, `output`, `postrouting`, `ingress`, `egress`, ...; of the
    families bridge and arp with the family before it: `bridge input`."""
    priority: int = 0
    devices: tuple[str, ...] = ()
    """Of the hooks `ingress` and `egress`: the devices whose frames it sees."""
    reroutes: bool = False
    """Whether packets of this host are routed again when it has changed their mark."""
    drops_by_default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of one family, and the program that can change it."""

    program: str
    """`iptables`, `iptables-legacy` or `nft`: what to type."""
    family: str
    """`ip` or `inet`, ..."""
    name: str
    chains: Mapping[str, Chain] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For people."""
        if self.program == "nft":
            return f"nft table {self.family} {self.name}"
        return f"{self.program} table {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Where a packet ends, or may end."""

    table: Table
    base: Chain
    chain: Chain
    rule: Rule | None
    """None: the policy of the base chain."""
    certainty: Match
    """YES: all such packets; PART: some of them; UNKNOWN: by a rule that is not understood."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Bits of the mark a packet may have when it is routed; a path that leads to none has 0."""

    possible: int = 0
    sure: int = 0
    """Those set for some packets at least, by a rule that is understood."""

    def with_more(self, possible: int, sure: int) -> Marks:
        """Those, and these."""
        return Marks(self.possible | possible, self.sure | sure)


class Passage:
    """One kind of packet on its way through hooks, in order; keeps the marks it may have."""

    def __init__(self, *, is_for_port: bool = False) -> None:
        """is_for_port: whether a packet that is diverted has missed its end, a socket of ours."""
        self.is_for_port = is_for_port
        self.stops: list[Stop] = []
        self.accepts: list[Stop] | None = None
        """Where the packet, or some of it, is accepted or diverted, in order; a list is filled."""
        self.untracked = Match.NO
        """How surely conntrack is kept from the packet."""
        self.marks = Marks()
        """What routing may see."""
        self._mark = 0

    def through(self, table: Table, base: Chain, packet: Packet) -> None:
        """Pass one base chain, and note where the packet may be dropped."""
        _Walk(table, base, packet, self).run()

    @property
    def mark(self) -> int:
        """The bits rules so far may have set."""
        return self._mark

    def apply(self, rule: Rule, base: Chain, certainty: Match) -> None:
        """Note what a rule without a verdict does to the packet."""
        if rule.untracks and base.priority < TRACKING:
            self.untracked = max(self.untracked, certainty)
        if not rule.marks:
            return
        self._mark |= rule.marks
        if base.hook == "prerouting" or base.reroutes:
            is_sure = certainty >= Match.PART and rule.marks != ALL_BITS
            self.marks = self.marks.with_more(rule.marks, rule.marks if is_sure else 0)


class _Walk:
    """A walk through one base chain. What is left of the packets is told by certainty."""

    def __init__(self, table: Table, base: Chain, packet: Packet, passage: Passage) -> None:
        self._table = table
        self._base = base
        self._packet = packet
        self._passage = passage
        self._neutral: dict[str, bool] = {}

    def run(self) -> None:
        left = self._chain(self._base, Match.YES, frozenset())
        if left is not Match.NO and self._base.drops_by_default:
            self._stop(self._base, None, left)

    def _chain(self, chain: Chain, arriving: Match, above: frozenset[str]) -> Match:
        """Which packets come back from a chain: NO for none, else how certainly."""
        if chain.name in above:  # the kernel refuses loops; a listing in two halves may show one
            return arriving
        above |= {chain.name}
        left, returned = arriving, Match.NO
        for rule in chain.rules:
            answer = self._answer(rule)
            if answer is Match.NO:
                continue
            here = worst(left, answer)
            self._passage.apply(rule, self._base, here)
            if rule.kind in (Kind.JUMP, Kind.GOTO):
                back = self._sub(rule, here, above)
                is_goto = rule.kind is Kind.GOTO
                if is_goto:
                    returned = max(returned, back)
                if answer is Match.YES:
                    if is_goto or back is Match.NO:
                        return returned
                    left = back
                elif back is not here:
                    left = worst(left, answer)
                continue
            if rule.kind in (Kind.DROP, Kind.QUEUE):
                is_queue = rule.kind is Kind.QUEUE
                self._stop(chain, rule, Match.UNKNOWN if is_queue else here)
                if answer is Match.YES:
                    return returned
            elif rule.kind in (Kind.ACCEPT, Kind.DIVERT):
                if self._passage.accepts is not None:
                    self._passage.accepts.append(self._end(chain, rule, here))
                # What may be diverted is somebody's wish, and rarely ours: only what is sure.
                is_lost = rule.kind is Kind.DIVERT and self._passage.is_for_port
                if is_lost and here >= Match.PART:
                    self._stop(chain, rule, here)
                if answer is Match.YES:
                    return returned
                left = here
            elif rule.kind is Kind.RETURN:
                returned = max(returned, here)
                if answer is Match.YES:
                    return returned
                left = here
        return max(returned, left)

    def _answer(self, rule: Rule) -> Match:
        mark, untracked = self._passage.mark, self._passage.untracked
        if untracked is Match.NO:
            return rule.match(self._packet, mark)
        without = rule.match(replace(self._packet, is_untracked=True), mark)
        if untracked is Match.YES:
            return without
        tracked = rule.match(self._packet, mark)
        if without is tracked:
            return tracked
        return worst(Match.PART, *({without, tracked} - {Match.NO}))

    def _sub(self, rule: Rule, here: Match, above: frozenset[str]) -> Match:
        chain = self._table.chains.get(rule.target)
        return here if chain is None else self._chain(chain, here, above)

    def _stop(self, chain: Chain, rule: Rule | None, certainty: Match) -> None:
        self._passage.stops.append(self._end(chain, rule, certainty))

    def _end(self, chain: Chain, rule: Rule | None, certainty: Match) -> Stop:
        return Stop(table=self._table, base=self._base, chain=chain, rule=rule, certainty=certainty)


def bases(
    tables: Sequence[Table], hook: str, *, are_all: bool = False
) -> list[tuple[Table, Chain]]:
    """The base chains of a hook in the order packets meet them.

    are_all: also those in which no rule drops, or does what lets another one drop.
    """
    found = [
        (table, chain)
        for table in tables
        for chain in table.chains.values()
        if chain.hook == hook and (are_all or can_stop(table, chain))
    ]
    return sorted(found, key=lambda each: each[1].priority)


def can_stop(table: Table, base: Chain) -> bool:
    """Whether any rule below a base chain drops, or does what lets another one drop."""
    seen: set[str] = set()
    waiting = [base]
    while waiting:
        chain = waiting.pop()
        if chain.drops_by_default:
            return True
        for rule in chain.rules:
            if rule.kind in _ENDS or rule.marks or rule.untracks:
                return True
            if rule.target in table.chains and rule.target not in seen:
                seen.add(rule.target)
                waiting.append(table.chains[rule.target])
    return False
