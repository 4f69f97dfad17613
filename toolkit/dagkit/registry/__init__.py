"""Tokens by reference: a folder, ``name@version`` or a URL, resolved the same everywhere; and publishing them."""

from __future__ import annotations

from dagkit.registry.cache import cache_folder
from dagkit.registry.index import FIGURES_FILE, SIGNATURE_FILE, Entry, Index
from dagkit.registry.locations import Location, open_location
from dagkit.registry.locations.keyed import damaged_files, refuse_strangers
from dagkit.registry.publishing import (
    Parcel,
    check,
    pack,
    publish,
    published,
    published_figures,
    replaced,
    written_files,
)
from dagkit.registry.reference import Reference, parse, parse_location
from dagkit.registry.resolution import ResolvedToken, load_resolved, load_token, resolve
from dagkit.registry.roots import concepts_in, local_tokens, next_version_in, require_new, token_roots, versions_in
from dagkit.registry.signing import sign
from dagkit.registry.verification import Check, verify
from dagkit.registry.versioning import concept_definition, suggest_version

__all__ = [
    "FIGURES_FILE",
    "SIGNATURE_FILE",
    "Check",
    "Entry",
    "Index",
    "Location",
    "Parcel",
    "Reference",
    "ResolvedToken",
    "cache_folder",
    "check",
    "concept_definition",
    "concepts_in",
    "damaged_files",
    "load_resolved",
    "load_token",
    "local_tokens",
    "next_version_in",
    "open_location",
    "pack",
    "parse",
    "parse_location",
    "publish",
    "published",
    "published_figures",
    "refuse_strangers",
    "replaced",
    "require_new",
    "resolve",
    "sign",
    "suggest_version",
    "token_roots",
    "verify",
    "versions_in",
    "written_files",
]
