"""python -m benchmarks.report: the README says what the records say, and pictures show it."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import plots, reading, report

ROOT = Path(__file__).resolve().parents[1]
README = (
    "# A package\n\nBefore.\n\n<!-- additions: begin (make report) -->\n"
    "<!-- additions: end -->\n\nBetween.\n\n<!-- performance: begin (make report) -->\n"
    "stale\n<!-- performance: end -->\n\nAfter.\n"
)
SMALL = (
    (1000, 1, 16, 32),
    (100, 1, 64, 64),
    (200, 8, 32, 32),
    (100, 16, 64, 64),
    (50, 128, 16, 64),
    (20, 256, 64, 64),
    (100, 64, 64, 128),
    (100, 64, 128, 256),
    (100, 1, 512, 512),
    (100, 32, 512, 512),
    (50, 64, 1024, 1024),
)
# Group, sizes, what else, dtype.
CPU_CASES = (
    *(("small", sizes, {}, "float32") for sizes in SMALL),
    ("reinforcement-learning", (1, 16, 64, 128), {}, "float32"),
    ("reinforcement-learning", (16, 64, 64, 128), {}, "float32"),
    ("reinforcement-learning", (128, 8, 64, 256), {}, "float32"),
    ("time-series", (96, 32, 7, 128), {}, "float32"),
    ("time-series", (336, 32, 21, 64), {"num_layers": 2}, "float32"),
    ("speech", (400, 8, 80, 256), {"bidirectional": True}, "float32"),
    ("speech", (400, 8, 80, 320), {"num_layers": 3, "proj_size": 160}, "float32"),
    ("language", (35, 20, 650, 650), {"num_layers": 2}, "float32"),
    ("streaming", (1, 1, 64, 64), {}, "float32"),
    ("streaming", (1, 1, 64, 64), {"cell": True}, "float32"),
    ("streaming", (1, 1, 512, 512), {"cell": True}, "float32"),
    ("variants", (100, 16, 64, 64), {"proj_size": 32}, "float32"),
    ("variants", (100, 16, 64, 64), {"packed": True}, "float32"),
    (
        "variants",
        (100, 32, 64, 128),
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        "float32",
    ),
    ("variants", (100, 16, 64, 64), {}, "float64"),
    ("variants", (100, 64, 128, 256), {}, "bfloat16"),
    *(("sweep-T", (steps, 16, 64, 64), {}, "float32") for steps in (16, 64, 256, 1024, 4096)),
    *(("sweep-B", (100, batch, 64, 64), {}, "float32") for batch in (1, 4, 16, 64, 256)),
    *(("sweep-H", (100, 16, size, size), {}, "float32") for size in (16, 32, 64, 128, 256, 512)),
)
GPU_SHAPES = (
    *(("small", sizes) for sizes in SMALL[:2]),
    ("reinforcement-learning", (128, 64, 64, 256)),
    ("time-series", (336, 256, 21, 128)),
    ("speech", (1000, 32, 80, 512)),
    ("language", (128, 64, 1024, 1024)),
    ("grid", (512, 64, 256, 256)),
    ("flashrnn", (1024, 16, 768, 768)),
    *(("sweep-T", (steps, 16, 256, 256)) for steps in (64, 256, 1024, 4096)),
)
GPU_DTYPES = ("bfloat16", "float32")
GPU_CASES = tuple(
    (group, sizes, {}, dtype)
    for group, sizes in GPU_SHAPES
    for dtype in (GPU_DTYPES if group == "small" else GPU_DTYPES[:1])
)
PLAIN = {
    "num_layers": 1,
    "bidirectional": False,
    "batch_first": False,
    "proj_size": 0,
    "packed": False,
    "cell": False,
}


def cpu_environment():
    return {
        "device": "AMD EPYC", "device_type": "cpu", "slug": "amd-epyc-2-threads", "driver": None,
        "compute_capability": None, "processor": "AMD EPYC", "cpu_count": 2, "threads": 2,
        "allocator": "default", "load_average": 0.3, "python": "3.11.7", "torch": "2.13.0+cpu",
        "triton": "3.7.1", "cuda": None, "cudnn": None, "peers": {"onnxruntime": "1.31.1"},
        "commit": "0123456789abcdef", "dirty": False, "date": "2026-11-21T12:47:01+00:00",
    }  # fmt: skip


def gpu_environment():
    return {
        **cpu_environment(), "device": "NVIDIA H200", "device_type": "cuda", "slug": "nvidia-h200",
        "driver": "580.1", "compute_capability": "9.0", "cpu_count": 16, "threads": 16,
        "torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": 91200,
        "peers": {"flashrnn": "1.0.5", "torchrl": "0.11.0"}, "date": "2026-11-22T09:00:00+00:00",
    }  # fmt: skip


def name_of(sizes, options, dtype):
    T, B, inputs, hidden = sizes
    words = ["cell" if options.get("cell") else f"t{T}", f"b{B}", f"i{inputs}", f"h{hidden}"]
    words += [f"{key[:2]}{int(value)}" for key, value in options.items() if key != "cell"]
    return "-".join([*words, dtype])


def make_result(provider, mode, launch, seconds, torch_seconds, flops, limit, backend=""):
    ratio = torch_seconds / seconds
    memory = 4e6 * (1 + 2 * (mode == "training")) * (flops / 1e8) ** 0.5
    ours = provider.startswith("fused_lstm")
    return {
        "provider": provider, "mode": mode, "launch": launch, "status": "timed", "detail": "",
        "backend": backend or provider, "reason": "",
        "errors": {"output": {"error": 1e-7, "budget": 3e-7}},
        "error_over_budget": 0.4 if provider != "flashrnn" else 3.2,
        "seconds": {"p20": 0.97 * seconds, "p50": seconds, "p80": 1.06 * seconds},
        "host_seconds": None, "repetitions": 100, "ratio": ratio, "ratio_of_pairs": ratio,
        "flops": flops, "bytes": flops / 50, "limit_seconds": limit, "limited_by": "products",
        "fraction_of_limit": limit / seconds,
        "peak_memory_bytes": int(memory * (0.7 if ours else 1.0)) if ours or provider == "torch"
        else None,
        "memory_ratio": 0.7 if ours else 1.0 if provider == "torch" else None,
    }  # fmt: skip


def not_timed(provider, mode, launch, status, detail):
    null = dict.fromkeys(make_result("torch", mode, launch, 1.0, 1.0, 1, 1.0))
    return {
        **null, "provider": provider, "mode": mode, "launch": launch, "status": status,
        "detail": detail, "errors": {}, "repetitions": 0,
    }  # fmt: skip


def make_results(sizes, options, dtype, device_type, drawn):
    T, B, inputs, hidden = sizes
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    flops = 8 * T * B * hidden * (inputs + hidden) * layers
    # Of packed sequences half the steps are there.
    flops = flops // 2 if options.get("packed") else flops
    gpu = device_type == "cuda"
    rate = {"float32": 5e13, "tf32": 3e14, "bfloat16": 6e14, "float16": 6e14}.get(dtype, 1e14)
    rate = rate if gpu else {"float64": 1e11}.get(dtype, 2e11)
    step = (4e-6 if gpu else 6e-7) * layers
    results = []
    for mode in plots.MODES:
        times = 1 if mode == "inference" else 3
        for launch in ("eager", "graph") if gpu else ("eager",):
            limit = times * (flops / rate + T * step * 0.2)
            overhead = 3e-5 if launch == "eager" else 0.0
            theirs = times * (flops / rate / 0.8 + T * step * 2) + 4 * overhead
            mine = times * (flops / rate / 0.86 + T * step * drawn.uniform(0.5, 0.8)) + overhead
            theirs = theirs * 5 if options.get("packed") else theirs
            mine = theirs * 1.06 if hidden == 512 and T == 100 and B == 32 else mine

            def add(
                provider,
                seconds,
                backend="",
                mode=mode,
                launch=launch,
                theirs=theirs,
                limit=limit,
                times=times,
            ):
                results.append(
                    make_result(
                        provider, mode, launch, seconds, theirs, times * flops, limit, backend
                    )
                )

            add("torch", theirs)
            if gpu:
                add("fused_lstm", theirs * drawn.uniform(0.99, 1.02), "aten")
                add("fused_lstm[cuda]", mine * 0.7, "cuda")
                add("fused_lstm[triton]", mine, "triton")
                if dtype == "bfloat16" and launch == "eager" and hidden >= 256:
                    add("flashrnn", mine * 1.7)
                add("torchrl", theirs * 12) if launch == "eager" and T < 200 else results.append(
                    not_timed("torchrl", mode, launch, "unavailable", "too many steps")
                )
                continue
            add("fused_lstm", mine, "native")
            add("fused_lstm[aten]", theirs * drawn.uniform(0.98, 1.03), "aten")
            add("fused_lstm[reference]", theirs * 5, "reference")
            if mode == "inference" and dtype == "float32" and not options.get("cell"):
                add("onnxruntime", theirs / drawn.uniform(0.7, 1.6))
            else:
                results.append(not_timed("onnxruntime", mode, launch, "unavailable", "no training"))
            if T <= 20:
                add("torch.compile", theirs * drawn.uniform(0.9, 1.5))
    return results


def write_device(folder, environment, cases):
    drawn = random.Random(0)
    gpu = environment["device_type"] == "cuda"
    folder /= environment["slug"]
    folder.mkdir(parents=True)
    records = {}
    for group, sizes, options, dtype in cases:
        name = name_of(sizes, options, dtype)
        if name in records:
            records[name]["groups"].append(group)
            continue
        T, B, inputs, hidden = sizes
        case = {"name": name, "dtype": dtype, "T": T, "B": B, "I": inputs, "H": hidden}
        records[name] = {
            "schema": 2, "case": {**case, **PLAIN, **options}, "groups": [group],
            "environment": environment,
            "limits": {"gemm_flops_per_second": 2e11, "copy_bytes_per_second": 1.2e10,
                       "exchange_seconds": {}},
            "input_sets": 1, "calls_per_sample": 1, "seconds_per_mode": 1.0,
            "results": make_results(sizes, options, dtype, environment["device_type"], drawn),
        }  # fmt: skip
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    providers = ["fused_lstm", *(["flashrnn"] if gpu else ["onnxruntime", "torch.compile"])]
    headlines = []
    for provider in providers:
        for mode in plots.MODES:
            ratios = {
                name.removesuffix("-float32"): result["ratio"]
                for name, record in records.items()
                for result in record["results"]
                if "small" in record["groups"] and record["case"]["dtype"] == "float32"
                if (result["provider"], result["mode"], result["launch"])
                == (provider, mode, "eager")
                if result["ratio"]
            }
            if ratios:
                mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
                headlines.append(
                    {
                        "provider": provider,
                        "mode": mode,
                        "geometric_mean_of_ratio": mean,
                        "shapes": list(ratios),
                    }
                )
    slopes = [
        {
            "group": f"sweep-{swept}",
            "provider": provider,
            "mode": mode,
            "launch": launch,
            "dtype": dtype,
            "slope": slope + 0.01 * (provider == "torch"),
            "points": 5,
        }
        for swept, slope in (("T", 0.98), ("B", 0.71), ("H", 1.43))
        for provider in ("torch", "fused_lstm")
        for mode in plots.MODES
        for launch in (("eager", "graph") if gpu else ("eager",))
        for dtype in (("float32", "bfloat16") if gpu else ("float32",))
    ]
    run = {
        "schema": 2, "environment": environment, "limits": {}, "budget_seconds": 900,
        "elapsed_seconds": 700.0, "headlines": headlines, "slopes": slopes, "cases": list(records),
        "not_run": {"t9-b9-i9-h9-float32": "beyond the budget of 900 s"}, "wrong": [],
        "failed": [],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def write_additions(folder, environment):
    def result(name, B, mode, over, ratio=None, most=None):
        sizes = {"T": 128, "B": B, "I": 16 if B == 8 else 128, "H": 64 if B == 8 else 128}
        return {
            "addition": name, "sizes": sizes, "mode": mode, "status": "timed",
            "todays_way": "a loop" if ratio else "", "over_plain": over,
            **({"ratio": ratio} if ratio else {}), **({"largest_ratio": most} if most else {}),
        }  # fmt: skip

    content = {
        "schema": 2, "environment": environment, "dtype": "float32", "additions": [
            result("resets", 64, "inference", 1.01, 2.606, 2.71),
            result("resets", 64, "training", 1.02, 3.25, 3.89),
            result("resets", 8, "inference", 0.85, 31.5, 66.6),
            result("resets", 8, "training", 0.9, 35.5, 91.0),
            result("lengths-all-T", 8, "inference", 1.093),
            result("return_cells", 8, "inference", 0.9, 11.49),
            {"addition": "return_cells", "sizes": {"T": 128, "B": 64, "I": 128, "H": 128},
             "mode": "training", "status": "wrong", "todays_way": "a loop"},
            result("weight_dropout", 8, "training", 1.257),
            result("zoneout", 64, "training", 1.459),
            result("zoneout", 8, "training", 1.945),
        ],
    }  # fmt: skip
    (folder / environment["slug"] / "additions.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A checkout with two devices' records, after `make report`."""
    root = tmp_path_factory.mktemp("checkout")
    results = root / "results"
    write_device(results, cpu_environment(), CPU_CASES[::2])
    write_device(results, gpu_environment(), GPU_CASES)
    write_additions(results, cpu_environment())
    (root / "README.md").write_text(README)
    assert run(root) == 0
    return root


