"""The options of train.py, each declared once: as a field of a dataclass. (sd.py: options.py.)

    steps: int = setting(1000, "steps in all", least=1)     becomes     --steps STEPS
"""
import argparse
import difflib
from dataclasses import field, fields
from typing import Any

from sd import UserError


def setting(default: object, help: str, *, old: str = "", least: float | None = None,
            choices: tuple[str, ...] = (), free: bool = False) -> Any:
    """A field of a dataclass of settings.

    `old`: a former name of the option, which still works. `least`: the smallest value. `free`: it
    may change when a run is resumed. A bool is a flag, a list takes one or more values.
    """
    return field(default=default, metadata={"help": help, "old": old, "least": least,
                                            "choices": choices, "free": free})


def flag(name: str) -> str:
    """The option of a field: max_grad_norm -> --max-grad-norm"""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def parse(kind: type, description: str, args: list[str] | None = None) -> Any:
    """The command line as a `kind`, ranges unchecked. Raises UserError for what it cannot read."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(kind):
        how = {"dest": f.name, "default": f.default, "help": f.metadata["help"]}
        if f.type == list[str]:
            how |= {"nargs": "+", "required": f.default is None}
        elif f.type is bool:
            how |= {"action": "store_true"}
        else:
            how |= {"type": f.type, "metavar": f.name.split("_")[-1].upper()}
            if f.default != "":
                how["help"] += f" ({f.default})"
        parser.add_argument(flag(f.name), **how)
        if f.metadata["old"]:
            how |= {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS, "required": False}
            parser.add_argument(flag(f.metadata["old"]), **how)
    given, unknown = parser.parse_known_args(args)
    if unknown:
        raise UserError(unknown_option(unknown[0], [flag(f.name) for f in fields(kind)]))
    return kind(**vars(given))


def unknown_option(given: str, known: list[str]) -> str:
    """An error message, with the option that was probably meant."""
    near = difflib.get_close_matches(given.split("=")[0].replace("_", "-"), known, 1)
    return f"no option is called {given}" + (f": did you mean {near[0]}?" if near else ", see -h")


def check_ranges(settings: Any) -> None:
    """Raises UserError for a value below `least`, or not among the choices."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        least, choices = f.metadata["least"], f.metadata["choices"]
        if least is not None and value < least:
            raise UserError(f"{flag(f.name)} must be at least {least}, not {value}")
        if choices and value not in choices:
            known = ", ".join(choice for choice in choices if choice)
            raise UserError(f"{flag(f.name)} takes {known}; not {value!r}")
