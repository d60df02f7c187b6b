"""The training recipe: its mixture layer, its loss, its text order, a smoke run, the exported folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from edgemoe.convert import convert  # noqa: E402
from edgemoe.quantize.nested_experts import NestedOptions  # noqa: E402
from tools.train import card, data, routing, unpack  # noqa: E402
from tools.train import model as model_module  # noqa: E402
from tools.train import train as loop  # noqa: E402
from tools.train.export import export, load_checkpoint  # noqa: E402
from tools.train.model import (  # noqa: E402
    Config,
    LinearCrossEntropy,
    MixtureFunction,
    Model,
    from_hf,
)
from tools.train.optim import orthogonalize  # noqa: E402

TINY = Config(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
)


def naive_mixture(x, weights, picks, gate_up, down):
    """A pair of a token and an expert at a time."""
    size = down.shape[2]
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for j, e in enumerate(picks[t].tolist()):
            hidden = gate_up[e] @ x[t]
            gate, up = hidden[:size], hidden[size:]
            y = y + weights[t, j] * (down[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("grouped", [False, True])
def test_mixture_and_its_gradient_equal_the_naive_ones(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if grouped and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(model_module, "_grouped", lambda x: grouped)
    dtype = torch.float32 if grouped else torch.double
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    tokens, hidden, size, experts, k = 40, 16, 8, 7, 3
    # The last expert has no rows at all.
    picks = torch.stack([torch.randperm(experts - 1, generator=generator)[:k] for _ in range(tokens)])
    inputs = draw(tokens, hidden), draw(tokens, k), draw(experts, 2 * size, hidden), draw(experts, hidden, size)
    x, weights, gate_up, down = inputs
    quick = MixtureFunction.apply(x, weights, picks, gate_up, down)
    naive = naive_mixture(x, weights, picks, gate_up, down)
    torch.testing.assert_close(quick, naive, rtol=1e-4, atol=1e-4)
    grad = torch.randn(quick.shape, generator=generator, dtype=dtype)
    for ours, theirs in zip(
        torch.autograd.grad(quick, inputs, grad), torch.autograd.grad(naive, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_cross_entropy_in_slices_equals_the_whole() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(33, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (33,))
    mean, losses = LinearCrossEntropy.apply(hidden, weight, targets, 10)
    whole = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, whole.detach())
    for ours, theirs in zip(
        torch.autograd.grad(mean, (hidden, weight)), torch.autograd.grad(whole.mean(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_half_precision_gives_nearly_the_same_gradients() -> None:
    config = model_module.Config(vocab_size=96, hidden_size=64, num_hidden_layers=2, head_dim=16, num_experts=8)
    model = model_module.Model(config, seed=3)
    rows = np.random.default_rng(2).integers(0, 96, (2, 41))
    whole, half = (loop.part_of_step(model, rows, 2, "cpu", use) for use in (False, True))
    assert half.cross == pytest.approx(whole.cross, rel=1e-3)
    for (name, _), one, other in zip(model.named_parameters(), whole.gradients, half.gradients, strict=True):
        assert other.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("time", [1, 100, 128, 300])
def test_causal_blocks_equal_attention(time: int) -> None:
    q, k, v = torch.randn(3, 2, 4, time, 16, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(model_module._causal_blocks(q, k, v), expected)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_orthogonalize_takes_singular_values_near_one(shape: tuple[int, ...], half: bool) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrices, half))
    assert values.max() < 1.3
    assert values.median() > 0.7


def test_rate_warms_up_stays_and_decays() -> None:
    rates = [loop.rate(step, 100, 10, 20) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_hot_overlap() -> None:
    first = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0.0, 0.0])
    assert routing.hot_overlap(first, first) == 1.0
    assert routing.hot_overlap(first, first[::-1]) == 0.0


def test_prose_is_cleaned() -> None:
    assert data.clean_prose("\ufeffOne\r\nline.\r\n\r\n\r\n\u2018Two\u2019  words\n") == "One line.\n\n'Two' words\n"
    page = "<html><head><title>x</title></head><body><nav>menu</nav><p>Some <b>bold</b>\ntext.</p><pre>code</pre>"
    assert data.html_to_prose(page) == ["Some bold text."]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a few hundred bytes, again and again."""
    folder = tmp_path_factory.mktemp("data")
    lines = {
        "novel": "The ship went down the river and the men sang of home.\n\n",
        "code": "def add(a, b):\n    return a + b\n\n",
        "docs": "To install the package, run the command and read the manual.\n\n",
    }
    tokenizer = data.train_tokenizer(iter(line * 5 for line in lines.values()), TINY.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "heldout").mkdir()
    for domain, line in lines.items():
        np.array([0, *tokenizer.encode(line * 60).ids], dtype=np.uint16).tofile(folder / f"{domain}.bin")
        (folder / "heldout" / f"{domain}.txt").write_text(line * 8)
    meta = {"vocab_size": tokenizer.get_vocab_size(), "domains": {}, "packages": {"git-doc": "1"}}
    (folder / "data.json").write_text(json.dumps(meta))
    return folder


