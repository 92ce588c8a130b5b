"""Which models cannot be measured: those without data, on a device that we do not run on, or of certain libraries."""

from __future__ import annotations

from torch import nn

from gradprobe.errors import ArgumentError

_SHARDED = "whole numbers of gradients sharded in this way are not available"

# Classes of modules and of parameters, by package and name: looked up in this way, none of them is imported.
_MODULES = {
    ("fairscale", "FullyShardedDataParallel"): "FSDP1 (FullyShardedDataParallel)",
    ("deepspeed", "DeepSpeedEngine"): "a DeepSpeed engine",
}
_TENSORS = {
    (
        "torch",
        "FakeTensor",
    ): "needed data on cpu or cuda, got a fake tensor; attach to the model outside FakeTensorMode",
}

# What the libraries leave on a parameter. Their modules can also be reached without the wrapper around them.
_MARKS = {
    "ds_id": "a parameter partitioned by DeepSpeed (ZeRO-3)",
    "ds_tensor": "a parameter partitioned by DeepSpeed (ZeRO-3)",
    "_hp_mapping": "a parameter whose gradients DeepSpeed (ZeRO) partitions",
    "main_grad": "a parameter whose gradients Megatron accumulates in main_grad",
}


def refuse_unsupported(model: nn.Module) -> None:
    """Raises if a model has trainable parameters that cannot be measured. Takes one walk over its modules.

    Args:
        model: Any module.

    Raises:
        ArgumentError: A trainable parameter is on the meta device or fake, on a device other than the CPU or a GPU of
            type cuda, or its gradient is kept elsewhere (DeepSpeed, Megatron, fairscale). The message names the
            parameter or module, what was needed and what was given.

    Example:
        >>> refuse_unsupported(nn.Linear(3, 2))
    """
    ordinary: set[type] = {nn.Parameter}  # classes of modules that were looked at, and the class of most parameters
    for prefix, module in model.named_modules():
        if type(module) not in ordinary:
            wrapper = _entry_of(type(module), _MODULES)
            if wrapper is not None:
                name = f"module {prefix!r}" if prefix else "model"
                raise ArgumentError(f"{name}: needed a module with whole parameters, got {wrapper}; {_SHARDED}")
            ordinary.add(type(module))
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            if type(parameter) in ordinary and (parameter.is_cpu or parameter.is_cuda) and not parameter.__dict__:
                continue
            reason = _reason(parameter)
            if reason is not None:
                raise ArgumentError(f"parameter {f'{prefix}.{name}' if prefix else name!r}: {reason}")


def _reason(parameter: nn.Parameter) -> str | None:
    """Returns what was needed and given if a parameter cannot be measured, else None."""
    tensor = _entry_of(type(parameter), _TENSORS)
    if tensor is not None:
        return tensor
    device = parameter.device.type
    if device == "meta":
        return "needed data on cpu or cuda, got the device meta; create the data before attach, e.g. with to_empty"
    if device not in ("cpu", "cuda"):
        why = ", which has no float64" if device == "mps" else ""
        return f"needed the device cpu or cuda, got {device}{why}; move the model before attach"
    for mark, kind in _MARKS.items():
        if parameter.__dict__.get(mark) is not None:
            return f"needed a whole gradient in .grad, got {kind}; {_SHARDED}"
    return None


def _entry_of(kind: type, table: dict[tuple[str, str], str]) -> str | None:
    """Returns the entry of a class or of one of its bases."""
    keys = ((base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__)
    return next((table[key] for key in keys if key in table), None)
