"""The demo, at a size that takes seconds."""

from __future__ import annotations

import io
import itertools
import math
import re
import sys

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm.demo.data import Corpus, load_python_reference, read_streams, read_streams_forever
from fused_lstm.demo.model import CharacterModel, stream_characters
from fused_lstm.demo.training import Settings, Trainee, build_model, draw_steps, measure_step_memory

# Without them the demo is one clear error, which test_missing_extra covers.
image = pytest.importorskip("matplotlib.image")
rich_console = pytest.importorskip("rich.console")

from fused_lstm import demo  # noqa: E402

CPU = torch.device("cpu")
TINY = {
    "device": "cpu",
    "steps": 12,
    "time_steps": 16,
    "streams": 4,
    "embedding_size": 8,
    "hidden_size": 16,
    "sample_characters": 40,
}


def make_console(**options):
    return rich_console.Console(
        **{"file": io.StringIO(), "width": 116, "force_terminal": False} | options
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on work this small wait for each other far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_python_reference()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    console = make_console()
    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    result = demo.run(out, console=console, **TINY)
    return result, console.file.getvalue(), out


def test_the_two_loss_curves_coincide(tiny_run):
    result, _, _ = tiny_run
    baseline, fused = result.baseline.losses, result.fused.losses
    assert len(baseline) == len(fused) == TINY["steps"]
    differences = [abs(a - b) for a, b in zip(baseline, fused, strict=True)]
    assert result.largest_difference == max(differences)
    assert differences[result.step_of_largest_difference - 1] == max(differences)
    # Twelve steps leave rounding no time to grow: a few units in the last place of a loss of 4.6.
    assert max(differences) < 1e-5
    assert result.curves_coincide
    assert result.fused.validation_loss == pytest.approx(result.baseline.validation_loss, abs=1e-4)


def test_the_model_learns(tiny_run, corpus):
    result, _, _ = tiny_run
    assert result.fused.losses[0] == pytest.approx(math.log(len(corpus.alphabet)), rel=0.1)
    assert result.fused.losses[-1] < result.fused.losses[0]
    assert math.isfinite(result.fused.validation_loss)


def test_speed_and_memory_are_measured(tiny_run):
    result, _, _ = tiny_run
    for report in (result.baseline, result.fused):
        assert len(report.step_seconds) == TINY["steps"]
        assert min(report.step_seconds) > 0
        # At least the gradients of the LSTM's parameters, in float32.
        assert report.step_memory > 4 * 4 * 16 * (8 + 16)
    assert result.speed_ratio == pytest.approx(
        result.fused.characters_per_second / result.baseline.characters_per_second
    )


def test_the_table_has_every_column(tiny_run):
    result, printed, _ = tiny_run
    headings = (
        "layer|train loss|nats/char|val. loss|bits/char|training|chars/s|speed|ratio|"
        "peak MiB|of a step|backend and why"
    )
    for heading in headings.split("|"):
        assert heading in printed
    for report in (result.baseline, result.fused):
        row = next(line for line in printed.splitlines() if re.match(rf"\W+{report.name} ", line))
        assert f"{report.training_loss:.4f}" in row
        assert f"{report.validation_loss:.4f}" in row
        assert f"{report.validation_bits:.4f}" in row
        assert f"{report.characters_per_second:,.0f}" in row
        assert report.backend in row
    assert f"{result.speed_ratio:.2f}x" in printed
    assert "The loss curves coincide" in printed
    assert "Why this backend" in printed
    for backend in fused_lstm.explain(fused_lstm.LSTM(8, 16)).reasons:
        assert re.search(rf"^.. {backend} ", printed, re.MULTILINE)


def test_the_log_of_a_machine_without_terminal_is_plain(tiny_run):
    _, printed, _ = tiny_run
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert f"{TINY['steps']}/{TINY['steps']}: loss " in printed


def test_the_picture_is_a_picture(tiny_run):
    result, _, out = tiny_run
    assert result.figure == out / "demo.png"
    assert result.figure.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = image.imread(result.figure)
    height, width, _ = pixels.shape
    assert width > 1000
    assert height > 500
    assert len({tuple(pixel) for row in pixels[::7, ::7] for pixel in row.tolist()}) > 20


def test_the_sample_is_text_of_the_corpus(tiny_run, corpus):
    result, printed, _ = tiny_run
    assert len(result.sample) == len("The ") + TINY["sample_characters"]
    assert set(result.sample) <= set(corpus.alphabet)
    assert result.sample in printed


def test_a_run_repeats_and_leaves_global_random_state_alone(tiny_run, tmp_path):
    result, _, _ = tiny_run
    torch.manual_seed(1234)
    expected = torch.rand(3)
    torch.manual_seed(1234)
    again = demo.run(tmp_path, console=make_console(), **TINY)
    assert torch.equal(torch.rand(3), expected)
    assert again.baseline.losses == result.baseline.losses
    assert again.fused.losses == result.fused.losses
    assert again.sample == result.sample


def test_on_a_terminal_there_is_a_progress_bar(tmp_path):
    console = make_console(force_terminal=True)
    demo.run(tmp_path, console=console, **TINY | {"steps": 2, "sample_characters": 0})
    printed = console.file.getvalue()
    assert "\x1b[" in printed
    assert "2/2" in printed
    assert "characters/s" in printed


def test_an_ascii_console_is_no_error(tmp_path):
    raw = io.BytesIO()
    console = make_console(file=io.TextIOWrapper(raw, encoding="ascii"))
    demo.run(tmp_path, console=console, **TINY | {"steps": 2})
    console.file.flush()
    assert b"The loss curves coincide" in raw.getvalue()


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("steps", 0, "an integer of at least 1"),
        ("hidden_size", 1.5, "an integer of at least 1"),
        ("streams", -2, "an integer of at least 1"),
        ("dropout", 1.0, r"a number in \[0, 1\)"),
        ("dropout", math.nan, r"a number in \[0, 1\)"),
        ("learning_rate", 0.0, "a finite number above 0"),
        ("temperature", 0.0, "a number above 0"),
        ("sample_characters", -1, "0 or more"),
        ("device", "abacus", 'expected None, "cpu", "cuda"'),
        ("device", "meta", 'expected None, "cpu", "cuda"'),
        ("device", "cuda:99", 'expected None, "cpu", "cuda"'),
    ],
)
def test_a_bad_argument_is_named_with_what_is_expected(tmp_path, argument, value, expected):
    with pytest.raises(ValueError, match=f"{argument} is {re.escape(repr(value))}.*{expected}"):
        demo.run(tmp_path / "out", console=make_console(), **TINY | {argument: value})
    assert not (tmp_path / "out").exists()