@pytest.fixture
def one_device(tmp_path):
    """A checkout with few records and no pictures; returns the device's folder."""
    (tmp_path / "README.md").write_text(README)
    folder = write_device(tmp_path / "results", cpu_environment(), CPU_CASES[:4])
    write_additions(tmp_path / "results", cpu_environment())
    return folder


def run(root, *options):
    return report.main(
        ["--results", str(root / "results"), "--readme", str(root / "README.md"), *options]
    )


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def section(root, name="performance"):
    text = (root / "README.md").read_text()
    return text.split(f"<!-- {name}: begin (make report) -->")[1].split(f"<!-- {name}: end -->")[0]


def performance(folder):
    """The section on speed, its lines joined."""
    written = report.write_performance(reading.read_devices(folder.parent), folder.parents[1])
    return re.sub(r"\n(?!\n|[|<-])\s*", " ", written)


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_text_around_the_sections_stays_and_what_was_in_them_goes(drawn) -> None:
    text = (drawn / "README.md").read_text()
    for kept in ("# A package\n\nBefore.\n", "\nBetween.\n", "\nAfter.\n"):
        assert kept in text
    assert "stale" not in text


def test_every_link_leads_to_a_file(drawn) -> None:
    links = re.findall(r"\]\(([^)]+)\)", (drawn / "README.md").read_text())
    assert len(links) > 10
    for link in links:
        assert (drawn / link).exists(), link


