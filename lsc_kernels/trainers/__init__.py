"""Adapters for trainers: one module each, which needs its trainer only when it is used."""
