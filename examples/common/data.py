"""Text as bytes: files split by name into train, validation and held-out parts, and their batches.

The default text is the source of Python's own standard library, which every machine that runs the
examples has. A whole file goes to one part, chosen by a hash of its name, so that no part contains
the beginning of a sentence whose end another part is scored on, and so that adding a file moves no
other one.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

#: Of 20 files, one is for choosing settings and one for the numbers that are reported.
PARTS = ("held_out", "validation") + ("train",) * 18

#: Installations without these folders exist, and tables of numbers are not text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {"encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """The three parts of a text, each one array of bytes."""

    train: UInt8[np.ndarray, " train_bytes"]
    validation: UInt8[np.ndarray, " validation_bytes"]
    held_out: UInt8[np.ndarray, " held_out_bytes"]

    def part(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        """Returns one part by name, or says which there are."""
        if name not in set(PARTS):
            raise ValueError(f"No part is called {name!r}; write one of {sorted(set(PARTS))}.")
        return getattr(self, name)


def load_corpus(paths: Sequence[str | Path] = ()) -> Corpus:
    """Reads and splits files and folders; the standard library's source where none are given.

    Args:
        paths: Files, and folders to read every file of. A single file is cut 90 : 5 : 5.

    Returns:
        The text's parts. Files follow each other in the order of their names.

    Raises:
        ValueError: If a path does not exist, or the text is too short for a part to have any.
    """
    named = list(_standard_library() if not paths else _named_files(paths))
    texts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    if len(named) == 1:
        text = named[0][1].read_bytes()
        cuts = [len(text) * 90 // 100, len(text) * 95 // 100]
        for part, piece in zip(
            ("train", "validation", "held_out"),
            (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]),
            strict=True,
        ):
            texts[part].append(piece)
    else:
        for name, path in sorted(named):
            texts[part_of(name)].append(path.read_bytes())
    parts = {part: np.frombuffer(b"".join(texts[part]), np.uint8) for part in texts}
    empty = [part for part, text in parts.items() if len(text) < 1024]
    if empty:
        raise ValueError(
            f"{len(named)} files leave less than 1024 bytes for {', '.join(empty)}. "
            "Give more or longer files to --data, or a single one, which is cut by length."
        )
    return Corpus(**parts)


def part_of(name: str) -> str:
    """Returns the part that a file belongs to, from a hash of its name.

    Example:
        >>> part_of("json/decoder.py")
        'train'
    """
    return PARTS[hashlib.sha256(name.encode()).digest()[0] % len(PARTS)]


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if not folders & LEFT_OUT and relative.parts[0] not in TABLES:
            yield relative.as_posix(), path


def _named_files(paths: Sequence[str | Path]) -> Iterator[tuple[str, Path]]:
    for given in map(Path, paths):
        if given.is_dir():
            for path in given.rglob("*"):
                if path.is_file():
                    yield path.relative_to(given).as_posix(), path
        elif given.is_file():
            yield given.name, given
        else:
            raise ValueError(f"--data {given} is neither a file nor a folder.")


def training_batch(
    text: UInt8[np.ndarray, " bytes"], *, seed: int, step: int, batch_size: int, length: int
) -> UInt8[np.ndarray, "batch length+1"]:
    """Returns the windows of one step, a pure function of seed and step.

    That it remembers nothing is what lets a killed run go on with the very batches it would have
    seen.
    """
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    starts = random.integers(0, len(text) - length, size=batch_size)
    return text[starts[:, None] + np.arange(length + 1)]


def scoring_batch(
    text: UInt8[np.ndarray, " bytes"], *, windows: int, length: int
) -> UInt8[np.ndarray, "windows length+1"]:
    """Returns windows at equal distances through the whole text: the same at every step."""
    starts = np.linspace(0, len(text) - length - 1, windows).astype(np.int64)
    return text[starts[:, None] + np.arange(length + 1)]