def test_every_picture_is_linked_and_small(drawn) -> None:
    text = (drawn / "README.md").read_text()
    pictures = list(drawn.rglob("*.png"))
    names = {path.name for path in pictures}
    assert {"ratios.png", "limit.png", "memory.png", "sweep-t-float32.png"} <= names
    assert {"ratios-fused-lstm-cuda.png", "sweep-t-bfloat16.png", "limit-float32.png"} <= names
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000, path
        assert path.relative_to(drawn).as_posix() in text


def test_a_picture_is_the_same_when_drawn_again(drawn, tmp_path) -> None:
    (device,) = (d for d in reading.read_devices(drawn / "results") if "epyc" in d.folder.name)
    for picture in plots.list_pictures(device):
        if picture.file_name == "sweep-h-float32.png":
            picture.write(tmp_path)
            again = (tmp_path / picture.file_name).read_bytes()
            assert again == (device.folder / picture.file_name).read_bytes()


def test_check_writes_nothing_and_agrees_with_what_was_written(drawn, capsys) -> None:
    before = contents(drawn)
    assert run(drawn, "--check") == 0
    assert contents(drawn) == before
    assert capsys.readouterr().out == ""


def test_check_names_the_difference_and_a_missing_picture(drawn, tmp_path, capsys) -> None:
    root = tmp_path / "copy"
    shutil.copytree(drawn, root)
    text = (root / "README.md").read_text().replace("**NVIDIA H200**", "**NVIDIA B200**")
    (root / "README.md").write_text(text)
    (root / "results" / "amd-epyc-2-threads" / "memory.png").unlink()
    before = contents(root)
    assert run(root, "--check") == 1
    assert contents(root) == before
    printed = capsys.readouterr().out
    assert re.search(r"^-\*\*NVIDIA B200\*\*", printed, re.MULTILINE)
    assert re.search(r"^\+\*\*NVIDIA H200\*\*", printed, re.MULTILINE)
    assert re.search(r"no picture .*memory\.png", printed)