def test_too_many_streams_for_the_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"text has .* characters; expected at least"):
        demo.run(tmp_path, console=make_console(), **TINY | {"streams": 100_000})


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=f"out is '{re.escape(str(out))}'"):
            demo.run(out, console=make_console(), **TINY)


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_extra(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{package} is not installed.*fused-lstm\[bench\]"
    ):
        demo.run(tmp_path / "out", **TINY)
    assert not (tmp_path / "out").exists()


def test_validation_text_shares_no_paragraph_with_training_text(corpus):
    training = set(corpus.training.split("\n\n"))
    validation = set(corpus.validation.split("\n\n"))
    assert not training & validation
    assert 0.05 < len(corpus.validation) / len(corpus.training) < 0.2
    assert corpus.training.isascii()
    assert corpus.validation.isascii()
    assert corpus == load_python_reference()


def test_encoding_and_decoding_are_inverse(corpus):
    text = corpus.validation[:500]
    assert corpus.decode(corpus.encode(text)) == text
    with pytest.raises(ValueError, match="text holds 'é', which the corpus does not"):
        corpus.encode("café")


def test_streams_read_the_text_in_order():
    text = torch.arange(23)
    batches = list(read_streams(text, steps=4, streams=2))
    assert [batch.continues for batch in batches] == [False, True, True]
    inputs = torch.cat([batch.inputs for batch in batches])
    assert torch.equal(inputs.t().flatten(), torch.arange(22))
    for batch in batches:
        assert torch.equal(batch.targets, batch.inputs + 1)
    with pytest.raises(ValueError, match="text has 2 characters from character 0 on"):
        list(read_streams(text[:2], steps=4, streams=2))


