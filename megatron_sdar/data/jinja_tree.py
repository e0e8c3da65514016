"""What is done to a parsed chat template before it is compiled.

Owns the `generation` tag of transformers and the places where a template reports to the budget
of `jinja_sandbox.py`: every round of a loop, every call of a macro, every `~`. The rendered text
stays the same.
"""

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks answers for transformers; just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def meter_tree(tree: nodes.Template) -> None:
    """Make loops and macros of TREE call `tick`, and `~` the filter `concatenate`.

    Both belong to the environment that TREE is compiled in.
    """
    for loop in list(tree.find_all(nodes.For)):
        loop.body.insert(0, _tick_statement(loop.lineno))
        if loop.test is not None:
            loop.test = nodes.And(_tick_call(loop.lineno), loop.test, lineno=loop.lineno)
    for macro in list(tree.find_all(nodes.Macro)):
        macro.body.insert(0, _tick_statement(macro.lineno))
    _replace_concatenations(tree)


def _tick_call(lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=lineno)


def _tick_statement(lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_tick_call(lineno), lineno=lineno)


def _replace_concatenations(node: nodes.Node) -> None:
    """Make every `a ~ b` below NODE a call of the filter that pays for its result first."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_concatenations(value)
            setattr(node, name, _bounded(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concatenations(item)
                    value[index] = _bounded(item)


def _bounded(node: nodes.Node) -> nodes.Node:
    if not isinstance(node, nodes.Concat):
        return node
    values = nodes.List(node.nodes, lineno=node.lineno)
    return nodes.Filter(values, "concatenate", [], [], None, None, lineno=node.lineno)
