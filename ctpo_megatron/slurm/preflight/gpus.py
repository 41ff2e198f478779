"""The state of a node's GPUs, by NVIDIA's management library: how many, and which of them is broken or held back."""

from __future__ import annotations

from typing import Any

from ctpo_megatron.slurm.preflight.report import Finding

# What the hardware holds a clock back for by itself, from nvml.h; that a GPU is idle or at its power limit is no fault
_HW_SLOWDOWN, _SW_THERMAL, _HW_THERMAL, _HW_POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
_FAULTS = {
    _HW_THERMAL: "hot",
    _SW_THERMAL: "hot",
    _HW_POWER_BRAKE: "held back by the power supply",
    _HW_SLOWDOWN: "held back by the hardware",
}
TOPIC = "GPUs"


def gpus(expected: int | None) -> list[Finding]:
    """Returns the count, compared with what SLURM gave this job here, and each GPU that should not be used."""
    try:
        import pynvml  # type: ignore[import-untyped]  # it has no types, and is of use only where GPUs are

        pynvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - no library, no driver: the package has a class for each
        if expected:
            why = f"SLURM gave this job {expected} here, but NVIDIA's driver does not answer: {error}"
            return [Finding(topic=TOPIC, state="bad", found="none", meaning=why)]
        return [Finding(topic=TOPIC, state="ok", found="no GPU")]
    try:
        return _found(pynvml, expected)
    except pynvml.NVMLError as error:
        return [Finding(topic=TOPIC, state="bad", found="not told", meaning=f"NVIDIA's driver failed: {error}")]
    finally:
        pynvml.nvmlShutdown()


def _found(nvml: Any, expected: int | None) -> list[Finding]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    names = dict.fromkeys(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles)
    found = f"{len(handles)}: {', '.join(names)}" if handles else "no GPU"
    if expected is not None and len(handles) < expected:
        return [Finding(topic=TOPIC, state="bad", found=found, meaning=f"SLURM gave this job {expected} here")]
    findings = [Finding(topic=TOPIC, state="ok", found=found)]
    for index, handle in enumerate(handles):
        findings += [Finding(topic=f"GPU {index}", state="bad", found=what, meaning=why) for what, why in _faults(nvml, handle)]
    return findings


def _faults(nvml: Any, handle: Any) -> list[tuple[str, str]]:
    faults = []
    errors = _ask(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    if errors:
        faults.append((f"{errors} uncorrected memory errors", "reset the GPU or drain the node (`nvidia-smi -q -d ECC`)"))
    held = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    words = dict.fromkeys(word for bit, word in _FAULTS.items() if held & bit)
    if words:
        faults.append((", ".join(words), "slower than the others, which wait for it (`nvidia-smi -q -d PERFORMANCE`)"))
    return faults


def _ask(nvml: Any, function: Any, *args: Any) -> int | None:
    """Returns what a question about a GPU gives; None where this GPU has no answer to it, as one without ECC."""
    try:
        return int(function(*args))
    except nvml.NVMLError_NotSupported:
        return None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
