"""Commands that an option makes another command, with options of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import click


class WithVariants(click.Command):
    """Is another command once one of its options is among the arguments.

    Attributes:
        variants: commands by the option that asks for each; one that does not take it as an option
            of its own is called without it.
    """

    variants: ClassVar[dict[str, click.Command]] = {}

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        """Read the arguments as one command or another."""
        for option, variant in self.variants.items():
            if any(each == option or each.startswith(f"{option}=") for each in args):
                known = any(option in parameter.opts for parameter in variant.params)
                left = args if known else [each for each in args if each != option]
                return variant.make_context(f"{info_name} {option}", left, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)