def test_the_latest_device_comes_first(drawn) -> None:
    written = section(drawn)
    assert 0 <= written.index("**NVIDIA H200**") < written.index("**AMD EPYC, 2 threads**")


def test_the_headline_says_on_what_it_was_measured(one_device) -> None:
    headline = {"provider": "fused_lstm", "mode": "inference", "shapes": ["a", "b"]}
    other = {**headline, "provider": "onnxruntime", "shapes": ["a"]}

    def change(content):
        content["headlines"] = [
            {**headline, "geometric_mean_of_ratio": 1.694},
            {**headline, "mode": "training", "geometric_mean_of_ratio": 1.618},
            {**other, "geometric_mean_of_ratio": 1.2},
        ]

    edit(one_device / "run.json", change)
    assert (
        "**AMD EPYC, 2 threads**: over 2 usual sizes in float32 `fused_lstm.LSTM` is 1.69 times as "
        "fast in inference and 1.62 times as fast in training as `torch.nn.LSTM` (geometric "
        "means; 2026-11-21, torch 2.13.0+cpu, onnxruntime 1.31.1, commit 0123456); ONNX Runtime "
        "1.20 in inference over 1 of them."
    ) in performance(one_device)


def test_a_dirty_tree_and_a_busy_machine_are_mentioned(one_device) -> None:
    edit(one_device / "run.json", lambda x: x["environment"].update(dirty=True, load_average=1.9))
    assert "commit 0123456 with changes, beside other work (load average 1.9)" in performance(
        one_device
    )


