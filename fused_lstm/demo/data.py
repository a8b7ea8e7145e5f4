"""The text the demo learns: the Python language reference of the standard library, as characters.

`pydoc_data.topics` ships with CPython (it is what ``help("if")`` prints), so there is nothing to
download. Its wording differs slightly from one Python release to the next; within one release
everything here is deterministic.

Dimensions: `N` characters of text, `T` time steps of a batch, `B` streams read side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Paragraphs are held out in runs of this many, so that validation text reads on as training text
# does; every tenth run is held out.
_PARAGRAPHS_PER_RUN = 20
_RUNS_PER_HELD_OUT_RUN = 10

# Underlines and deep indentation are cut to this many characters. They teach little, and a trained
# LSTM that is fed one character over and over can magnify a difference of rounding a thousandfold
# within a few batches, which would tell two right layers apart.
_LONGEST_REPEAT = 4
_LONG_REPEAT = re.compile(rf"([^\n])\1{{{_LONGEST_REPEAT},}}")

_TYPOGRAPHY = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "--",
        "\N{HORIZONTAL ELLIPSIS}": "...",
    }
)


@dataclass(frozen=True)
class Corpus:
    """A text in two disjoint parts and the alphabet both are written in.

    Attributes:
        training: the text to learn.
        validation: text that shares no paragraph with `training`.
    """

    training: str
    validation: str

    @cached_property
    def alphabet(self) -> str:
        """Every character of the two parts, once, in code point order; its length is `V`."""
        return "".join(sorted(set(self.training) | set(self.validation)))

    def encode(self, text: str) -> Tensor:
        """Turn a text into indices of the alphabet.

        Args:
            text: `N` characters of the alphabet.

        Returns:
            [N] int64, the characters' indices in `alphabet`.

        Raises:
            ValueError: a character is not of the alphabet.
        """
        index_of = {character: index for index, character in enumerate(self.alphabet)}
        unknown = sorted(set(text) - index_of.keys())
        if unknown:
            raise ValueError(
                f"text holds {''.join(unknown)!r}, which the corpus does not; "
                f"expected characters of {self.alphabet!r}"
            )
        return torch.tensor([index_of[character] for character in text], dtype=torch.int64)

    def decode(self, indices: Tensor) -> str:
        """Turn indices of the alphabet back into text.

        Args:
            indices: [N] int64.

        Returns:
            `N` characters.
        """
        return "".join(self.alphabet[index] for index in indices.tolist())


def load_python_reference() -> Corpus:
    """Read the Python language reference from the standard library and split it.

    Topics quote each other, so a paragraph that has been read before is dropped: otherwise much of
    the validation text would have been seen in training. Tables drawn with characters are dropped
    too, being mostly blanks, and long repeats of one character are shortened. Typographic quotes
    and dashes become ASCII, so that what the model writes prints on every terminal.

    Returns:
        About 290,000 characters to learn and 36,000 to validate on (Python 3.11).

    Raises:
        ModuleNotFoundError: this Python was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo learns the text of the standard library's pydoc_data.topics, which this "
            "Python was packaged without; expected a complete standard library",
            name=error.name,
        ) from error

    paragraphs: dict[str, None] = {}  # a set that keeps the order
    for name in sorted(topics):
        text = topics[name].translate(_TYPOGRAPHY).encode("ascii", "ignore").decode("ascii")
        text = _LONG_REPEAT.sub(r"\1" * _LONGEST_REPEAT, text)
        for paragraph in re.split(r"\n{2,}", text.strip("\n")):
            if not _draws_a_table(paragraph):
                paragraphs[paragraph] = None
    ordered = list(paragraphs)
    parts: dict[bool, list[str]] = {False: [], True: []}
    for first in range(0, len(ordered), _PARAGRAPHS_PER_RUN):
        run = first // _PARAGRAPHS_PER_RUN
        held_out = run % _RUNS_PER_HELD_OUT_RUN == _RUNS_PER_HELD_OUT_RUN - 1
        parts[held_out] += ordered[first : first + _PARAGRAPHS_PER_RUN]
    return Corpus(training="\n\n".join(parts[False]), validation="\n\n".join(parts[True]))


def _draws_a_table(paragraph: str) -> bool:
    return any(line.lstrip().startswith(("|", "+-", "+=")) for line in paragraph.splitlines())


@dataclass(frozen=True)
class Batch:
    """One step's characters.

    Attributes:
        inputs: [T, B] int64, the characters read.
        targets: [T, B] int64, the characters that follow them.
        continues: whether the `B` streams read on where the previous batch stopped; if not, the
            state carried between batches starts again at zero.
    """

    inputs: Tensor
    targets: Tensor
    continues: bool


def read_streams(text: Tensor, *, steps: int, streams: int, start: int = 0) -> Iterator[Batch]:
    """Read a text once, as `B` streams side by side.

    The text is cut into `B` equal stretches, and consecutive batches read consecutive steps of
    each. The last batch may be shorter; at most `B` characters at the end of the text are unread.

    Args:
        text: [N] int64, encoded characters.
        steps: `T`, time steps per batch.
        streams: `B`, the number of stretches.
        start: the first character to read.

    Yields:
        Batches of [T, B], the last of [1...T, B].

    Raises:
        ValueError: the text is shorter than two characters per stream.
    """
    length = (len(text) - start - 1) // streams
    if length < 1:
        raise ValueError(
            f"text has {len(text) - start} characters from character {start} on; "
            f"expected more than {streams}, one for each stream"
        )
    stretches = text[start : start + length * streams].view(streams, length).t()
    followers = text[start + 1 : start + 1 + length * streams].view(streams, length).t()
    for first in range(0, length, steps):
        yield Batch(
            inputs=stretches[first : first + steps].contiguous(),
            targets=followers[first : first + steps].contiguous(),
            continues=first > 0,
        )


def read_streams_forever(
    text: Tensor, *, steps: int, streams: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Read a text again and again, each time from a random offset so that no two readings align.

    Args:
        text: [N] int64, encoded characters.
        steps: `T`, time steps per batch.
        streams: `B`, the number of streams.
        generator: a CPU generator; one number is drawn from it per reading.

    Yields:
        Batches of [T, B]; shorter ones at the end of a reading are left out.

    Raises:
        ValueError: the text is too short for one batch.
    """
    if len(text) < (steps + 1) * streams + steps:
        raise ValueError(
            f"text has {len(text)} characters; expected at least {(steps + 1) * streams + steps} "
            f"for batches of {steps} steps by {streams} streams"
        )
    while True:
        start = int(torch.randint(steps, (), generator=generator))
        for batch in read_streams(text, steps=steps, streams=streams, start=start):
            if len(batch.inputs) == steps:
                yield batch
