"""Fixtures of the integration tests."""

from label_studio_server import client, concept, login, reviewable, server
from published_places import bucket, cache, hub, place, s3_server

__all__ = ["bucket", "cache", "client", "concept", "hub", "login", "place", "reviewable", "s3_server", "server"]
