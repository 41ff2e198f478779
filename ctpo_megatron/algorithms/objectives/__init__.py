"""The objectives, one file each. A new one is a file here, a line below and a section in `config.objectives`."""

from ctpo_megatron.algorithms.objectives.cispo import CISPO
from ctpo_megatron.algorithms.objectives.cppo import CPPO
from ctpo_megatron.algorithms.objectives.ctpo import CTPO
from ctpo_megatron.algorithms.objectives.dppo import DPPO
from ctpo_megatron.algorithms.objectives.drpo import DRPO
from ctpo_megatron.algorithms.objectives.gmpo import GMPO
from ctpo_megatron.algorithms.objectives.grpo import GRPO
from ctpo_megatron.algorithms.objectives.gspo import GSPO
from ctpo_megatron.algorithms.objectives.kpop import KPOP
from ctpo_megatron.algorithms.objectives.minpro import MINPRO
from ctpo_megatron.algorithms.objectives.reinforce import REINFORCE
from ctpo_megatron.algorithms.objectives.sapo import SAPO
from ctpo_megatron.algorithms.objectives.sequence import SEQUENCE
from ctpo_megatron.algorithms.objectives.trm import TRM
from ctpo_megatron.algorithms.tokens import Method

OBJECTIVES: dict[str, Method] = {
    "ctpo": CTPO,
    "grpo": GRPO,
    "gspo": GSPO,
    "sequence": SEQUENCE,
    "sapo": SAPO,
    "cispo": CISPO,
    "gmpo": GMPO,
    "minpro": MINPRO,
    "dppo": DPPO,
    "cppo": CPPO,
    "trm": TRM,
    "drpo": DRPO,
    "kpop": KPOP,
    "reinforce": REINFORCE,
}
