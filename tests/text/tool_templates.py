"""Chat templates in the manner of each family's, as short as they can be."""

# ruff: noqa: E501, RUF001  (a line of a template is a line)

from __future__ import annotations

_LOOP = "{% for m in messages %}"
_CHATML_BEGIN = "{{ '<|im_start|>' + m.role + '\\n' }}"

QWEN3 = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> Write <tool_call>"
    "<|im_end|>\n{% endif %}" + _LOOP + "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}" + _CHATML_BEGIN + "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '\\n' if m.content or not loop.first }}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
QWEN3_CODER = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %} <tool_call> <function="
    "<|im_end|>\n{% endif %}" + _LOOP + _CHATML_BEGIN + "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}{% for name, value in call.function.arguments | items %}"
    "{{ '<parameter=' + name + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GPT_OSS = (
    "{% if tools %}<|start|>developer<|message|>{% for tool in tools %}{{ '// ' + tool.function.description }} type "
    "{{ tool.function.name }}{% endfor %}<|end|>{% endif %}" + _LOOP + "{% if m.role == 'tool' %}"
    "<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('content and thinking') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DEEPSEEK_V3_1 = (
    _LOOP
    + "{% if m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% elif m.tool_calls is defined %}"
    "<｜Assistant｜></think>{{ m.content }}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] + "
    "'<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
DEEPSEEK_V3 = (
    _LOOP
    + "{% if m.role == 'assistant' and m['content'] is none %}<｜Assistant｜><｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + 'function' + '<｜tool▁sep｜>' + call['function']['name'] + '\\n' + '```json' + '\\n' + "
    "call['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>"
    "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% else %}{{ '<｜Assistant｜>' if m.role == 'assistant' else '<｜User｜>' }}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{% endif %}"
    + _LOOP
    + "{% if m.role == 'tool' %}<|observation|>\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% else %}<|{{ m.role }}|>\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "\n<tool_call>{{ call.function.name }}\n{% for name, value in call.function.arguments.items() %}<arg_key>{{ name }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GRANITE = (
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end_of_text|>\n"
    "To call one, write <|tool_call|> and a list.{% endif %}"
    + _LOOP
    + "<|start_of_role|>{{ m['role'] }}<|end_of_role|>"
    "{{ m['content'] }}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
LFM2 = (
    "{% if tools %}<|im_start|>system\nList of tools: <|tool_list_start|>[{% for tool in tools %}{{ tool | tojson }}{% endfor %}]"
    "<|tool_list_end|><|im_end|>\n{% endif %}"
    + _LOOP
    + _CHATML_BEGIN
    + "{% if m.role == 'tool' %}<|tool_response_start|>"
    "{{ m.content }}<|tool_response_end|>{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA4 = (
    "{% macro value(v) %}{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is mapping %}{{ '{' }}{% for k, x in v | dictsort %}"
    "{{ k }}:{{ value(x) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}{% else %}{{ v | tojson }}{% endif %}{% endmacro %}"
    "{% if tools %}<|turn>system\n{% for tool in tools %}<|tool>declaration:{{ tool.function.name }}<tool|>{% endfor %}<turn|>\n{% endif %}"
    + _LOOP
    + "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% for call in m.tool_calls or [] %}"
    "<|tool_call>call:{{ call.function.name }}{{ value(call.function.arguments) }}<tool_call|>{% endfor %}"
    "{% for one in m.tool_responses or [] %}<|tool_response>response:{{ one.name }}{{ '{value:' + value(one.response) + '}' }}"
    "<tool_response|>{% endfor %}{{ m.content }}{% if not (m.tool_responses and not m.content) %}<turn|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not messages[-1].tool_responses %}<|turn>model\n{% endif %}"
)
MINIMAX = (
    "]~!b[]~b]system\n{% for tool in tools or [] %}<tool>{{ tool.function | tojson }}</tool>{% endfor %}[e~[\n"
    + _LOOP
    + "]~b]{{ 'ai' if m.role == 'assistant' else m.role }}\n{{ m.content }}{% if m.tool_calls %}\n<minimax:tool_call>\n"
    '{% for call in m.tool_calls %}<invoke name="{{ call.function.name }}">\n{% for k, v in call.function.arguments | items %}'
    '<parameter name="{{ k }}">{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n{% endfor %}'
    "</minimax:tool_call>{% endif %}[e~[\n{% endfor %}{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}"
)
MIXTRAL = (
    "{{ bos_token }}"
    + _LOOP
    + "{% if m.role == 'user' %}{% if tools and loop.last or loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson + \', "id": "\' + call.id + \'"}\' }}'
    "{% endfor %}]</s>{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }} {{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
CHATML = (
    _LOOP
    + _CHATML_BEGIN
    + "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
