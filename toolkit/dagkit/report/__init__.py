"""The report: one HTML file that holds all that it shows, with every picture hidden until it is clicked."""

from __future__ import annotations

from dagkit.report.gallery import Example
from dagkit.report.html import render
from dagkit.report.table import to_csv

__all__ = ["Example", "render", "to_csv"]
