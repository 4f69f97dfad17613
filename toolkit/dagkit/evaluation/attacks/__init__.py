"""Attacks on a guard: what a user who knows it, or only its pictures, can bring back."""

from __future__ import annotations

from dagkit.evaluation.attacks.defence import Defence, Filter, JudgeFilter, Query, Target, Trail
from dagkit.evaluation.attacks.evasion import Evasion, check_evasion, evade
from dagkit.evaluation.attacks.results import AttackResult
from dagkit.evaluation.attacks.second_look import SECOND_LOOK, SecondLook
from dagkit.evaluation.attacks.words import climb, repeat, vocabulary

__all__ = [
    "SECOND_LOOK",
    "AttackResult",
    "Defence",
    "Evasion",
    "Filter",
    "JudgeFilter",
    "Query",
    "SecondLook",
    "Target",
    "Trail",
    "check_evasion",
    "climb",
    "evade",
    "repeat",
    "vocabulary",
]
