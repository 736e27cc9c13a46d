"""What the end-to-end tests need, these need as well."""

from e2e.conftest import _requirements, public_directory

__all__ = ["_requirements", "public_directory"]
