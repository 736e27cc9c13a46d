"""Uses the fixtures of the end-to-end tests."""

from e2e.conftest import _requirements, public_directory

__all__ = ["_requirements", "public_directory"]
