"""A call that is given up when it takes too long: a name server or a network file system may never answer."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def within(seconds: float, function: Callable[..., Result], *args: Any) -> Result:
    """Return `function(*args)`, or raise what it raised; TimeoutError where it takes longer than `seconds`.

    It then goes on in a thread that doesn't keep the process from ending.
    """
    results, errors = list[Result](), list[BaseException]()

    def call() -> None:
        try:
            results.append(function(*args))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]
