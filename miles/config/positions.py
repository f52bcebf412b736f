"""Line numbers of keys in a TOML text.

`tomllib` gives values without positions, and no maintained TOML library gives both, so this scanner walks a
text that `tomllib` has already accepted and notes where each key and array element begins. It judges nothing.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]
"""Keys and array indices from the root to a value."""


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of every key, table header and array element of a valid TOML text."""
    return _Scanner(text.replace("\r\n", "\n")).lines()


_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*'""")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")' + r"|'''.*?'{3,5}(?!')" + r'|"(?:[^"\\]|\\.)*"' + r"|'[^']*'", re.S
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


class _Scanner:
    """Finds the line of every key and array element in a *valid* TOML text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.found: dict[KeyPath, int] = {}
        self.array_lengths: dict[KeyPath, int] = {}
        """Elements so far of each array of tables."""

    def lines(self) -> dict[KeyPath, int]:
        header: KeyPath = ()
        self._skip()
        while self.at < len(self.text):
            if self.text.startswith("[[", self.at):
                header = self._header(2)
            elif self.text[self.at] == "[":
                header = self._header(1)
            else:
                self._pair(header)
            self._skip()
        return self.found

    def _skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match
        self.at = match.end()

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match, f"tomllib accepted what this scanner cannot read at offset {self.at}"
        self.at = match.end()
        return match[0]

    def _note(self, path: KeyPath, line: int) -> None:
        for length in range(1, len(path) + 1):
            self.found.setdefault(path[:length], line)

    def _line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _key(self) -> KeyPath:
        parts: list[str] = []
        while True:
            self._skip()
            part = self._take(_KEY_PART)
            parts += tomllib.loads(f"{part} = 0")
            self._skip()
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def _header(self, brackets: int) -> KeyPath:
        line = self._line()
        self.at += brackets
        path: KeyPath = ()
        key = self._key()
        self.at += brackets
        for position, part in enumerate(key):
            path = (*path, part)
            if brackets == 2 and position == len(key) - 1:
                self.array_lengths[path] = self.array_lengths.get(path, 0) + 1
            if path in self.array_lengths:
                path = (*path, self.array_lengths[path] - 1)
        self._note(path, line)
        self.found[path] = line
        return path

    def _pair(self, header: KeyPath) -> None:
        line = self._line()
        path = (*header, *self._key())
        self.at += 1  # the equals sign
        self._note(path, line)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        self._skip()
        start = self.text[self.at]
        if start == "[":
            self._elements(path)
        elif start == "{":
            self._inline_table(path)
        else:
            self._take(_STRING if start in "\"'" else _SCALAR)

    def _elements(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        self._skip()
        while self.text[self.at] != "]":
            self._note((*path, index), self._line())
            self._value((*path, index))
            index += 1
            self._skip_comma()
        self.at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self.at += 1
        self._skip()
        while self.text[self.at] != "}":
            self._pair(path)
            self._skip_comma()
        self.at += 1

    def _skip_comma(self) -> None:
        self._skip()
        if self.text[self.at] == ",":
            self.at += 1
            self._skip()
