"""The version that artifacts record."""

from importlib.metadata import version


def tool_version() -> str:
    """Return the installed version of psp."""
    return version("psp")
