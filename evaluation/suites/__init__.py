"""Suites: tasks that belong together."""
