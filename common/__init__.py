"""Plumbing every service shares; it has no idea what a token is."""
