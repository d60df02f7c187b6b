"""Forms of tool calls that models of several families use."""

from __future__ import annotations

from edgemoe.families import ToolFormat

# Hermes 2 Pro's, which Qwen took over; also what a model is asked for that has learnt no form of its own.
JSON_IN_TAGS = ToolFormat("json", "<tool_call>", "</tool_call>", lines=True, signs=("<tool_call>",))

# Qwen3-Coder's and Qwen3.5's. The models sometimes leave the outer tag out.
FUNCTION_TAGS = ToolFormat(
    "tagged",
    "<tool_call>",
    "</tool_call>",
    name_begin="<function=",
    name_end=">",
    call_end="</function>",
    key_begin="<parameter=",
    key_end=">",
    value_end="</parameter>",
    loose_begin="<function=",
    lines=True,
    own_lines=True,
    signs=("<tool_call>", "<function="),
)

# GLM 4.5's and its successors'.
KEYS_AND_VALUES = ToolFormat(
    "tagged",
    "<tool_call>",
    "</tool_call>",
    key_begin="<arg_key>",
    key_end="</arg_key>",
    value_begin="<arg_value>",
    value_end="</arg_value>",
    signs=("<tool_call>", "<arg_key>"),
)

# DeepSeek's, from V3.1 on.
DEEPSEEK = ToolFormat(
    "named",
    "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "<\uff5ctool\u2581calls\u2581end\uff5c>",
    together=True,
    name_begin="<\uff5ctool\u2581call\u2581begin\uff5c>",
    separator="<\uff5ctool\u2581sep\uff5c>",
    call_end="<\uff5ctool\u2581call\u2581end\uff5c>",
    signs=("<\uff5ctool\u2581calls\u2581begin\uff5c>",),
)

# DeepSeek's before that: V2.5, V3, R1.
DEEPSEEK_FENCED = ToolFormat(
    "named",
    "<\uff5ctool\u2581calls\u2581begin\uff5c>",
    "<\uff5ctool\u2581calls\u2581end\uff5c>",
    together=True,
    name_begin="<\uff5ctool\u2581call\u2581begin\uff5c>",
    name_prefix="function<\uff5ctool\u2581sep\uff5c>",
    separator="\n```json\n",
    call_end="\n```<\uff5ctool\u2581call\u2581end\uff5c>",
    signs=("<\uff5ctool\u2581calls\u2581begin\uff5c>", "```json"),
)

# Kimi K2's, whose GGUF files are DeepSeek's by their architecture.
KIMI = ToolFormat(
    "named",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    together=True,
    name_begin="<|tool_call_begin|>",
    name_prefix="functions.",
    numbered=True,
    separator="<|tool_call_argument_begin|>",
    call_end="<|tool_call_end|>",
    signs=("<|tool_calls_section_begin|>",),
)
