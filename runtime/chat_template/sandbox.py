"""jinja2's sandbox as transformers sets it up, with every step and every size metered.

The texts are transformers' own. What differs: a template that takes too long, or makes values that
are too large, raises `TooMuchError`; `lipsum`, which writes random text, is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes, pass_environment, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from markupsafe import Markup

from llama_onnx.runtime.chat_template.amplifiers import (
    BoundedEscapeFormatter,
    BoundedFormatter,
    check_filter,
    check_method,
    check_operator,
)
from llama_onnx.runtime.chat_template.meter import TooMuchError, current

_LONGEST_TIME_FORMAT = 200
_COMPARING = (
    *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le"),
    *("lessthan", "lt", "ne"),
)
"""Tests that compare values, with all they hold."""


class RefusalError(TemplateError):
    """The template called `raise_exception`: it rejects the messages."""


class _MeteredCode(CodeGenerator):
    """Compiles to code that reports its blocks, comparisons, literals, slices and joined texts."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        current().tick()
        return super().visit(node, *args, **kwargs)

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - jinja2's name
        if node.test is not None:  # it runs for each item, outside of any block
            step = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.test = nodes.And(nodes.Not(step), node.test)
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._within("produce", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._within("produce", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._within("produce", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            self._within("produce", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(")
        self._within("weighed", self.visit, node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._within("weighed", self.visit, operand.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        # jinja2 calls its function with the parts; here `joined` is given both.
        function = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            function = "(markup_join if context.eval_ctx.autoescape else str_join)"
        self.write(f"environment.joined({function}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _within(
        self, method: str, visit: Callable[[Any, Frame], None], node: Any, frame: Frame
    ) -> None:
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """The tag `generation`, which marks an assistant's text for training: here, only its text.

    Counts a step for each token of a template that is read, too.
    """

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the tag as transformers does: its body has variables of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Count the tokens."""
        for token in stream:
            current().tick()
            yield token

    @pass_eval_context
    def _text(self, _context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of every chat template. Compile and render only inside `metered`."""

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # or constants would be computed while a template is compiled
            finalize=_printed,
        )
        self.filters |= {"tojson": _tojson, "sum": _sum}
        for name in self.filters:
            self.filters[name] = _bounded(name, self.filters[name])
        for name in _COMPARING:
            self.tests[name] = _bounded(name, self.tests[name])
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def tick(self) -> None:
        """Count a step."""
        current().tick()

    def produce(self, value: Any) -> Any:
        """Check a value that the template made."""
        current().tick()
        return current().produce(value)

    def weighed(self, value: Any) -> Any:
        """Check a value that is about to be compared."""
        current().weigh(value)
        return value

    def joined(self, join: Callable[[Iterable[Any]], str], parts: tuple[Any, ...]) -> str:
        """Join the parts of a text."""
        current().tick()
        current().weigh(parts)
        return str(current().produce(join(parts)))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a block or macro has written."""
        meter, pieces, size = current(), [], 0
        for piece in parts:
            size += len(piece)
            meter.need(size)
            pieces.append(piece)
        return str(meter.produce("".join(pieces)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        current().tick()
        check_operator(operator, left, right)
        return current().produce(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro."""
        meter = current()
        meter.tick()
        if getattr(__obj, "__name__", "") == "join":
            args = tuple(list(one) if isinstance(one, Iterator) else one for one in args)
        check_method(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return meter.produce(result, *args)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a bounded `str.format` or `str.format_map` in place of the built-in one."""
        if super().wrap_str_format(value) is None:
            return None
        text, from_map = value.__self__, value.__name__ == "format_map"
        escapes = isinstance(text, Markup)

        @wraps(value)
        def bounded(*args: Any, **kwargs: Any) -> str:
            formatter: BoundedFormatter = BoundedFormatter(self)
            if escapes:
                formatter = BoundedEscapeFormatter(self, escape=text.escape)
            if from_map:
                (kwargs,), args = args, ()
            formatted: str = type(text)(formatter.vformat(text, args, kwargs))
            return formatted

        return bounded


def _printed(value: Any) -> Any:
    """Check a value that is written to the prompt."""
    meter = current()
    meter.tick()
    meter.weigh(value)
    return value


def _bounded(name: str, function: Any) -> Callable[..., Any]:
    """Return the filter or test `name` with its arguments and its result checked."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or the like

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter = current()
        meter.tick()
        if name == "join":
            args = tuple(list(one) if isinstance(one, Iterator) else one for one in args)
        check_filter(name, args[first:], kwargs)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _stepwise(result)
        return meter.produce(result, *args)

    return bounded


def _stepwise(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        current().tick()
        yield current().produce(item)


@pass_environment
def _sum(
    environment: Sandbox, iterable: Iterable[Any], attribute: Any = None, start: Any = 0
) -> Any:
    """Add as jinja2 does, in steps: a sum of lists takes the square of their length."""
    get = make_attrgetter(environment, attribute) if attribute is not None else None
    total = start
    for item in iterable:
        environment.tick()
        value = item if get is None else get(item)
        check_operator("+", total, value)
        total = current().produce(total + value)
    return total


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter, which escapes characters of HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise RefusalError(str(message))


def _strftime_now(form: str) -> str:
    # A width in the format, "%9999999Y", is a length of the result.
    if len(form) > _LONGEST_TIME_FORMAT or re.search("[0-9]{3}", form):
        raise TooMuchError.text()
    return datetime.now().strftime(form)


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """jinja2's, without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as `self` may be one of the names
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}")
