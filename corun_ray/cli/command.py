"""typer's classes with one-line mistakes and plain help.

typer tells mistakes by a usage text of several lines, or draws boxes that wrap badly in logs and pipes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from corun_ray.core.errors import UserError

if TYPE_CHECKING:
    # The base of typer.Context; typer hands out no public name for it.
    from typer._click import Context

SEVERAL = " ..."
"""Ends the metavar of an option that takes several values: `--gpus N ...`."""
NAMES_WIDTH = 26
"""Characters of the column of names in a help page; what is longer has a line of its own."""


class App(typer.Typer):
    """A set of commands, parsed and shown by the classes below."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=Group,
            # Completion would list options for shells beside those of a job.
            add_completion=False,
            # Plain text: rich would read brackets in the help as styles, and draw boxes.
            rich_markup_mode=None,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Return a decorator that makes a function a command.

        The help is the function's docstring.
        """
        return super().command(name, cls=Command, **settings)


class Command(TyperCommand):
    """One command: a function with its arguments and options."""

    # typer leaves words that no argument takes to `parse_args`, which refuses them.
    allow_extra_args = True

    def __init__(self, name: str | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        for parameter in self.params:
            convert_plainly(parameter)

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        """Parse the words behind the command's name into `ctx.params`."""
        rest = super().parse_args(ctx, self._repeat_names(ctx, args))
        if rest:
            raise typer.BadParameter(f"unexpected argument {rest[0]!r}", ctx)
        return rest

    def _repeat_names(self, ctx: "Context", words: Sequence[str]) -> list[str]:
        """Repeat an option's name before each of its values.

        An option of typer takes a fixed number of words, or may be repeated. Ours with `SEVERAL` take all words up to
        the next option, so `--gpus 8 64` becomes `--gpus 8 --gpus 64`.
        Raises `BadParameter` where an option stands without its value.
        """
        options: dict[str, TyperOption] = {}
        for parameter in self.params:
            if isinstance(parameter, TyperOption):
                options |= dict.fromkeys(parameter.opts, parameter)

        repeated: list[str] = []
        # The name of the option of several values that the words at hand belong to.
        open_name = ""
        for position, word in enumerate(words):
            # Behind -- are arguments alone.
            if word == "--":
                return repeated + list(words[position:])

            if word.startswith("--") or word in ctx.help_option_names:
                # A name, which ends the values of the option before.
                option = options.get(word)
                open_name = ""
                if option is not None and not option.is_flag:
                    check_value_follows(option, words[position + 1 :], ctx)
                    open_name = word if name_value(option).endswith(SEVERAL) else ""
            elif open_name and repeated[-1] != open_name:
                # A second or later value; the first has its name already.
                repeated.append(open_name)
            repeated.append(word)
        return repeated

    def get_help_option(self, ctx: "Context") -> TyperOption | None:
        """Return `--help`, which typer makes when it is first asked for."""
        return convert_plainly(super().get_help_option(ctx))

    def format_help(self, ctx: "Context", formatter: Any) -> None:
        """Write the help page of the command."""
        write_help(self, ctx, formatter)


def check_value_follows(option: TyperOption, words: Sequence[str], ctx: "Context") -> None:
    """Refuse an option without a value behind it.

    Raises `BadParameter`; typer would take the next option's name for the value.
    """
    if not words or words[0].startswith("--"):
        raise typer.BadParameter(f"expected {name_value(option)}", ctx, option)


class Group(TyperGroup):
    """A command with commands of its own."""

    def resolve_command(self, ctx: "Context", args: list[str]) -> tuple[str, Any, list[str]]:
        """Return name and command of the first word, and the other words."""
        if not args:
            raise UserError(f"{ctx.command_path}: expected a command: {', '.join(self.commands)}")
        if args[0] not in self.commands:
            hint = suggest(args[0], self.commands) or "; --help lists them"
            raise UserError(f"{ctx.command_path}: no command {args[0]!r}{hint}")
        return args[0], self.commands[args[0]], args[1:]

    def get_help_option(self, ctx: "Context") -> TyperOption | None:
        """Return `--help`, which typer makes when it is first asked for."""
        return convert_plainly(super().get_help_option(ctx))

    def format_help(self, ctx: "Context", formatter: Any) -> None:
        """Write the help page of the group."""
        write_help(self, ctx, formatter)


# --- Values ---


class Conversion:
    """Converter of one parameter's words, in place of typer's own.

    typer imports pydantic to convert any value, even a plain word. `bench step` has to run without pydantic, whose
    messages besides speak of types ("Input should be a valid integer") and not of what one may write.
    """

    def __init__(self, parameter: TyperArgument | TyperOption) -> None:
        self._convert = find_converter(parameter)

    def coerce(self, value: Any, param: Any, ctx: "Context") -> Any:
        """Convert a parameter's words or default; typer calls this."""
        takes_several = param.multiple or param.nargs == -1
        if value is None:
            return () if takes_several else None

        words = value if takes_several else [value]
        try:
            # A default is a value already, unless it is a word.
            values = [self._convert(word) if isinstance(word, str) else word for word in words]
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx, param) from None
        return values if takes_several else values[0]