def arguments(prepared: Path, out: Path, *more: str):
    shared = ["--preset", "smoke", "--data", str(prepared), "--out", str(out), "--context", "32", "--sequences", "4"]
    fixed = ["--cpu", "--warmup", "2", "--log-every", "1", "--held-out-tokens", "64"]
    return loop.parser().parse_args([*shared, *fixed, *more])


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_order_is_deterministic_and_can_be_entered_anywhere(prepared: Path) -> None:
    first = loop.Batches(prepared, 32, loop.DOMAIN_WEIGHTS, seed=3)
    rows, domains = first.batch(0, 60)
    later, later_domains = loop.Batches(prepared, 32, loop.DOMAIN_WEIGHTS, seed=3).batch(40, 20)
    assert (rows[40:] == later).all()
    assert (domains[40:] == later_domains).all()
    assert set(domains.tolist()) == {0, 1, 2}


@pytest.mark.slow
def test_loss_falls_and_a_resumed_run_goes_on_alike(prepared: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(arguments(prepared, whole, "--steps", "16"))
    losses = [r["loss"] for r in records(whole) if "loss" in r]
    assert losses[-1] < losses[0] - 1.5
    assert records(whole)[-1]["held_out"]["novel"]["bits_per_byte"] > 0

    loop.train(arguments(prepared, parts, "--steps", "16", "--minutes", "1e-6"))
    loop.train(arguments(prepared, parts, "--steps", "16", "--resume"))
    again = [r["loss"] for r in records(parts) if "loss" in r]
    assert again == pytest.approx(losses, abs=2e-3)


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no token files"):
        loop.train(arguments(tmp_path, tmp_path / "out", "--steps", "1"))
    with pytest.raises(SystemExit, match="--text"):
        data.prepare(tmp_path, None, tmp_path / "out", 300, 1000)


def tiny_folder(prepared: Path, out: Path) -> Model:
    torch.manual_seed(0)
    model = Model(TINY, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that a mistaken norm, rotation or router would show.
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
            parameter.copy_(parameter.bfloat16().float())
    export(model, (prepared / "tokenizer.json").read_bytes(), out)
    return model


def test_exported_folder_reads_back(prepared: Path, tmp_path: Path) -> None:
    model = tiny_folder(prepared, tmp_path)
    tokens = torch.arange(20)[None] * 7 % 300
    torch.testing.assert_close(from_hf(tmp_path).logits(tokens), model.logits(tokens))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < names


def test_exported_folder_equals_transformers(prepared: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_folder(prepared, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20) * 7 % 300
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def add(a, b):\n    return a + b  # caf\u00e9\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_starts_from_a_folder(prepared: Path, tmp_path: Path) -> None:
    model = tiny_folder(prepared, tmp_path / "hf")
    start = ["--start", str(tmp_path / "hf")]
    last = loop.train(arguments(prepared, tmp_path, *start, "--steps", "1", "--muon-lr", "0", "--adam-lr", "0"))
    trained, _ = load_checkpoint(last)
    assert (trained.config.num_hidden_layers, trained.config.hidden_size) == (2, 32)  # not the preset's
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, rtol=0, atol=0)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.json").write_text('{"vocab_size": 310}')
    with pytest.raises(SystemExit, match="310"):
        loop.train(arguments(tmp_path / "other", tmp_path, *start, "--steps", "1"))


@pytest.mark.slow
def test_unpacked_weights_are_those_of_the_pack(prepared: Path, tmp_path: Path) -> None:
    model = tiny_folder(prepared, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole.emoe", 16)
    unpack.main(["--pack", str(tmp_path / "whole.emoe"), "--out", str(tmp_path / "whole")])
    again = from_hf(tmp_path / "whole")
    assert again.config == model.config
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=0, atol=0)
    assert (tmp_path / "whole" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()

    # A step of 3 bits is about twice that of 4.
    for levels, least, most in (((2, 3), 0.1, 0.17), ((2, 3, 4), 0.05, 0.085)):
        path = tmp_path / f"{len(levels)}.emoe"
        convert(tmp_path / "hf", path, nested=NestedOptions(levels, calibrate=False))
        nested = unpack.read_model(unpack.Pack.open(path))
        for name, parameter in model.named_parameters():
            error = float((nested.get_parameter(name) - parameter).detach().norm() / parameter.detach().norm())
            if name.endswith(("gate_up", "down")):
                assert least < error < most, (levels, name)
            else:  # 8 bits, or exact
                assert error < (0.01 if parameter.ndim > 1 else 1e-6), name


@pytest.mark.slow
def test_card_of_a_trained_run(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = loop.train(arguments(prepared, tmp_path, "--steps", "2"))
    model, told = load_checkpoint(last)
    assert told == {"step": 2, "tokens_seen": 2 * 4 * 32}
    export(model, (prepared / "tokenizer.json").read_bytes(), tmp_path / "hf")
    common = ["--data", str(prepared), "--text", str(tmp_path), "--window", "32", "--sample-tokens", "4"]
    folder = str(tmp_path / "hf")
    card.main(["--model", folder, "--baseline", folder, "--log", str(tmp_path / "log.jsonl"), *common])
    printed = capsys.readouterr().out
    assert "| held-out text | bytes | baseline, bits per byte | bits per byte | perplexity |" in printed
    assert "SRP over windows of 16 tokens" in printed
    assert "def read_lines(path):" in printed


def test_bits_per_byte_do_not_depend_on_the_batch(prepared: Path, tmp_path: Path) -> None:
    tiny_folder(prepared, tmp_path)
    measured = card.Measured(tmp_path)
    text = (prepared / "heldout" / "docs.txt").read_text()
    one, many = measured.measure(text, 32, batch=1), measured.measure(text, 32, batch=5)
    assert one.bits_per_byte == pytest.approx(many.bits_per_byte, rel=1e-5)
    assert one.picks.shape == (2, one.tokens, 3)
