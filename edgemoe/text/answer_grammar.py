"""The grammar of a whole answer: frame and thoughts are free; what follows them is a grammar's text, JSON of a schema,
or calls of tools."""

from __future__ import annotations

import json

from edgemoe.errors import OptionError
from edgemoe.families import ToolFormat
from edgemoe.text.answer import THOUGHTS, end_of_thoughts, is_framed
from edgemoe.text.call_grammar import CallRules, Rules
from edgemoe.text.grammar import Constraint, Language, check_language, language
from edgemoe.text.tokenizer import Tokenizer
from edgemoe.text.tools import Tool, ToolUse

_ANY_OBJECT = {"type": "object"}


def answer_constraint(
    prompt: str,
    tokenizer: Tokenizer,
    use: ToolUse,
    form: ToolFormat | None,
    grammar: str | None = None,
    json_schema: str | None = None,
) -> Constraint | None:
    """Keeps an answer to this prompt within what was asked for; None where any text will do.

    use, form: tools, and how the model calls them; their calls are in the grammar where one is required, where a
    tool is strict, and where there may be one only. grammar, json_schema: of the content, as in `SamplingOptions`.
    Raises OptionError for what cannot be a grammar, which names the tool. Of tools that are not strict what the library
    does not know of a schema is passed over, and any object is allowed where there is no grammar at all.
    """
    content = language(grammar, json_schema) if grammar is not None or json_schema is not None else None
    calls = form is not None and (
        use.choice == "required"
        or (content is not None and use.tools)
        or any(tool.strict for tool in use.callable)
        or (use.tools and not use.parallel and form.parallel)
    )
    if form is None or not calls:
        made = None if content is None else _Answer(prompt, tokenizer, content).language()
        return None if made is None else Constraint(tokenizer, made)
    schemas: dict[str, dict[str, str]] = {}
    try:
        return Constraint(tokenizer, _Answer(prompt, tokenizer, content).language(use, form, schemas))
    except OptionError:
        for tool in use.callable:
            _check(tool, schemas)
    return Constraint(tokenizer, _Answer(prompt, tokenizer, content).language(use, form, schemas))


def _check(tool: Tool, schemas: dict[str, dict[str, str]]) -> None:
    """Puts any object in place of parameters that cannot be a grammar's; raises OptionError for a strict tool."""
    try:
        check_language(language(None, json.dumps({"type": "object", **tool.parameters}), not tool.strict))
    except OptionError as error:
        if tool.strict:
            raise OptionError(
                f"tool {tool.name!r}: {error} (without strict, what is not known of a schema is passed over)"
            ) from None
        schemas[tool.name] = _ANY_OBJECT


class _Answer:
    """What may come in an answer. content: the language of its content, where it has one."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, content: Language | None) -> None:
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._content = content
        self._rules = Rules(tokenizer)

    def language(
        self,
        use: ToolUse | None = None,
        form: ToolFormat | None = None,
        schemas: dict[str, dict[str, str]] | None = None,
    ) -> Language:
        """Of the whole answer; schemas: as in `CallRules`."""
        rules = self._rules
        framed = is_framed(self._prompt) or (form is not None and form.syntax == "harmony")
        calls = CallRules(rules, form, use.callable, schemas or {}) if use is not None and form is not None else None
        thoughts = "" if framed else self._thoughts()
        if calls is None and not thoughts and not framed and self._content is not None:
            return self._content
        body = rules.other(self._content.grammar()) if self._content is not None else ""
        what = self._content.what if self._content is not None else "tools"
        if framed:
            start = self._messages(body, calls, use)
        elif calls is None or use is None or form is None:
            start = body
        else:
            begin = rules.mark(form.begin)
            several = use.parallel and form.parallel
            if use.choice == "required":
                start = f"{begin} {calls.calls(several)}"
            elif body:
                start = f"({body} | {begin} {calls.calls(several)})"
            else:
                call = calls.calls(several=False)
                until = rules.until(form.begin, [form.loose_begin])
                free = rules.without([form.begin, form.loose_begin])
                start = f"({until} {call})* {free}" if several else f"(({until} {call}) | {free})"
        return Language(rules.language(f"{thoughts} {start}"), what)

    def _thoughts(self) -> str:
        """What may, or has to, come before the content."""
        rules = self._rules
        before = self._prompt.rstrip()
        close = end_of_thoughts(self._prompt)
        space = rules.rule("/[ \\n]{0,3}/")
        if close:
            return f"{rules.until(close)} {space}"
        if any(before.endswith(end) for _, end in THOUGHTS):
            return ""
        # Models that think have a token to begin with; where it is missing nothing can come before the content.
        known = []
        for begin, end in THOUGHTS:
            token = self._tokenizer.token_id(begin.removesuffix("thought"))
            if token is not None:
                rest = '"thought"' if begin.endswith("thought") else ""
                known.append(f"<[{token}]> {rest} {rules.until(end)} {space}")
        return f"({' | '.join(known)})?" if known else ""

    def _messages(self, body: str, calls: CallRules | None, use: ToolUse | None) -> str:
        """gpt-oss: messages of thoughts, then one of the content, or a call's."""
        mark, rule, until = self._rules.mark, self._rules.rule, self._rules.until
        kinds = '("analysis" | "commentary")' if calls is not None else '"analysis"'
        again = f'{mark("<|start|>")} "assistant"'
        free = rule(f"{mark('<|channel|>')} {kinds} {mark('<|message|>')} {until('<|end|>')} {again}")
        kind = f'(" "? {mark("<|constrain|>")} "json")?' if body else ""
        head = f'{mark("<|channel|>")} "final" {kind} {mark("<|message|>")}'
        final = f"{head} {body or rule('/(?s:.*)/')}"
        if calls is None or use is None:
            last = final
        else:
            last = calls.message() if use.choice == "required" else f"({final} | {calls.message()})"
        return f"{free}* {last}"
