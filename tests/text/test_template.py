from __future__ import annotations

import copy
import datetime
import time
from typing import Any

import pytest
from helpers import slow_except

from edgemoe.errors import TokenizerError
from edgemoe.text.template import MAX_TEMPLATE, ChatTemplate

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>é</b>"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return ChatTemplate(source, "model").render(MESSAGES if messages is None else messages, True, variables)


CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' ~ message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def test_chatml() -> None:
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>é</b><|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML) == expected
    assert render(CHATML, enable_thinking=False) == expected + "<think>\n\n</think>\n\n"
    assert render(CHATML, MESSAGES[1:]).startswith("<|im_start|>system\nYou are helpful.")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("  {% if true %}\n x\n  {% endif %}\ny", " x\ny"),  # trim_blocks, lstrip_blocks
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in [0, 1, 2, 3] %}{% if i == 1 %}{% continue %}{% elif i > 2 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}", "Hi <b>é</b>"),
        ("{% for m in messages[1:] if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{% endfor %}", "1/1"),
        ("{% for m in [] %}x{% else %}-{% endfor %}", "-"),
        ("{{ missing }}{{ missing ~ 1 }}{{ missing is defined }}", "1False"),
        ("{{ messages[-1].content.split(' ')[0].lower().replace('h', 'j') }}", "ji"),
        ("{{ 'a,b'.split(',') | join('-') }}{{ '+'.join(['c', 'd']) }}{{ 'xy' | replace('x', 'z') }}", "a-bc+dzy"),
        ("{{ '%s=%d' % ('n', 3) }} {{ '{}:{:>4}'.format('n', 3) }}", "n=3 n:   3"),
        ("{{ 'ab' * 2 }} {{ [1] + [2] }} {{ 7 % 4 }} {{ 2 ** 3 }}", "abab [1, 2] 3 8"),
        ("{% macro tag(x, y='z') %}<{{ x }}{{ y }}>{% endmacro %}{{ tag('a') }}{{ tag('b', y=1) }}", "<az><b1>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ messages[0].items() | list | length }}", "a12"),
        ("{{ tools is none }}{{ documents }}{{ add_generation_prompt }}", "TrueNoneTrue"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{{ 'l1\nl2' | indent(2) }}", "ABl1\n  l2"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_date() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_a_template_may_refuse() -> None:
    with pytest.raises(TokenizerError, match=r"^model: the chat template failed: Roles must alternate!$"):
        render("{{ raise_exception('Roles must\nalternate!') }}")


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ nothing() }}", "{% include 'x' %}", "{{ x | nothing }}",
     "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% if 1 %}" * 500 + "{% endif %}" * 500, "{{ 'a' + 1 }}",
     "{% import 'os' as os %}", "{% extends 'x' %}", "x" * (MAX_TEMPLATE + 1)],
)  # fmt: skip
def test_broken_templates(source: str) -> None:
    with pytest.raises(TokenizerError) as error:
        render(source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__.__globals__ }}",
     "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ raise_exception.__globals__.re }}",
     "{{ strftime_now.__code__.co_code }}", "{{ ''['__class__']['__mro__'][0] }}",
     "{{ '{0.__class__.__mro__[0]}'.format('') }}",
     "{{ (messages | attr('__class__')).__mro__[0] }}", "{{ self.__init__.__globals__.__builtins__ }}",
     "{{ namespace.__init__.__globals__['os'].getcwd() }}", "{{ messages.append(1) }}", "{{ messages.pop() }}",
     "{{ messages[0].update({'role': 'x'}) }}", "{% set messages[0].role = 'x' %}", "{{ messages.clear() }}",
     "{{ 'a'.format_map({}) }}{{ 'a'.translate({97: 'b'}) }}"],
)  # fmt: skip
def test_the_sandbox_holds(source: str) -> None:
    messages = copy.deepcopy(MESSAGES)
    with pytest.raises(TokenizerError):
        render(source, messages)
    assert messages == MESSAGES


def doubling(step: str) -> str:
    return "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}" + step + "{% endfor %}"


@pytest.mark.parametrize(
    "source",
    slow_except(
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endfor %}",
            "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'a' * 10000000000 }}",
            "{{ ('a' * 9999999) * 9999999 }}",
            "{{ [1] * 10000000000 }}",
            "{{ 9 ** 9 ** 9 ** 9 }}",
            "{{ 'x'.center(9999999999) }}",
            "{{ 'x' | center(9999999999) }}",
            "{{ 'x' | indent(9999999999) }}",
            "{{ '%09999999999d' % 1 }}",
            "{{ '%*d' % (999999999, 1) }}",
            "{{ '{:9999999999}'.format(1) }}",
            "{{ '{:{}}'.format(1, 9999999999) }}",
            "{{ [1] | batch(9999999999, 0) | list }}",
            "{{ messages | tojson(indent=9999999999) }}",
            "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
            "{{ ('a' * 999999) | replace('a', 'b' * 999999) }}",
            "{{ ('a' * 999999).join('b' * 999999) }}",
            "{{ (('a' * 9999) | list) | join('b' * 999999) }}",
            "{{ ('%s' * 9999) % ((('a' * 99999,) * 9999)) }}",
            "{{ ('{0}' * 99999).format('a' * 99999) }}",
            "{{ strftime_now('%Y' * 999) }}",
            "{{ lipsum(99999) }}",
            doubling("{% set ns.x = ns.x ~ ns.x %}"),
            doubling("{% set ns.x = ns.x + ns.x %}"),
            doubling("{% set ns.x = ns.x * 2 %}"),
            doubling("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
            doubling("{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
            doubling("{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | tojson }}",
            doubling("{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | string }}",
            doubling("{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | join }}",
            doubling("{% set ns.x = [ns.x, ns.x] %}") + "{{ 'a' ~ ns.x }}",
        ]
    ),
)
def test_work_and_size_are_bounded(source: str) -> None:
    begin = time.process_time()
    with pytest.raises(TokenizerError, match="the chat template failed"):
        render(source)
    assert time.process_time() - begin < 20


def test_long_conversations_are_no_attack() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 500
    assert len(render(CHATML, messages)) > 5_000_000
    gather = "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ m.content %}{% endfor %}"
    assert len(render(gather + "{{ ns.s }}", messages[:100])) == 1_000_000


def test_messages_need_roles() -> None:
    for message in ({"content": "x"}, {"role": 5}):
        with pytest.raises(TokenizerError, match="message 0 has no role"):
            render("x", [message])
