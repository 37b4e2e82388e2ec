"""Where a text stands in a grammar: states, and the state after one more character.

Law of this file: pure; no tokens, no bytes. A state is what may come next: terminals, each with what has to follow it. What has to follow
is shared: everything that calls a rule at one place of the text is one node (Tomita's graph-structured stack, in the form of Scott and
Johnstone's GLL: "GLL Parsing", 2010), where llama.cpp keeps every combination as a stack of its own and so needs 2**n of them after n
characters of an ambiguous text. Equal states are one object that remembers its successors, so a text of a million characters within one
string takes one look-up each.

Work is counted (`Automaton.work`), so that whoever asks can end what is too ambiguous: nodes may still grow with the text's length.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heappop, heappush

from tars.errors import BadGrammar
from tars.workers.gbnf import END, Grammar

STATES_MOST = 4096
"""States kept at once, about 2 KB each. Beyond that they are forgotten and made again where they are needed."""

NODES_MOST = 16 * STATES_MOST
"""The same for nodes: a state of JSON has about ten."""

ACCEPT = -1
"""The position behind the root rule's end."""


class Node:
    """What may follow when a rule that was begun here ends: (position, the node of the rule around it)."""

    __slots__ = ("following",)

    def __init__(self, following: frozenset[tuple[int, Node]]) -> None:
        self.following = following


class State:
    """What may come after a text: `items` are (a terminal's position, its rule's node); `accepting`: or its end."""

    __slots__ = ("accepting", "by_class", "items", "several", "successors")

    def __init__(self, items: tuple[tuple[int, Node], ...], *, accepting: bool) -> None:
        self.items = items
        self.accepting = accepting
        self.successors: dict[int, State | None] = {}
        """By class of characters; None is none. Filled by `Automaton.after`."""
        self.by_class: dict[int, list[tuple[int, Node]]] | None = None
        """Items whose terminal matches one class only, the many of a long list of literals; None until somebody asks."""
        self.several: list[tuple[int, Node]] = []
        """The other items."""


