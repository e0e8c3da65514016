"""What is done to a parsed chat template before it is compiled.

Owns the `generation` tag of transformers and the places where a template reports to the budget
of `jinja_sandbox.py`: every round of a loop, every call of a macro, every `~` and slice. The
rendered text stays the same.
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
    """Make loops and macros of TREE call `tick`, `~` and slices the filters that pay for them.

    All belong to the environment that TREE is compiled in.
    """
    for loop in list(tree.find_all(nodes.For)):
        loop.body.insert(0, _tick_statement(loop.lineno))
    for macro in list(tree.find_all(nodes.Macro)):
        macro.body.insert(0, _tick_statement(macro.lineno))
    _charge_growth(tree)


def _tick_statement(lineno: int) -> nodes.ExprStmt:
    tick = nodes.EnvironmentAttribute("tick")
    return nodes.ExprStmt(nodes.Call(tick, [], [], None, None, lineno=lineno), lineno=lineno)


def _charge_growth(node: nodes.Node) -> None:
    """Make every `a ~ b` and `a[i:j]` below NODE pass through a filter, since filters pay."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _charge_growth(value)
            setattr(node, name, _charged(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _charge_growth(item)
                    value[index] = _charged(item)


def _charged(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        value: nodes.Expr = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(value, "concatenate", [], [], None, None, lineno=node.lineno)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return nodes.Filter(node, "same", [], [], None, None, lineno=node.lineno)
    return node
