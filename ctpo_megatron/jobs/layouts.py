"""The smaller layouts of a run (`elastic.layouts`), compared with its model and with the GPUs before anything starts."""

from __future__ import annotations

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.elastic import as_written, layout_key
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.topology import planned_run
from ctpo_megatron.models.adapters import check_adapter
from ctpo_megatron.models.rules import check_layout, check_shared_prompts
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.memory import GIB
from ctpo_megatron.planning.plan import Hardware, Plan, make_plan


def check_layouts(shape: ModelShape, config: RunConfig) -> None:
    """Raise ConfigError, which names the key, where a layout that the trainer may have cannot divide the model, or the model
    cannot have the adapters that are asked for, or share prompts."""
    if config.model.adapter is not None:
        check_adapter(shape, config.model.adapter, config.moe)
    if config.train.share_from is not None:
        check_shared_prompts(shape)
    preferred, *smaller = config.layouts
    adapted = config.model.adapter is not None
    check_layout(shape, preferred, adapted=adapted)
    for index, (changes, layout) in enumerate(zip(config.elastic.layouts, smaller, strict=True)):
        try:
            check_layout(shape, layout, adapted=adapted)
        except ConfigError as error:
            raise ConfigError(as_written(str(error), index, changes)) from error


def smaller_plans(config: RunConfig, shape: ModelShape, hardware: Hardware) -> list[Plan]:
    """Returns the plan of each of elastic.layouts. Raises ConfigError for one that cannot divide the model."""
    check_layouts(shape, config)
    runs = [planned_run(config.in_layout(layout)) for layout in config.layouts[1:]]
    return [make_plan(run, shape, hardware, lambda: []) for run in runs]


def layouts_that_do_not_fit(plans: list[Plan], hardware: Hardware) -> list[str]:
    """Returns why the trainer cannot go on with some of the `plans` of elastic.layouts, one sentence each."""
    found = []
    for index, plan in enumerate(plans):
        over = plan.fullest / GIB - hardware.gpu_gib
        if over > 0.0:
            found.append(
                f"{layout_key(index)}: a rank needs {plan.fullest / GIB:.1f} GiB, {over:.1f} GiB more than --gpu-gb "
                f"{hardware.gpu_gib:g}. Fewer replicas hold more of the optimizer each: leave the layout out, or cut the model "
                "into more parts (tp, pp), or set train.recompute=full or optimizer.cpu_offload"
            )
        needed = plan.ranks_on_node(hardware) * plan.host.total / GIB
        if hardware.host_gib is not None and needed > hardware.host_gib:
            found.append(
                f"{layout_key(index)}: the ranks of a node need {needed:.1f} GiB of their host's memory, "
                f"{needed - hardware.host_gib:.1f} GiB more than --host-gb {hardware.host_gib:g}"
            )
    return found