def convert_plainly(parameter: Any) -> Any:
    """Give a parameter, if there is one, its `Conversion`; return it."""
    if parameter is not None:
        # typer asks this object for the value, and makes one of pydantic's where there is none.
        parameter._runtime_param = Conversion(parameter)
    return parameter


def find_converter(parameter: TyperArgument | TyperOption) -> Callable[[str], Any]:
    """Return the function that converts a word to a parameter's value."""
    # The parser that the parameter names comes first.
    kind, parser = parameter.type_descriptor.annotation, parameter.type_descriptor.parameter_info.parser
    if parser is not None:
        return parser

    # Else the annotation decides, of a list that of its items.
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return one_of(get_args(kind))
    if kind is int:
        return parse_whole_number
    if kind is float:
        return parse_number
    return Path if kind is Path else str


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a converter that accepts the given words."""

    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected {', '.join(choices[:-1])} or {choices[-1]}, got {text}")
        return text

    return convert


def parse_whole_number(text: str) -> int:
    """Convert a word to a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number, got {text}") from None


def parse_number(text: str) -> float:
    """Convert a word to a number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text}") from None


# --- Messages ---


def describe_mistake(error: typer.TyperException) -> str:
    """Return what is wrong with a command's words as one line."""
    # typer hands out no public name for the error of an unknown option.
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        hint = suggest(error.option_name, error.possibilities or ()) or "; --help lists them"
        return f"no option {error.option_name}{hint}"

    # Others have a sentence of typer's.
    if not isinstance(error, typer.BadParameter) or error.param is None:
        return error.message[:1].lower() + error.message[1:].rstrip(".")

    # What is wrong with the value of one parameter; a missing one has no message.
    parameter = error.param
    if isinstance(parameter, TyperOption):
        return f"{parameter.opts[0]}: {error.message}" if error.message else f"missing option {name_option(parameter)}"
    assert isinstance(parameter, TyperArgument)
    name = name_value(parameter)
    return f"{name}: {error.message}" if error.message else f"missing argument {name}"


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean evaluate?`, or nothing without a close word."""
    # Only mistakes need it.
    import difflib

    closest = difflib.get_close_matches(word, list(known), 2)
    return f"; did you mean {' or '.join(closest)}?" if closest else ""


# --- Help ---


def write_help(command: TyperCommand | TyperGroup, ctx: "Context", formatter: Any) -> None:
    """Write usage, description, commands, arguments, options and examples as plain text."""
    parameters = command.get_params(ctx)
    arguments = [one for one in parameters if isinstance(one, TyperArgument)]
    options = [one for one in parameters if isinstance(one, TyperOption)]

    usage = " ".join(list_usage_words(command, arguments, options))
    formatter.write_usage(ctx.command_path, usage, "usage: ")
    write_paragraphs(command.help, formatter)

    sections = [
        ("commands", list_commands(command)),
        ("arguments", [(name_value(one), one.help or "") for one in arguments]),
        ("options", [(name_option(one), describe_option(one)) for one in options]),
    ]
    for title, rows in sections:
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows, col_max=NAMES_WIDTH)

    write_paragraphs(command.epilog, formatter)


def list_usage_words(
    command: TyperCommand | TyperGroup, arguments: Sequence[TyperArgument], options: Sequence[TyperOption]
) -> Iterator[str]:
    """Yield what follows the command's name in its usage line."""
    yield "[OPTIONS]"
    if isinstance(command, TyperGroup):
        yield "COMMAND ..."
    for option in options:
        if option.required:
            yield name_option(option)
    for argument in arguments:
        yield name_value(argument) if argument.required else f"[{name_value(argument)}]"


def list_commands(command: TyperCommand | TyperGroup) -> list[tuple[str, str]]:
    """Return name and first line of help of a group's commands."""
    rows: list[tuple[str, str]] = []
    if isinstance(command, TyperGroup):
        for name, one in command.commands.items():
            rows.append((name, (one.help or "").partition("\n")[0].rstrip(".")))
    return rows


def name_option(option: TyperOption) -> str:
    """Return an option as the help names it: `--port N`."""
    names = ", ".join(sorted(option.opts, key=len))
    return names if option.is_flag else f"{names} {name_value(option)}"


def name_value(parameter: TyperArgument | TyperOption) -> str:
    """Return what stands for a parameter's value: `DIR`, or its choices."""
    if parameter.metavar is not None:
        return parameter.metavar
    choices = parameter.type_descriptor.choices
    return "|".join(choices) if choices else parameter.name.upper()


def describe_option(option: TyperOption) -> str:
    """Return an option's help with its default."""
    if option.is_flag:
        return "show this help" if option.name == "help" else option.help or ""

    # A string stands for a default that is worked out when the command runs.
    default = option.show_default if isinstance(option.show_default, str) else option.default
    if not option.show_default or default is None or callable(default):
        return option.help or ""
    values = default if isinstance(default, list) else [default]
    words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return f"{option.help or ''} (default {' '.join(words)})".strip()


def write_paragraphs(text: str | None, formatter: Any) -> None:
    """Write paragraphs as wide as the terminal, examples as they are.

    Examples are paragraphs with indented lines.
    """
    for paragraph in (text or "").split("\n\n"):
        if paragraph:
            formatter.write_paragraph()
            # \b tells the formatter to keep the lines.
            formatter.write_text(f"\b\n{paragraph}" if "\n  " in paragraph else paragraph)
