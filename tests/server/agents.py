"""Real coding agents against this server, by hand: their prompts are computed, their answers are forced.

    npm install @openai/codex @anthropic-ai/claude-code
    unshare -n sh -c 'ip link set lo up; python tests/server/agents.py codex node_modules/.bin/codex'
    unshare -n sh -c 'ip link set lo up; python tests/server/agents.py claude node_modules/.bin/claude'

The agent is asked to mend a file. The model, synthesized with 40960 tokens of context and the bundled tokenizer,
"answers" with a call of the agent's own tool that does it, then with a sentence. `unshare` leaves the agent nothing but
this machine's loopback. Says how many tokens the last prompt had, and how many of them were computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from forced import call, forced  # noqa: E402
from scripted import serving  # noqa: E402

import edgemoe  # noqa: E402
from edgemoe.formats.pack.reader import Pack  # noqa: E402
from edgemoe.model_files import bundled_model  # noqa: E402
from edgemoe.text.named_templates import NAMED_TEMPLATES  # noqa: E402
from tools.model_files import write_pack  # noqa: E402
from tools.synthesize import SyntheticModel  # noqa: E402

TASK = "Mend the greeting in hello.py"
MEND = "sed -i s/helo/hello/ hello.py && cat hello.py"
DONE = "I mended the greeting."
CODEX = """
model = "synthetic"
model_provider = "edgemoe"
model_context_window = 40960
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.edgemoe]
name = "edgemoe"
base_url = "{url}/v1"
wire_api = "responses"
"""


def synthesize(path: Path) -> None:
    shape = {"layers": 4, "hidden": 512, "ffn": 256, "experts": 32, "top_k": 4, "heads": 8, "kv_heads": 2}
    model = SyntheticModel(**shape, head_dim=64, vocabulary=8192)
    model.blobs["tokenizer.json"] = Pack.open(bundled_model()).read_blob("tokenizer.json")
    write_pack(model, path, bits=4, dense_bits=4)


def run_codex(program: str, url: str, home: Path, work: Path) -> None:
    (home / "config.toml").write_text(CODEX.format(url=url))
    command = [program, "exec", "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check", "-C", str(work)]
    environment = {**os.environ, "CODEX_HOME": str(home), "HOME": str(home)}
    subprocess.run([*command, TASK], env=environment, check=True, stdin=subprocess.DEVNULL, timeout=1200)


def run_claude(program: str, url: str, home: Path, work: Path) -> None:
    names = ("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "DISABLE_TELEMETRY", "DISABLE_AUTOUPDATER")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANTHROPIC", "CLAUDE"))}
    environment |= {"HOME": str(home), "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "none"}
    environment |= {"ANTHROPIC_MODEL": "synthetic", **dict.fromkeys(names, "1")}
    command = [program, "-p", TASK, "--allowedTools", "Bash"]
    subprocess.run(command, env=environment, cwd=work, check=True, stdin=subprocess.DEVNULL, timeout=1200)


AGENTS = {
    "codex": (run_codex, call("exec_command", json.dumps({"cmd": MEND}))),
    "claude": (run_claude, call("Bash", json.dumps({"command": MEND, "description": TASK}))),
}


def main() -> None:
    run, mend = AGENTS[sys.argv[1]]
    answers = iter([mend])

    def script(prompt: str) -> str:
        print(f"== a prompt of {len(prompt)} characters", flush=True)
        return next(answers, DONE)

    with tempfile.TemporaryDirectory() as folder:
        home, work, path = Path(folder, "home"), Path(folder, "work"), Path(folder, "synthetic.emoe")
        home.mkdir()
        work.mkdir()
        (work / "hello.py").write_text('print("helo")\n')
        synthesize(path)
        with edgemoe.load(path, context=0, parallel=2) as model:
            model.tokenizer.use_chat_template(NAMED_TEMPLATES["chatml"])
            with forced(script), serving(model, model_name="synthetic") as url:
                run(str(Path(sys.argv[2]).resolve()), url, home, work)
            stats = model.stats()
        print(
            f"== the last prompt: {stats['prompt_tokens']} tokens, {stats['computed_prompt_tokens']} of them computed"
        )
        mended = (work / "hello.py").read_text()
        assert mended == 'print("hello")\n', mended


if __name__ == "__main__":
    main()
