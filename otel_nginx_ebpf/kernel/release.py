"""The kernel's release, as uname(2) gives it."""

import os
import re


def release_numbers(release: str | None = None) -> tuple[int, int] | None:
    """Its first two numbers, by default the running kernel's. None where it does not begin with such."""
    numbers = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return (int(numbers[1]), int(numbers[2])) if numbers else None
