"""The kernel's release, as uname(2) gives it."""

import os
import re


def release_numbers(release: str | None = None) -> tuple[int, int] | None:
    """Returns the first two numbers of a release, by default the running kernel's.

    Returns None if the release does not begin with two numbers.
    """
    numbers = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return (int(numbers[1]), int(numbers[2])) if numbers else None
