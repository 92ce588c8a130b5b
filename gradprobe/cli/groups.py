"""The group of commands, which names options in errors that name arguments of functions."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from gradprobe.errors import ArgumentError, BackendError

# Arguments in messages of the library -> parameters of the commands, where they have other names.
_ALIASES = {
    "activation": "activations",
    "depth": "depths",
    "input": "inputs",
    "input_shape": "inputs",
    "model": "models",
}


class Commands(TyperGroup):
    """Runs commands; their errors name the options as the user writes them."""

    def invoke(self, ctx: Any) -> Any:  # noqa: D102
        try:
            return super().invoke(ctx)
        except (ArgumentError, BackendError) as error:
            argument, colon, rest = str(error).partition(": ")
            options = {one.name: one.opts[0] for one in self.commands[ctx.invoked_subcommand].params}
            option = options.get(argument) or options.get(_ALIASES.get(argument, ""))
            if colon and option is not None and option.startswith("--"):
                error.args = (f"{option}: {rest}",)
            raise
