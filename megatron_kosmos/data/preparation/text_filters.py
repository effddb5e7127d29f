"""What text documents go through before they are encoded: a hook of the user's own, then filters on what is left."""

import re
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from inspect import getsourcefile
from pathlib import Path

from megatron_kosmos.data.errors import BadDocument, DataError, LeftOut
from megatron_kosmos.data.filters import Filters, TextHook

Hook = Callable[[str], str | None]
LETTER = re.compile(r"[^\W\d_]")
FORM = "package.module:function"


class TextFilter:
    """Chooses texts."""

    def __init__(self, filters: Filters) -> None:
        """Raises DataError when the hook cannot be used or is not what it was when `filters` were made."""
        self._filters = filters
        self._hook: Hook | None = None
        if filters.text_hook is not None:
            self._hook = _import_hook(filters.text_hook.name)
            if describe_hook(filters.text_hook.name) != filters.text_hook:
                raise DataError(f"the file of {filters.text_hook.name} was changed during the preparation; start again")

    def choose(self, text: str, origin: Callable[[], str]) -> str:
        """Return what to encode for a text. Raises LeftOut with the name of what dropped it, and BadDocument."""
        filters = self._filters
        if self._hook is not None:
            text = self._hooked(text, origin)
        if filters.min_characters is not None and len(text) < filters.min_characters:
            raise LeftOut("min_characters")
        if filters.max_characters is not None and len(text) > filters.max_characters:
            raise LeftOut("max_characters")
        if filters.min_alphabetic_words is not None and alphabetic_words(text) < filters.min_alphabetic_words:
            raise LeftOut("min_alphabetic_words")
        if filters.max_duplicate_lines is not None and duplicate_lines(text) > filters.max_duplicate_lines:
            raise LeftOut("max_duplicate_lines")
        return text

    def _hooked(self, text: str, origin: Callable[[], str]) -> str:
        assert self._hook is not None
        assert self._filters.text_hook is not None
        name = self._filters.text_hook.name
        try:
            replaced = self._hook(text)
        except Exception as error:  # whatever it is, it is about this document
            raise BadDocument(origin(), "text_hook", f"{name} raised {type(error).__name__}: {error}") from error
        if replaced is None:
            raise LeftOut(name)
        if not isinstance(replaced, str):
            raise BadDocument(origin(), "text_hook", f"{name} returned {type(replaced).__name__}, neither str nor None")
        if not replaced.strip():
            raise BadDocument(origin(), "text_hook", f"{name} left no text; None is how it drops a document")
        try:
            replaced.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadDocument(origin(), "text_hook", f"{name} returned what is no text: {error}") from error
        return replaced


def alphabetic_words(text: str) -> float:
    """Return the share of the words, as white space cuts them, that have a letter of any script."""
    words = text.split()
    return sum(1 for word in words if LETTER.search(word)) / len(words)


def duplicate_lines(text: str) -> float:
    """Return the share of the lines that are there already further up; those of white space alone do not count."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return 1 - len(set(lines)) / len(lines)


def describe_hook(name: str) -> TextHook:
    """Return what a manifest says of the hook `package.module:function`. Raises DataError when it cannot be used."""
    file = getsourcefile(import_module(_import_hook(name).__module__))
    return TextHook(name=name, sha256=sha256(Path(file).read_bytes()).hexdigest() if file else None)


def _import_hook(name: str) -> Hook:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise DataError(f"the text hook {name!r} should read {FORM}")
    try:
        module = import_module(module_name)
    except Exception as error:  # an import runs the module, which may raise anything
        raise DataError(
            f"the text hook {name}: module {module_name} does not import ({type(error).__name__}: {error}); it is "
            f"looked for in the current folder and among the installed packages"
        ) from error
    hook = getattr(module, function_name, None)
    if not callable(hook):
        what = "has no" if hook is None else f"holds a {type(hook).__name__}, no function, as"
        raise DataError(f"the text hook {name}: {module.__file__} {what} {function_name}")
    return hook