def set_ratios(path, ratio, mode=None):
    def change(content):
        for result in content["results"]:
            if result["provider"] == "fused_lstm" and mode in (None, result["mode"]):
                result["ratio"] = ratio

    edit(path, change)


def test_a_case_where_ours_is_slower_is_counted_named_and_bold(one_device) -> None:
    for path in reading.read_records(one_device):
        set_ratios(path.path, 1.5)
    set_ratios(one_device / "t200-b8-i32-h32-float32.json", 0.96, "training")
    set_ratios(one_device / "t100-b1-i64-h64-float32.json", 0.871)
    written = performance(one_device)
    assert (
        "In 3 of the 8 measurements (case × mode) `fused_lstm` is slower (below 0.97×; **bold** in "
        "the tables), at worst 0.87×: 100 × 1, 64 → 64, inference."
    ) in written
    assert "| 1.5× / **0.96×** |" in written
    assert "| **0.87×** / **0.87×** |" in written


def test_where_ours_is_nowhere_slower_that_is_said(one_device) -> None:
    for path in reading.read_records(one_device):
        set_ratios(path.path, 0.98)
    written = performance(one_device)
    assert "In none of the 8 measurements (case × mode) is `fused_lstm` slower by more" in written
    assert "more than 3 %." in written
    assert "**0.98×**" not in written


def test_the_first_table_has_the_case_where_ours_does_worst(drawn) -> None:
    device = reading.read_devices(drawn / "results")[1]
    shown = plots.sorted_by_group(device.records)
    selected = report._select(shown)
    assert len(selected) < len(shown)
    assert selected == [record for record in shown if record in selected]
    for group in {plots.group_of(record) for record in shown}:
        worst = min((r for r in shown if plots.group_of(r) == group), key=report._smallest_ratio)
        assert worst in selected


def test_groups_come_in_order_and_sweeps_last(drawn) -> None:
    for device in reading.read_devices(drawn / "results"):
        shown = plots.sorted_by_group(device.records)
        positions = [list(plots.GROUPS).index(plots.group_of(record)) for record in shown]
        assert positions == sorted(positions)
        assert not any(set(r.groups) <= {"sweep-T", "sweep-B", "sweep-H"} for r in shown)
    table = section(drawn).rpartition("All ")[2]
    assert table.index("*usual sizes*") < table.index("*variants*") < table.index("*sweeps*")


def test_launches_are_compared_with_torch_launched_likewise(drawn) -> None:
    written = section(drawn)
    header = next(line for line in written.splitlines() if "input → hidden" in line)
    assert "| `fused_lstm` | `fused_lstm`, CUDA graph | `fused_lstm[cuda]` |" in header
    assert "| FlashRNN | TorchRL |" in header


