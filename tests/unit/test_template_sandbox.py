"""Chat templates are text from strangers: they render as in transformers, and can do no more."""

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sdar.data.templates import jinja_sandbox
from megatron_sdar.data.templates.jinja_sandbox import ChatTemplateError, JinjaTemplate

MESSAGES = [
    {"role": "user", "content": " <hé> & 'x'\n"},
    {"role": "assistant", "content": "a\nb", "tool_calls": [{"arguments": {"k": [1, None, "é"]}}]},
]


def render(template: str, **variables: object) -> str:
    return JinjaTemplate(template).render(messages=MESSAGES, **variables)


@pytest.mark.parametrize(
    "template",
    [
        # Blocks on lines of their own leave no white space.
        "x\n  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\ny\n",
        "{{ messages | tojson }}{{ messages | tojson(indent=2, ensure_ascii=True) }}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
        "{% break %}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{% else %}no"
        "{% endfor %}",
        "{% generation %}{% set x = 1 %}{{ x }}{{ messages[0].role }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}"
        "{% endfor %}{{ ns.n }}",
        "{% macro f(n) %}({{ n }}{% if n %}{{ f(n - 1) }}{% endif %}){% endmacro %}{{ f(3) }}",
        "{% macro f(x=1) %}{{ caller(x) }}{% endmacro %}{% call(y) f(2) %}{{ y }}{% endcall %}",
        "{{ 'a' ~ 1 ~ none ~ nothing ~ [1, 'x'] ~ {'k': 2} }}{{ 'a' + 'b' * 3 }}{{ 2 ** 10 % 7 }}",
        "{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('x') }}{{ '%(k)s' | format(k=1) }}",
        "{{ '{}-{:>4}-{k}'.format(1, 'x', k=2) }}",
        "{{ [1, 2] | join('-') }}{{ messages | join(', ', attribute='role') }}{{ [] | string }}",
        "{{ messages[1].content | replace('a', 'c') | replace('b', 'd', 1) }}"
        "{{ 12 | replace(1, 3) }}",
        "{{ messages[1].content | indent(2) }}{{ messages[1].content | indent('> ', true) }}",
        "{{ messages[0].content.strip().split(' ') }}{{ 'x'.ljust(4) }}|{{ '-'.join(['a', 'b']) }}",
        "{{ 'a\\tb'.expandtabs(4) }}{{ 'aXa'.replace('a', 'bb') }}{{ messages[0].get('z', 'd') }}",
        "{{ range(3) | list }}{{ range(1, 9, 3) | sum }}{{ dict(a=1, **{'b': 2}) }}",
        "{{ messages[::-1][0].role }}{{ messages | map(attribute='role') | list }}",
        "{{ nothing }}{{ nothing is defined }}{{ messages is sequence }}{{ 'x' in ['x'] }}",
        "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{# note #}{% set t %}b{% endset %}"
        "{{ t }}",
        "{{ 'ab' | trim | title | length }}"
        "{{ messages | selectattr('role', '==', 'user') | list }}",
    ],
)
def test_same_text_as_transformers(template):
    texts, _ = render_jinja_template([MESSAGES], chat_template=template)
    assert render(template) == texts[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(role=1) }}", "'update' of 'dict' object is unsafe"),
        ("{{ namespace(__class__=1) }}", "a namespace cannot hold '__class__'"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "a namespace cannot hold"),
        ("{% include 'file' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
    ],
)
def test_nothing_behind_the_inputs_is_reached(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(template)
    assert len(MESSAGES) == 2
    assert render("{{ '{0.__class__}'.format(1) }}{{ messages.__class__ is undefined }}") == "True"


TOO_MUCH = "it makes more than 20000000 characters"
MEGA = "{% set s = 'a' * 1000000 %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10 ** 10 }}", TOO_MUCH),
        ("{{ (10 ** 10 * ['a']) | length }}", TOO_MUCH),
        ("{{ 9 ** 9 ** 9 }}{{ 9 ** (9 ** 9) }}", "too large an exponent"),
        ("{% for i in range(60) %}{{ 'a' * 400000 }}{% endfor %}", TOO_MUCH),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}",
            TOO_MUCH,
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
            "{% endfor %}",
            TOO_MUCH,
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set t %}{{ n.x }}{{ n.x }}"
            "{% endset %}{% set n.x = t %}{% endfor %}",
            TOO_MUCH,
        ),
        # A short list whose text is long: it holds the same list again and again.
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
            "{% endfor %}{{ n.x }}",
            TOO_MUCH,
        ),
        (
            "{% set n = namespace(x={}) %}{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}"
            "{% endfor %}{{ n.x | tojson }}",
            TOO_MUCH,
        ),
        (MEGA + "{{ ([s] * 100000) | join }}", TOO_MUCH),
        (MEGA + "{{ ([s] * 100000) | string | length }}", TOO_MUCH),
        (MEGA + "{{ ''.join([s] * 100000) | length }}", TOO_MUCH),
        (MEGA + "{{ s.join([1] * 100000) | length }}", TOO_MUCH),
        (MEGA + "{{ s.replace('', s) | length }}", TOO_MUCH),
        (MEGA + "{{ s | replace('', s) | length }}", TOO_MUCH),
        ("{{ 'x\n' * 10 | indent(10 ** 10) }}", TOO_MUCH),
        ("{{ 'x'.ljust(10 ** 10) | length }}", TOO_MUCH),
        ("{{ 'x'.zfill(width) | length }}", TOO_MUCH),
        ("{{ '\t'.expandtabs(10 ** 10) | length }}", TOO_MUCH),
        ("{{ '{:>9999999999}'.format(1) }}", "may not ask for such widths"),
        ("{{ '{:>{}}'.format(1, 10 ** 10) }}", "may not ask for such widths"),
        ("{{ '%9999999999d' % 1 }}", "may not ask for such widths"),
        ("{{ '%*d' | format(10 ** 10, 1) }}", "may not ask for such widths"),
        ("{{ 'a' | tojson(indent=10 ** 10) }}", "indent of tojson must be in 0..16"),
        ("{{ 'a'.translate({97: 'b' * 100}) }}", "method translate of text is not supported"),
        ("{{ '%s' | format('x', k=1) }}", "positional or named values, not both"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
    ],
)
def test_what_grows_without_end_is_stopped(template, message, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_CHARACTERS", 20_000_000)
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match=message):
        render(template, width=10**10)
    # Far below MAX_SECONDS: the characters stop it, not the clock.
    assert time.monotonic() - started < jinja_sandbox.MAX_SECONDS / 2


