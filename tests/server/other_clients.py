"""LangChain's and LlamaIndex's clients against a server: run by test_compliance.py with a Python that has them.

    python other_clients.py URL

Both need an older `openai` than the tests' own, hence a Python of their own.
"""

import asyncio
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

URL = sys.argv[1] + "/v1"
HELLO = "Hello there, friend."


def get_weather(location: str) -> str:
    """What the weather is like."""
    return f"rain in {location}"


class Answer(BaseModel):
    whale: str


def langchain() -> None:
    model = ChatOpenAI(base_url=URL, api_key="none", model="tiny", timeout=60, max_retries=0)
    said = model.invoke([SystemMessage("Be brief."), HumanMessage("Hi")])
    assert said.content == HELLO
    assert said.usage_metadata["output_tokens"] > 3
    assert said.response_metadata["finish_reason"] == "stop"
    pieces = list(model.stream("Hi", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == HELLO and len(pieces) > 2
    assert any(piece.usage_metadata for piece in pieces)

    async def together() -> list[AIMessage]:
        return await asyncio.gather(*(model.ainvoke("Hi") for _ in range(3)))

    assert [answer.content for answer in asyncio.run(together())] == [HELLO] * 3
    tools = model.bind_tools([tool(get_weather)])
    asked = tools.invoke("The weather in San Francisco?")
    (wanted,) = asked.tool_calls
    assert wanted["name"] == "get_weather" and wanted["args"] == {"location": "San Francisco"}
    gathered = None
    for piece in tools.stream("The weather in San Francisco?"):
        gathered = piece if gathered is None else gathered + piece
    assert gathered.tool_calls[0]["args"] == {"location": "San Francisco"}
    history = [HumanMessage("The weather?"), asked, ToolMessage("rain", tool_call_id=wanted["id"])]
    assert model.invoke(history).content == HELLO
    structured = model.with_structured_output(Answer, method="json_schema")
    assert structured.invoke("Which whale?") == Answer(whale="blue")
    print("langchain")


def llamaindex() -> None:
    model = OpenAILike(
        api_base=URL, api_key="none", model="tiny", is_chat_model=True, is_function_calling_model=True, timeout=60
    )
    assert model.chat([ChatMessage(role="user", content="Hi")]).message.content == HELLO
    assert list(model.stream_chat([ChatMessage(role="user", content="Hi")]))[-1].message.content == HELLO
    assert asyncio.run(model.acomplete("Hi")).text == HELLO
    weather = FunctionTool.from_defaults(get_weather)
    answer = model.chat_with_tools([weather], user_msg="The weather in San Francisco?")
    (wanted,) = model.get_tool_calls_from_response(answer)
    assert wanted.tool_name == "get_weather" and wanted.tool_kwargs == {"location": "San Francisco"}
    plain = OpenAILike(api_base=URL, api_key="none", model="tiny", is_chat_model=False, timeout=60)
    assert plain.complete("Once upon a time").text == HELLO
    assert list(plain.stream_complete("Once upon a time"))[-1].text == HELLO
    print("llamaindex")


langchain()
llamaindex()