def test_another_package_has_a_column_and_its_error_is_told(drawn) -> None:
    written = section(drawn)
    assert "ONNX Runtime, inference" in written
    assert "FlashRNN up to 3.20×" in written
    # PyTorch's own layers by another way are in the pictures alone.
    assert "fused_lstm[aten]" not in written


def test_slopes_and_memory_are_told(drawn) -> None:
    written = " ".join(section(drawn).split())
    assert "steps 0.98 / 0.98 (`torch.nn.LSTM` 0.99 / 0.99); batch 0.71 / 0.71" in written
    assert "medians: inference 0.70× (0.70× to 0.70× over" in written


def test_without_a_gpu_the_section_says_so(drawn, one_device) -> None:
    assert "GPU figures are still to be measured: `make gpu`" in performance(one_device)
    assert "still to be measured" not in section(drawn)


def test_what_has_no_time_is_listed(one_device) -> None:
    def change(content):
        for result, status in zip(
            content["results"], ("torch", "wrong", "failed", "not run"), strict=False
        ):
            if status != "torch":
                result.update(
                    not_timed(result["provider"], result["mode"], "eager", status, "<no> *time*\n!")
                )

    edit(one_device / "t100-b1-i64-h64-float32.json", change)
    written = performance(one_device)
    name = "t100-b1-i64-h64-float32"
    assert f"1 failed: {name} (fused_lstm[aten], inference)" in written
    assert f"1 wrong: {name} (fused_lstm, inference)" in written
    assert r"1 not run, \<no\> \*time\*: " in written
    assert "1 not run, beyond the budget of 900 s: t9-b9-i9-h9-float32" in written
    assert run(one_device.parents[1]) == 0


def test_a_record_where_nothing_was_timed_is_no_error(one_device) -> None:
    for record in reading.read_records(one_device):
        edit(
            record.path,
            lambda x: x.update(
                results=[not_timed("torch", "training", "eager", "unavailable", "no memory")]
            ),
        )
    assert run(one_device.parents[1]) == 0
    assert not list(one_device.glob("*.png"))


def test_what_older_records_lack_is_left_out(one_device) -> None:
    def change(content):
        content["schema"] = 1
        for key in ("groups", "limits"):
            del content[key]
        for result in content["results"]:
            for key in (
                "limit_seconds",
                "limited_by",
                "fraction_of_limit",
                "memory_ratio",
                "bytes",
            ):
                del result[key]
            result["peak_memory_bytes"] = None
            result["error_over_budget"] = "inf"

    for record in reading.read_records(one_device):
        edit(record.path, change)

    def change_run(content):
        content["schema"] = 1
        del content["slopes"], content["limits"]

    edit(one_device / "run.json", change_run)
    written = performance(one_device)
    assert "usual sizes" in written
    for missing in ("limit", "emory", "Time grows", "Error against"):
        assert missing not in written
    (device,) = reading.read_devices(one_device.parent)
    assert [picture.file_name for picture in plots.list_pictures(device)] == ["ratios.png"]


def test_times_with_another_allocator_are_a_sentence_of_their_own(one_device) -> None:
    for path in [*one_device.glob("t100-b1-*.json"), one_device / "run.json"]:
        copy = path.with_name(f"{path.stem}-tuned-allocator.json")
        shutil.copy(path, copy)
        edit(copy, lambda x: x["environment"].update(allocator="glibc, 4 GiB thresholds"))
    (device,) = reading.read_devices(one_device.parent)
    assert len(device.records) == 4
    assert re.search(
        r"`fused_lstm` \S+ in inference and \S+ in training with another allocator \(glibc, ",
        performance(one_device),
    )


def test_records_of_another_commit_are_told(one_device) -> None:
    path = one_device / "t100-b1-i64-h64-float32.json"
    earlier = {"date": "2026-10-01T00:00:00+00:00"}
    edit(path, lambda x: x["environment"].update(earlier))
    # Of the same code: a run that went on where another was cut off.
    assert "another commit" not in performance(one_device)
    edit(path, lambda x: x["environment"].update(commit="fedcba"))
    written = performance(one_device)
    assert (
        "1 of the 4 records are of another commit or PyTorch, the oldest of 2026-10-01." in written
    )


