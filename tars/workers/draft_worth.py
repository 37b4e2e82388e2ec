"""Whether a draft model is worth its time, and how many tokens it should propose.

Law of this file: pure; seconds come in as numbers. A draft model that is good on one text is bad on the next, so the answer is learned from
what was accepted last, and asked again now and then where it was no.

With a share p of proposed tokens accepted, one step with k proposals brings 1 + p + ... + p^k tokens (Leviathan and others 2023, "Fast
Inference from Transformers via Speculative Decoding", section 3.1) and costs k steps of the draft and one of k + 1 tokens of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LENGTHS = (2, 4, 8)
"""Proposals of one step that are measured and chosen from."""

WORTH = 1.05
"""Expected gain from which drafting is on: below it the measurement's own noise decides."""

FORGET = 0.95
"""What a past token counts against the one after it: about the last twenty decide."""

PRIOR_SHARE, PRIOR_TOKENS = 0.7, 2.0
"""What is believed before anything was seen, and how many tokens that counts."""

PROBE_AFTER, PROBE_AFTER_MOST = 256, 8192
"""Plain steps before drafting is tried again; twice as many after every try that failed."""

PROBE_STEPS = 8


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, by how many answers are computed at once."""

    draft: Mapping[int, float]
    """One token of each by the draft model."""
    plain: Mapping[int, float]
    """One token of each by the model."""
    checked: Mapping[tuple[int, int], float]
    """(answers, k): k + 1 tokens of each by the model."""

    def gain(self, answers: int, length: int, share: float) -> float:
        """How many times faster than without the draft model, where that share of its proposals is accepted."""
        tokens = sum(share**place for place in range(length + 1))
        seconds = length * self.draft[answers] + self.checked[answers, length]
        return tokens * self.plain[answers] / seconds

    @property
    def hopeless(self) -> bool:
        """Whether it would be slower even if every proposal were right."""
        return all(self.gain(answers, length, 1.0) < WORTH for answers, length in self.checked)


class DraftWorth:
    """See the module's law."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._tested = PRIOR_TOKENS
        self._accepted = PRIOR_SHARE * PRIOR_TOKENS
        self._plain_steps = 0
        self._probe_after = PROBE_AFTER
        self._probes_left = 0

    @property
    def share(self) -> float:
        """Of the tokens that were tested lately, those that were accepted."""
        return self._accepted / self._tested

    def length(self, answers: int) -> int:
        """How many tokens to propose in the next step of so many answers; 0: compute it without."""
        lengths = [length for count, length in self._costs.checked if count == answers]
        if not lengths:
            return 0
        best = max(lengths, key=lambda length: self._costs.gain(answers, length, self.share))
        if self._costs.gain(answers, best, self.share) >= WORTH:
            self._plain_steps, self._probe_after, self._probes_left = 0, PROBE_AFTER, 0
            return best
        if self._probes_left:
            return min(lengths)
        self._plain_steps += 1
        if self._plain_steps >= self._probe_after and self._costs.gain(answers, min(lengths), 1.0) >= WORTH:
            self._plain_steps, self._probe_after = 0, min(2 * self._probe_after, PROBE_AFTER_MOST)
            self._probes_left = PROBE_STEPS
        return 0

    def took(self, proposed: int, accepted: int) -> None:
        """An answer accepted so many of the tokens that were proposed to it: none behind the first wrong one was tested. `proposed` of an
        answer that ended are those it accepted: the others were neither right nor wrong.
        """
        for right in [True] * accepted + [False] * (accepted < proposed):
            self._tested = FORGET * self._tested + 1
            self._accepted = FORGET * self._accepted + right
        self._probes_left = max(0, self._probes_left - 1)
