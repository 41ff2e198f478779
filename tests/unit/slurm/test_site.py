"""Options of a site: read from its file, with the command line on top, and refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.slurm.site import Site, read_site


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partition: gpu\naccount: a\ncontainer: {image: a.sqsh, mounts: ['/a:/a']}\n")
    site = read_site(tmp_path / "site.yaml", {"partition": "other", "container": {"image": "b.sqsh"}})
    assert (site.partition, site.account, site.time) == ("other", "a", "24:00:00")
    assert site.container is not None
    assert (site.container.image, site.container.mounts) == ("b.sqsh", ("/a:/a",))
    assert read_site(None) == Site()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "partitoin: gpu",
            r"site.yaml: partitoin: unknown key. Did you mean 'partition'\? Allowed in the top level: partition, ",
        ),
        ("container: {mounts: []}", "container.image: missing; it must be given. As `srun --container-image` takes it"),
        ("time: 24:00:00", "time: 86400 is a number; write the time in quotes"),
        ("time: soon", "time: 'soon' is no time limit; write it as sbatch takes it, like 24:00:00"),
        ("partition: a b", "partition: 'a b' must be one word"),
        ("sbatch: ['--time=3']", r"sbatch\[0\]: --time has a place of its own in the job file"),
        ("sbatch: ['#SBATCH --nodes 3']", r"sbatch\[0\]: --nodes has a place of its own"),
        ('environment: ["a\\nb"]', r"environment\[0\]: 'a\\nb' must be one line"),
        ("signal_lead: 0", "signal_lead: found 0; must be greater than 0"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_site(tmp_path / "site.yaml")


def test_a_mistake_on_the_command_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: starts: found 0"):
        read_site(None, {"starts": 0})


def test_times_as_sbatch_takes_them() -> None:
    for text in ("30", "30:00", "24:00:00", "2-0", "2-12:30", "2-12:30:59", "UNLIMITED"):
        assert read_site(None, {"time": text}).time == text
