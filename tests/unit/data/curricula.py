"""Curricula for the tests."""

from __future__ import annotations

from collections.abc import Mapping

from ctpo_megatron.data.curriculum import Progress

NUMBER = 3


def towards_hard(progress: Progress) -> Mapping[str, float]:
    """The easy source until three steps are made, then the hard one."""
    progress.state["asked"] = progress.state.get("asked", 0) + 1
    progress.state["last"] = progress.rewards["easy"]
    return dict.fromkeys(progress.weights, 0.0) | {"hard" if progress.step >= 3 else "easy": 1.0}


def wrong_names(_progress: Progress) -> Mapping[str, float]:
    return {"x": 1.0}


def nothing(progress: Progress) -> Mapping[str, float]:
    return dict.fromkeys(progress.weights, 0.0)


def negative(progress: Progress) -> Mapping[str, float]:
    return progress.weights | {"hard": -1.0}


def unkept(progress: Progress) -> Mapping[str, float]:
    progress.state["x"] = object()
    return progress.weights