class Automaton:
    """The states of one grammar. Not thread-safe: compiled anywhere, used in one thread."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.work = 0
        """Items and edges looked at so far, each about a third of a microsecond; whoever sets it to 0 begins a new count."""
        self.work_most: int | None = None
        """Beyond it `after` raises `BadGrammar`."""
        self._nodes: dict[frozenset[tuple[int, Node]], Node] = {}
        self._states: dict[tuple[bool, frozenset[tuple[int, Node]]], State] = {}
        bottom = Node(frozenset())
        self._outside = Node(frozenset({(ACCEPT, bottom)}))
        self._classes: dict[str, int] = {}
        accepting = grammar.nullable[grammar.root]
        self.start = self._state(set(), {grammar.root: set(self._outside.following)}, accepting=accepting)

    def character_class(self, character: str) -> int:
        """As the grammar's, remembered."""
        found = self._classes.get(character)
        if found is None:
            if len(self._classes) >= STATES_MOST:
                self._classes.clear()
            found = self._classes[character] = self.grammar.character_class(character)
        return found

    def after_text(self, state: State, text: str) -> State | None:
        """The state after these characters; None where they may not follow."""
        classes = self._classes
        current = state
        for character in text:
            kind = classes.get(character)
            if kind is None:
                kind = self.character_class(character)
            following = current.successors[kind] if kind in current.successors else self.after(current, kind)
            if following is None:
                return None
            current = following
        return current

    def after(self, state: State, kind: int) -> State | None:
        """The state after one character of this class; None where it may not follow. Raises `BadGrammar`."""
        try:
            return state.successors[kind]
        except KeyError:
            pass
        symbols, edges = self.grammar.symbols, self.grammar.terminal_edges
        if state.by_class is None:
            self._sort_items(state)
            assert state.by_class is not None
        single = state.by_class.get(kind, [])
        self._spend(1 + len(single) + len(state.several))
        matched = [(position + 1, node) for position, node in single]
        matched += [
            (position + 1, node)
            for position, node in state.several
            if bisect_right(edges[-2 - symbols[position]], kind) % 2
        ]
        found = self._closed(matched) if matched else None
        state.successors[kind] = found
        return found

    def _sort_items(self, state: State) -> None:
        symbols, edges = self.grammar.symbols, self.grammar.terminal_edges
        self._spend(len(state.items))
        by_class: dict[int, list[tuple[int, Node]]] = {}
        for item in state.items:
            matching = edges[-2 - symbols[item[0]]]
            if len(matching) == 2 and matching[1] == matching[0] + 1:
                by_class.setdefault(matching[0], []).append(item)
            else:
                state.several.append(item)
        state.by_class = by_class

    def _spend(self, amount: int) -> None:
        self.work += amount
        if self.work_most is not None and self.work > self.work_most:
            raise BadGrammar(
                "The grammar is too ambiguous: there are too many ways to read the text so far. Let alternatives begin with different "
                "characters, and leave out what may be empty within repetitions."
            )

    def _closed(self, matched: list[tuple[int, Node]]) -> State:
        """The state of positions that were just reached: rules that ended are left, rules that begin are entered."""
        grammar = self.grammar
        symbols, nullable = grammar.symbols, grammar.nullable
        terminals: set[tuple[int, Node]] = set()
        calls: dict[int, set[tuple[int, Node]]] = {}
        accepting = False
        seen: set[tuple[int, Node]] = set()
        pending = matched
        while pending:
            item = pending.pop()
            if item in seen:
                continue
            seen.add(item)
            position, node = item
            if position == ACCEPT:
                accepting = True
                continue
            symbol = symbols[position]
            if symbol == END:
                self._spend(len(node.following))
                pending.extend(node.following)
            elif symbol < 0:
                terminals.add(item)
            else:
                self._call(calls, symbol, position, node)
                if nullable[symbol]:
                    pending.append((position + 1, node))
        self._spend(len(seen))
        return self._state(terminals, calls, accepting=accepting)

    def _call(self, calls: dict[int, set[tuple[int, Node]]], rule: int, position: int, node: Node) -> None:
        """`rule` begins at `position`. Where nothing follows it there, what follows is what follows its caller: no level is added."""
        into = calls.setdefault(rule, set())
        if self.grammar.symbols[position + 1] == END:
            self._spend(len(node.following))
            into |= node.following
        else:
            into.add((position + 1, node))

    def _state(
        self, terminals: set[tuple[int, Node]], calls: dict[int, set[tuple[int, Node]]], *, accepting: bool
    ) -> State:
        """Enter the called rules, callers first: so that all callers of a rule at this place are known when its node is made."""
        grammar = self.grammar
        symbols, nullable, rank = grammar.symbols, grammar.nullable, grammar.rank
        queue: list[tuple[int, int]] = []
        for rule in calls:
            heappush(queue, (rank[rule], rule))
        while queue:
            _, rule = heappop(queue)
            following = frozenset(calls[rule])
            node = self._nodes.get(following)
            if node is None:
                node = self._nodes[following] = Node(following)
            for start in grammar.starts[rule]:
                position = start
                while (symbol := symbols[position]) != END:
                    self._spend(1)
                    if symbol < 0:
                        terminals.add((position, node))
                        break
                    # A rule that ends with itself, reached over nothing: "or once more" adds nothing here.
                    if symbol != rule:
                        if symbol not in calls:
                            heappush(queue, (rank[symbol], symbol))
                        self._call(calls, symbol, position, node)
                    if not nullable[symbol]:
                        break
                    position += 1
                # At the end nothing was consumed: whoever calls a nullable rule has gone past it already.
        key = (accepting, frozenset(terminals))
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= STATES_MOST or len(self._nodes) >= NODES_MOST:
                self._forget()
            state = self._states[key] = State(tuple(terminals), accepting=accepting)
        return state

    def _forget(self) -> None:
        """Drop the tables; states that somebody holds stay right, and are only no longer the same objects as new equal ones."""
        for state in self._states.values():
            state.successors.clear()
        self._states.clear()
        self._nodes.clear()
        start = getattr(self, "start", None)
        if start is not None:
            self._states[start.accepting, frozenset(start.items)] = start