KEEP = "{% set n = namespace(x=[]) %}{% for i in range(100) %}{% set n.x = n.x + [_] %}{% endfor %}"


@pytest.mark.parametrize(
    "kept",
    ["range(100000) | list", "s[1:]", "s.upper()", "s | upper", "l | list", "l[:]", "d.copy()"],
)
def test_copies_are_paid_for(kept, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_CHARACTERS", 20_000_000)
    with pytest.raises(ChatTemplateError, match=TOO_MUCH):
        render(
            KEEP.replace("_", kept),
            s="a" * 1_000_000,
            l=[0] * 100_000,
            d=dict.fromkeys(range(100_000)),
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in x %}{% for j in x %}{% endfor %}{% endfor %}",
        "{% for i in x %}{% for j in x if j %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
    ],
)
def test_what_runs_without_end_is_stopped(template, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match="it takes longer than 0 seconds"):
        render(template, x=[0] * 10000)
    assert time.monotonic() - started < 10


def test_each_rendering_has_its_own_budget(monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_CHARACTERS", 20_000_000)
    template = JinjaTemplate("{{ 'a' * n }}")
    for _ in range(3):
        assert len(template.render(n=5_000_000)) == 5_000_000
        with pytest.raises(ChatTemplateError, match=TOO_MUCH):
            template.render(n=60_000_000)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | random }}", "line 1: No filter named 'random'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined: .* put a fixed date"),
    ],
)
def test_nothing_changes_from_run_to_run(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(template)


def test_templates_with_a_date_of_their_own_use_it():
    template = "{{ strftime_now('%Y') if strftime_now is defined else '26 Jul 2024' }}"
    assert render(template) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("{% generation %}a", "line 1: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deep"),
        ("{% for a in b %}" * 25 + "{% endfor %}" * 25, "nested too deep"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 'a'.split(1) }}", "TypeError: "),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
        ("{{ nothing | tojson }}", "TypeError: .* not JSON serializable"),
        ("{{ raise_exception('as the template says') }}", "^as the template says$"),
    ],
)
def test_mistakes_of_a_template_are_named(template, message):
    with pytest.raises(ChatTemplateError, match=message):
        render(template)


def test_variables_that_a_template_reads():
    template = JinjaTemplate("{% set a = b %}{{ a ~ c }}{% for d in e if d %}{{ d }}{% endfor %}")
    assert template.variables == {"b", "c", "e"}