def test_reading_for_ever_starts_over_with_whole_batches():
    generator = torch.Generator().manual_seed(0)
    endless = read_streams_forever(torch.arange(40), steps=3, streams=2, generator=generator)
    batches = list(itertools.islice(endless, 50))
    assert {tuple(batch.inputs.shape) for batch in batches} == {(3, 2)}
    assert sum(not batch.continues for batch in batches) > 5


@pytest.mark.parametrize("lstm", [nn.LSTM, fused_lstm.LSTM])
def test_streaming_with_carried_state_equals_reading_at_once(corpus, lstm):
    model = build_model(lstm, corpus, Settings(embedding_size=8, hidden_size=16, layers=2), CPU)
    text = corpus.encode(corpus.validation[:30])[:, None]
    with torch.no_grad():
        at_once, _ = model(text)
        state = None
        for step in range(len(text)):
            logits, state = model(text[step : step + 1], state)
            torch.testing.assert_close(logits[0], at_once[step])


def test_streaming_refuses_what_it_cannot_do(corpus):
    model = CharacterModel(nn.LSTM, characters=5, embedding_size=4, hidden_size=4, layers=1)
    generator = torch.Generator()
    for prompt, temperature, message in (
        (torch.tensor([], dtype=torch.int64), 1.0, "prompt is empty"),
        (torch.tensor([1]), -1.0, "temperature is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(stream_characters(model, prompt, temperature=temperature, generator=generator))


def make_trainee(corpus: Corpus, lstm: type[nn.LSTM] = nn.LSTM, **options: object) -> Trainee:
    settings = Settings(time_steps=16, streams=4, embedding_size=8, hidden_size=16, **options)
    return Trainee("a layer", build_model(lstm, corpus, settings, CPU), settings)


def test_a_loss_that_is_not_finite_stops_training_and_spares_the_parameters(corpus):
    trainee = make_trainee(corpus)
    with torch.no_grad():
        trainee.model.readout.bias[0] = math.nan
    before = [parameter.clone() for parameter in trainee.model.parameters()]
    data = next(draw_steps(corpus, trainee.settings, CPU))
    with pytest.raises(FloatingPointError, match="a layer, step 0: loss is nan"):
        trainee.train_step(data)
    for parameter, copy in zip(trainee.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, copy, rtol=0, atol=0, equal_nan=True)


def test_step_memory_grows_with_the_batch(corpus):
    def measure(streams: int) -> int:
        settings = Settings(time_steps=16, streams=streams, embedding_size=8, hidden_size=16)
        trainee = Trainee("a layer", build_model(nn.LSTM, corpus, settings, CPU), settings)
        return measure_step_memory(trainee, next(draw_steps(corpus, settings, CPU)))

    few, many = measure(4), measure(64)
    # Logits, of [T, B, V] in float32, are only a part of what a step holds.
    assert many > 16 * 64 * len(corpus.alphabet) * 4
    assert many > 4 * few


def test_masks_keep_the_mean_and_the_learning_rate_warms_up_and_falls(corpus):
    settings = Settings(steps=100, dropout=0.5)
    data = next(draw_steps(corpus, settings, CPU))
    assert data.hidden_mask.unique().tolist() == [0.0, 2.0]
    assert data.hidden_mask.mean().item() == pytest.approx(1, abs=0.01)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.1 * settings.learning_rate


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(tmp_path):
    result = demo.run(tmp_path, console=make_console(), **TINY | {"device": "cuda"})
    assert result.curves_coincide
    assert result.fused.step_memory > 0
