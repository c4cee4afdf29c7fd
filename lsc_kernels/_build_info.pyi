"""Written when the package is built, from csrc/build_info.py.in."""

SKIPPED: str | None
