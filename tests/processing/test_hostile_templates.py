"""Chat templates that loop or allocate end in one error, soon, and the next one renders."""

import os
import resource
import threading
import time

import pytest

from visavis.errors import CheckpointError, InputError
from visavis.processing import bounded, jinja_sandbox
from visavis.processing.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = BODY %}{% endfor %}"

HOSTILE = {
    "power": "{{ 9**(9**9) }}",
    "power in a filter": "{{ (9**(9**9))|string|length }}",
    "power in a set": "{% set x = 7**(10**9) %}",
    "power in a condition": "{% if 3**(3**(3**3)) %}a{% endif %}",
    "power in a test": "{{ (9**(9**9)) is odd }}",
    "power of messages": "{{ (messages|length + 8)**(9**9) }}",
    "power step by step": (
        "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}"
    ),
    "nested loops": LOOP.replace("BODY", ""),
    "nested loops that write": LOOP.replace("BODY", "abcdefgh"),
    "nested loops that add": LOOP.replace("BODY", "{% set c = a * b %}"),
    "three nested loops": LOOP.replace("BODY", "{% for c in range(99999) %}{% endfor %}"),
    "loops in macros": (
        "{% macro a() %}{% for i in range(99999) %}x{% endfor %}{% endmacro %}"
        "{% for i in range(99999) %}{{ a() }}{% endfor %}"
    ),
    "loop over products": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "loop over a doubled list": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}"
    ),
    "recursive loop": (
        "{% for m in [[[1]]] recursive %}{{ loop([[m], [m], [m], [m]]) }}{% endfor %}"
    ),
    "recursive macro": "{% macro a(n) %}{{ a(n + 1) }}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
    "recursive macro tree": (
        "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}"
    ),
    "text times number": "{{ 'a' * 10**10 }}",
    "number times text": "{{ 10**10 * 'a' }}",
    "list times number": "{{ [0] * 10**10 }}",
    "tuple times number": "{{ ((0,) * 10**10)|length }}",
    "content times number": "{{ messages[0].content * 10**10 }}",
    "times inside times": "{{ (('a' * 99999) * 99999)|length }}",
    "join": "{{ ['a' * 10**5] * 10**6 | join }}",
    "join of a product": "{{ ('b' * 10**5)|join('c' * 10**6) }}",
    "doubled text": DOUBLE.replace("BODY", "n.x ~ n.x"),
    "doubled text by plus": DOUBLE.replace("BODY", "n.x + n.x"),
    "doubled text by format": DOUBLE.replace("BODY", "'%s%s' % (n.x, n.x)"),
    "doubled text by format filter": DOUBLE.replace("BODY", "'%s%s'|format(n.x, n.x)"),
    "doubled text by method": DOUBLE.replace("BODY", "'{0}{0}'.format(n.x)"),
    "doubled text by replace": DOUBLE.replace("BODY", "n.x.replace('a', 'aba')"),
    "doubled text by replace filter": DOUBLE.replace("BODY", "n.x|replace('b', 'bb')"),
    "doubled text by join": DOUBLE.replace("BODY", "[n.x, n.x]|join"),
    "doubled text by escaping": DOUBLE.replace("BODY", "(n.x ~ '&<')|e|e|e|string * 2"),
    "doubled text by JSON": DOUBLE.replace("BODY", "(n.x ~ '\"')|tojson|tojson"),
    "width of format": "{{ '%9999999999d' % 1 }}",
    "width of the format filter": "{{ '%9999999999s'|format('a') }}",
    "width of the format method": "{{ '{:>9999999999}'.format('a') }}",
    "width of format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "precision": "{{ '%.999999999f' % 1.0 }}",
    "center filter": "{{ 'a'|center(10**10) }}",
    "center": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "rjust": "{{ 'a'.rjust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(2**31 - 1) }}",
    "indent": "{{ 'a\n\n\nb'|indent(10**10, true, true) }}",
    "indent of JSON": "{{ [[1]]|tojson(indent=10**10) }}",
    "batch": "{{ [1]|batch(10**10, 0)|list }}",
    "slice": "{{ [1]|slice(10**9, 0)|list }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999})|length }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "sum of lists": "{{ ([[0] * 9999] * 9999)|sum(start=[]) }}",
    "sort": "{{ (range(99999)|list * 999)|sort|length }}",
    "unique": "{{ (range(99999)|list * 9999)|unique|list|length }}",
    "groupby": "{% for g in (range(99999)|list * 999)|groupby('a') %}{% endfor %}",
    "wordwrap": "{{ ('ab ' * 99999999)|wordwrap(1)|length }}",
    "title": "{{ ('ab ' * 99999999)|title|length }}",
    "split": "{{ ('a ' * 10**9).split()|length }}",
    "digits": "{{ (10**9999999)|string }}",
    "xml attributes": "{{ {'a': 'b' * 10**9}|xmlattr }}",
    "urlize": "{{ ('http://a.b/(' * 9999999)|urlize }}",
    "striptags": "{{ ('<b>a' * 99999999)|striptags }}",
    "much text": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 0.1)
    monkeypatch.setattr(jinja_sandbox, "MEMORY", 64 << 20)


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_one_error(source):
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(InputError, match="chat template refuses messages of the roles user"):
        ChatTemplate(source).render(MESSAGES)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 256 << 10  # KiB, of this process
    assert after.ru_utime - before.ru_utime < 2
    assert ChatTemplate(GOOD).render(MESSAGES) == "user: hello\n"


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + ")" * 5000 + " }}", "a" * (jinja_sandbox.MAX_SOURCE + 1)]
)
def test_a_template_that_cannot_be_parsed_within_limits(source):
    with pytest.raises(CheckpointError, match="nested too deeply|characters, expected at most"):
        ChatTemplate(source)


def test_children_are_kept_and_replaced():
    template = ChatTemplate(GOOD)
    template.render(MESSAGES)
    kept = {worker.process.pid for worker in bounded._idle}
    for _ in range(20):
        template.render(MESSAGES)
    assert {worker.process.pid for worker in bounded._idle} == kept


def test_threads_share_the_children():
    template, found = ChatTemplate(GOOD), []

    def render(name: str) -> None:
        for _ in range(20):
            found.append(template.render([{"role": name, "content": "x"}]) == f"{name}: x\n")

    threads = [threading.Thread(target=render, args=(f"r{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 120
    assert len(bounded._idle) <= max(2, os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process")
def test_a_forked_process_has_children_of_its_own():
    template = ChatTemplate(GOOD)
    template.render(MESSAGES)
    kept = {worker.process.pid for worker in bounded._idle}
    pid = os.fork()
    if not pid:
        fine = template.render(MESSAGES) == "user: hello\n"
        mine = {worker.process.pid for worker in bounded._idle}
        for worker in bounded._idle:
            worker.close()
        os._exit(0 if fine and not mine & kept else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert template.render(MESSAGES) == "user: hello\n"


def test_a_child_ends_with_its_parent():
    worker = bounded._Worker()
    worker.process.stdin.close()
    deadline = time.monotonic() + 60
    while worker.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.process.returncode == 0
    worker.close()
