"""Weights of dense models on their way: tied embeddings and biases, from every layout to servers on one and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import write_model
from tests.support.weight_ranks import Case
from tests.support.weight_sites import check_publications, other_weights, serving, site_of, write_weights

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

LAYERS = 4  # two chunks on each of two stages


def test_every_layout_of_dense_models(forks: Path, tmp_path: Path) -> None:
    """Qwen3, tied, in every layout to both servers; Qwen2, untied and with biases, to the one on two ranks."""
    qwen3, qwen2 = (write_model(tmp_path / family, family, layers=LAYERS) for family in ("qwen3", "qwen2"))
    bases = {model: write_weights(tmp_path / f"{model.name}_base", other_weights(model, 1)) for model in (qwen3, qwen2)}
    with serving([(qwen3, 2), (qwen3, 1), (qwen2, 2)], tmp_path, forks) as running:
        sites = {qwen3: site_of(running[:2]), qwen2: site_of(running[2:])}
        started = {model: site.state() for model, site in sites.items()}
        cases = [
            Case(model, bases[model], sites[model], layout, kinds)
            for model, layout, kinds in (
                (qwen3, {"tp": 2, "dp": 2}, ("broadcast",)),
                (qwen3, {"pp": 2, "dp": 2}, ("broadcast", "colocated")),
                (qwen3, {"pp": 2, "dp": 2, "vpp": 2}, ("broadcast",)),
                (qwen3, {"tp": 2, "pp": 2}, ("broadcast", "disk")),
                (qwen2, {"tp": 2, "pp": 2}, ("broadcast",)),
            )
        ]
        check_publications(cases, [started[case.model] for case in cases], tmp_path)
