"""Tokens by reference: a folder, ``name@version`` or a URL, resolved the same everywhere; and publishing them."""

from __future__ import annotations

from dagkit.registry.proposal import concept_definition, propose_version
from dagkit.registry.reference import Reference, is_version, parse, version_key
from dagkit.registry.resolution import ResolvedToken, load_token, resolve
from dagkit.registry.roots import concepts_in, local_tokens, next_version_in, require_new, token_roots, versions_in

__all__ = [
    "Reference",
    "ResolvedToken",
    "concept_definition",
    "concepts_in",
    "is_version",
    "load_token",
    "local_tokens",
    "next_version_in",
    "parse",
    "propose_version",
    "require_new",
    "resolve",
    "token_roots",
    "version_key",
    "versions_in",
]
