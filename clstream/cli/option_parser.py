"""The parser that derives options from signatures: jsonargparse's, with errors of one sentence and help from docstrings."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import Optimizer

from clstream.cli.errors import UsageError, nearest
from clstream.cli.lookup import PLACES, import_object, import_refusal, required_parameters, resolve, top_modules
from clstream.cli.option_help import help_texts
from clstream.strategy import OptimizerFactory


class Parser(ArgumentParser):
    """A parser whose errors are one sentence, with the option that was probably meant."""

    notes: list[str]
    outermost = False  # jsonargparse makes inner ones for what is within an option, and words their errors itself

    def error(self, message: str, ex: Exception | None = None) -> Any:  # as the base has it
        """Raise UsageError in place of jsonargparse's nested report."""
        if not self.outermost:
            super().error(message, ex)
        raise UsageError(self._sentence(message))

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help without the hundreds of modules that torch knows."""
        return re.sub(r",\s+known\s+subclasses:.*?\)", ")", super().format_help(formatter), flags=re.DOTALL)

    def _sentence(self, message: str) -> str:
        if message.startswith(inside := 'Parser key "config": '):
            return message.removeprefix(inside)
        if loose := re.search(r"unrecognized arguments: ([^\n]*)", message, re.IGNORECASE):
            return f"unknown option {loose[1]}"
        keys = re.findall(r'Parser key "([\w.]+)"', message)
        option = f"--{'.'.join(keys)}"
        if untyped := re.search(r"Parameter '(\w+)' from '([\w.]+?)(?:\.__init__)?' does not specify a type", message):
            return f"{option}: {untyped[2]} doesn't say of what type its {untyped[1]} is: annotate it, as {untyped[1]}: float"
        if denied := re.search(r"Importing '([\w.]+)' is not allowed", message):
            return f"{option}: {import_refusal(denied[1])}"
        if refused := re.search(r"Option '(\w+)' is not accepted", message):
            paths = re.findall(r"(?:Problem with given class_path|Got value: Namespace\(class_path=) ?'([\w.]+)'", message)
            if not paths:
                return f"there is no option {refused[1]!r}{nearest(refused[1], [action.dest for action in self._actions])}"
            options = options_of(paths[-1])
            near = nearest(refused[1], options) or f": it has {', '.join(options)}"
            return f"{paths[-1].rpartition('.')[2]} has no option {refused[1]!r}{near}"
        if odd := re.search(
            r"Expected '([\w.]+)' to be a (?:function that returns|subclass of) (?:<class ')?([\w.]+?)(?:'>)?\.", message
        ):
            kind = odd[2].rpartition(".")[2]
            return f"{option}: {odd[1]} is no {kind}: it must be a class derived from {kind}, or a function annotated to return one"
        if other := re.search(r"(?:Import path|Expected) '?([\w.]+)'? (?:does not correspond|to be a class that)", message):
            return f"{option}: {other[1]} is not of the kind that it takes"
        if odd := re.search(r"Not a valid subclass of (\w+)\. Got value: (?!Namespace|\{)([^\n]*)", message):
            return f"{option} takes the name of a {odd[1]}, not {odd[2][:100]}"
        if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
            return f"{option}: {absent[1]} has no {absent[2]!r}"
        if absent := re.search(r"No module named '([\w.]+)'", message):
            return f"{option}: there is no file or package {absent[1]!r} here"
        if "Exceeds the limit" in message:
            return f"{option} takes no number of thousands of digits"
        value = next(iter(re.findall(r"(?:Got|Given) value: (?!NestedArg|Namespace|\{)([^\n]*)", message)), "")
        if re.search("Expected a <class 'float'>", message):
            return f"{option} takes a number, not {value.partition('. Got value')[0][:100]}"
        if absent := re.search(r"Expected a dot import path string: ([^\n]*)", message):
            ours = {name: thing for name, thing in vars(importlib.import_module(PLACES["strategy"])).items() if name[0] != "_"}
            classes = [name for name, thing in {**ours, **vars(torch.optim)}.items() if isinstance(thing, type)]
            return f"{option}: there is no {absent[1][:100]!r}{nearest(absent[1], classes)}"
        if missing := re.search(r"the following arguments are required: ([\w, ]+)", message):
            return f"{option} needs {missing[1]}: give {', '.join(f'{option}.{name}' for name in missing[1].split(', '))}"
        several = re.search(r"Union subtypes\s+Subtypes: \[(.*?)\]\s+Errors:", message, re.DOTALL)
        expected = list(re.finditer(r"Expected an? ([^\n]*?)(?:\. Got value: ([^\n]*)|\n|$)", message))
        wrong = next((match for match in reversed(expected) if match[2]), expected[0] if expected else None)  # what is innermost
        if keys and wrong and (wrong[2] or not several):
            kind = re.sub(r"<class '([\w.]+)'>", r"\1", wrong[1])
            if choices := re.match(r"typing.Literal\[(.*)\]", kind):
                kind = f"one of {choices[1].replace(chr(39), '')}"
            if kind == "NoneType":
                return f"{option} takes nothing of that kind"
            kind = "a list, as '[10,10]'," if kind in ("tuple", "list", "<class 'collections.abc.Sequence'>") else kind
            value = wrong[2] or value
            return f"{option} takes {kind}" + (
                f" not {value[:100]}" if kind.endswith(",") else f", not {value[:100]}" if value else ""
            )
        if keys and several:
            kinds = re.sub(r"<class '([\w.]+)'>", r"\1", several[1]).replace("NoneType", "null").split(", ")
            return f"{option} takes {', '.join(kinds[:-1])} or {kinds[-1]}" + (f", not {value[:100]}" if value else "")
        return re.sub(r"\s+", " ", message).strip()[:300]


def options_of(path: str) -> tuple[str, ...]:
    """Return the options of a class or function by its import path."""
    return _options_of(import_object(path, "class"))


@cache
def _options_of(thing: Callable[..., Any]) -> tuple[str, ...]:
    dests = [action.dest for action in _options_parser(thing, "its")._actions if action.dest.startswith("its.")]
    return tuple(dest.split(".")[1] for dest in dests if not dest.endswith(".help"))


def option_help(kind: str, name: str) -> str:
    """Return the help on the options of one stream, strategy or model."""
    thing = import_object(resolve(kind, name, top_modules(name))[0], kind)
    parser = _options_parser(thing, kind, f"clstream run --{kind} {name}")
    helps = help_texts(thing)
    for action in parser._actions:
        option = action.dest.removeprefix(f"{kind}.")
        if not action.help or action.help == argparse.SUPPRESS or option in helps:
            action.help = helps.get(option, action.help)
    return re.sub(r"functools\.partial\(<class\s+'[\w.]*\.(\w+)'>,\s+", r"\1(", parser.format_help())


def _options_parser(thing: Any, prefix: str, prog: str = "") -> Parser:
    """Return a parser of the options of a class or function that can be given, those that it passes on by **kwargs too."""
    parser = Parser(prog=prog, add_help=False)
    skip: set[str | int] = {name for name in ("model", "input_shape", "classes") if name in required_parameters(thing)}
    if isinstance(thing, type):
        parser.add_class_arguments(thing, prefix, skip=skip)
    else:
        parser.add_function_arguments(thing, prefix, skip=skip)
    parser._actions = [action for action in parser._actions if action.dest != prefix]
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action.dest != prefix]
    return parser


def annotate(thing: Any) -> None:
    """Annotate parameters of a class that have none, where their default says what is wanted, as partial(SGD, lr=0.1) does.

    Otherwise an option for it would be any value, not the name of another optimizer.
    """
    for cls in inspect.getmro(thing) if isinstance(thing, type) else []:
        construct = inspect.unwrap(vars(cls).get("__init__", object.__init__))
        if not inspect.isfunction(construct):
            continue
        for parameter in inspect.signature(construct).parameters.values():
            built = parameter.default.func if isinstance(parameter.default, partial) else parameter.default
            if parameter.annotation is parameter.empty and isinstance(built, type):
                for base, kind in ((Optimizer, OptimizerFactory), (nn.Module, Callable[..., nn.Module])):
                    if issubclass(built, base):
                        construct.__annotations__[parameter.name] = kind


def annotate_optimizer(name: str) -> None:
    """Annotate what a user's own optimizer takes first, the parameters, as few do: without a type it could be no option."""
    with suppress(UsageError):  # jsonargparse says it of the option
        cls = import_object(name, "optimizer")
        if isinstance(cls, type) and inspect.isfunction(construct := inspect.unwrap(vars(cls).get("__init__", object.__init__))):
            for parameter in [*inspect.signature(construct).parameters.values()][1:2]:
                construct.__annotations__.setdefault(parameter.name, Iterable[nn.Parameter])
