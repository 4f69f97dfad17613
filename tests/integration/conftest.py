"""Fixtures of the integration tests."""

from label_studio_server import client, concept, login, reviewable, server

__all__ = ["client", "concept", "login", "reviewable", "server"]