def test_without_headlines_the_means_are_over_the_cases(one_device) -> None:
    edit(one_device / "run.json", lambda x: x.update(headlines=[]))
    for record in reading.read_records(one_device):
        set_ratios(record.path, 2.0, "inference")
        set_ratios(record.path, 1.5, "training")
    assert (
        "over 4 cases `fused_lstm.LSTM` is 2.00 times as fast in inference and 1.50 times as fast "
        "in training"
    ) in performance(one_device)


def test_a_case_that_failed_before_any_result_is_listed(one_device) -> None:
    line = "t1-b1-i1-h1-float32: OutOfMemoryError: too large"
    edit(one_device / "run.json", lambda x: x.update(failed=[line]))
    assert f"1 failed: {line};" in performance(one_device)


def test_a_picture_whose_records_are_gone_goes(one_device) -> None:
    stale = one_device / "sweep-t-float16.png"
    stale.write_bytes(b"")
    assert run(one_device.parents[1]) == 0
    assert not stale.exists()


def test_the_additions_table_is_of_the_record(drawn) -> None:
    written = " ".join(section(drawn, "additions").split())
    assert "[AMD EPYC, 2 threads](results/amd-epyc-2-threads/additions.json)" in written
    assert "| | instead of | batch 8, 16 → 64 | batch 64, 128 → 128 |" in written
    assert "a loop over single steps of `nn.LSTM` | 32× / 36× | 2.6× / 3.2× |" in written
    assert "a loop over `nn.LSTMCell` | 11× / – | – / wrong |" in written
    assert "64 sequences of 128 units" in written
    assert "would make `resets` 2.7× / 3.9×." in written
    assert "cells cost at most 9 % of its time, `weight_dropout` 26 %, `zoneout` in" in written
    assert "training 46 to 94 %" in written


def test_the_latest_additions_count(one_device) -> None:
    folder = one_device.parent
    later = {**gpu_environment(), "date": "2027-01-01T00:00:00+00:00"}
    (folder / later["slug"]).mkdir()
    write_additions(folder, later)
    assert "[NVIDIA H200](" in report.write_additions(folder, folder.parent)


def test_without_additions_the_section_says_so(one_device) -> None:
    (one_device / "additions.json").unlink()
    written = report.write_additions(one_device.parent, one_device.parents[1])
    assert "`make bench` measures them" in written


def broken(content: str):
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    ("file_name", "damage", "message"),
    [
        ("t100-b1-i64-h64-float32.json", broken("{"), "not JSON"),
        ("t100-b1-i64-h64-float32.json", broken("[]"), "schema 1 or 2, got None"),
        ("t100-b1-i64-h64-float32.json", broken('{"schema": 3}'), "schema 1 or 2, got 3"),
        ("t100-b1-i64-h64-float32.json", broken('{"schema": 2}'), "lacks 'case'"),
        ("run.json", broken('{"schema": 2}'), "lacks 'environment'"),
        ("additions.json", broken("no"), "not JSON"),
    ],
)
def test_a_broken_record_is_named(one_device, capsys, file_name, damage, message) -> None:
    damage(one_device / file_name)
    before = contents(one_device.parents[1])
    assert run(one_device.parents[1]) == 2
    printed = capsys.readouterr().err
    assert str(one_device / file_name) in printed
    assert message in printed
    assert contents(one_device.parents[1]) == before


def test_without_records_the_folder_is_named(tmp_path, capsys) -> None:
    (tmp_path / "README.md").write_text(README)
    assert run(tmp_path) == 2
    assert f"{tmp_path / 'results'}: no records" in capsys.readouterr().err


@pytest.mark.parametrize("section_name", ["performance", "additions"])
@pytest.mark.parametrize("end", ["begin (make report)", "end"])
def test_a_missing_marker_is_named(one_device, capsys, section_name, end) -> None:
    root = one_device.parents[1]
    marker = f"<!-- {section_name}: {end} -->"
    (root / "README.md").write_text(README.replace(marker, ""))
    assert run(root) == 2
    assert f"expected the marker {marker} once, found it 0 times" in capsys.readouterr().err


def test_the_readme_says_what_the_committed_records_say(capsys) -> None:
    options = ["--results", str(ROOT / "benchmarks/results"), "--readme", str(ROOT / "README.md")]
    assert report.main([*options, "--check"]) == 0, capsys.readouterr()
