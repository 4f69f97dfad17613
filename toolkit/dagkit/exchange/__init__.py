"""Other people's formats: pictures and masks that they hold, read one by one, and datasets written in them.

A source is a folder or file of one format. `find_source` says which, and yields its `Entry`s; what is wrong with one of
them is an error of that entry alone. No name in a source leads out of its folder, and nothing is fetched.
"""

from __future__ import annotations

from dagkit.exchange.entries import Entry, LabelNames, Marked, Source
from dagkit.exchange.finding import FORMATS, find_source
from dagkit.exchange.fitting import Fitted, fit
from dagkit.exchange.folders import pictures_of
from dagkit.exchange.writing import EXPORTS, export_dataset

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Entry",
    "Fitted",
    "LabelNames",
    "Marked",
    "Source",
    "export_dataset",
    "find_source",
    "fit",
    "pictures_of",
]
