"""dataset.class_index: which number and which name each class has.

JSON {"0": ["n01440764", "tench"], ...} (keras, torchvision) or {"n01440764": 0, ...}; or text, a
class a line in the order of their numbers, as `n01440764` or `n01440764 tench, Tinca tinca`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import fsspec

WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassIndex:
    """ids: folder name (or label) -> class id; names: of class 0, 1, 2, … for people."""

    ids: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def of(self, label: str) -> int:
        """The id of a label. Raises ValueError for one that is not in the file."""
        if label not in self.ids:
            raise ValueError(f"class {label!r} is not in dataset.class_index; add it there")
        return self.ids[label]


def index_of(labels: Sequence[str]) -> ClassIndex:
    """Classes numbered in the order given."""
    return ClassIndex({label: number for number, label in enumerate(labels)}, tuple(labels))


def read_class_index(path: str) -> ClassIndex:
    """Raises ValueError unless the numbers are 0, 1, 2, … and every label has one."""
    with fsspec.open(path, "rb") as file:
        text = file.read().decode()
    try:
        entries = _from_json(text) if path.endswith(".json") else _from_lines(text)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f'dataset.class_index={path} is neither {{"0": ["n01440764", "tench"]}} nor '
            f'{{"n01440764": 0}} nor a class a line: {error}'
        ) from None
    labels = [label for _, label, _ in sorted(entries)]
    if sorted(number for number, _, _ in entries) != list(range(len(entries))) or not entries:
        raise ValueError(f"dataset.class_index={path}: the numbers are not 0, 1, 2, …, each once")
    if len({*labels}) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise ValueError(f"dataset.class_index={path}: {twice!r} is there twice")
    counts = Counter(name for _, _, name in entries)
    names = [f"{name} ({key})" if counts[name] > 1 else name for _, key, name in sorted(entries)]
    return ClassIndex(index_of(labels).ids, tuple(names))


def _from_json(text: str) -> list[tuple[int, str, str]]:
    """(number, label, name) of every class."""
    content = json.loads(text)
    if all(isinstance(value, int) for value in content.values()):
        return [(number, label, label) for label, number in content.items()]
    entries = []
    for number, value in content.items():
        words = [value] if isinstance(value, str) else value
        entries.append((int(number), words[0], words[-1]))
    return entries


def _from_lines(text: str) -> list[tuple[int, str, str]]:
    entries = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        label, _, name = line.partition(" ") if WORDNET_ID.match(line) else (line, "", "")
        entries.append((number, label, name.strip() or label))
    return entries
