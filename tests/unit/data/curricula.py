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


def raising(_progress: Progress) -> Mapping[str, float]:
    raise KeyError("the plan")


def none(_progress: Progress) -> None:
    return None


def numbered(_progress: Progress) -> Mapping[int, float]:
    return {1: 1.0, "x": 1.0}


def not_a_number(progress: Progress) -> Mapping[str, float]:
    return progress.weights | {"hard": float("nan")}


def words(progress: Progress) -> Mapping[str, str]:
    return progress.weights | {"hard": "often"}


def too_much(progress: Progress) -> Mapping[str, float]:
    return dict.fromkeys(progress.weights, 1e308)


def unread(progress: Progress) -> Mapping[str, float]:
    progress.state["x"] = float("nan")
    return progress.weights


def counting(progress: Progress) -> Mapping[str, float]:
    """One more source in turn has weight; what it counts is under keys that JSON changes, and deep down."""
    seen = progress.state.get("seen", {})
    seen = {int(key): list(each) for key, each in seen.items()}
    seen[progress.step] = [progress.drawn]
    progress.state.setdefault("deep", {}).setdefault("steps", []).append(progress.step)
    progress.state = {**progress.state, "seen": seen}
    name = list(progress.weights)[len(seen) % len(progress.weights)]
    return dict.fromkeys(progress.weights, 0.0) | {name: 1.0}
